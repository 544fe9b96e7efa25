#!/bin/sh
# Makes the certificates of the tests anew, with openssl. They end in a hundred years.
set -e
cd "$(dirname "$0")"
key() {
  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1-key.pem"
}
authority() {
  key "$1"
  openssl req -x509 -new -key "$1-key.pem" -out "$1-cert.pem" -days 36500 -subj "/CN=qcow2 test $1" \
    -addext "keyUsage=critical,keyCertSign,cRLSign"
}
# Name, use, further extensions, last day.
signed() {
  key "$1"
  printf 'basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature,keyEncipherment\nextendedKeyUsage=%s\n%s\n' "$2" "$3" >ext
  openssl req -new -key "$1-key.pem" -subj "/CN=qcow2 test $1" -out csr
  openssl ca -batch -notext -config ca.conf -cert ca-cert.pem -keyfile ca-key.pem -in csr -out "$1-cert.pem" \
    -startdate 20200101000000Z -enddate "$4" -extfile ext
}
cat >ca.conf <<END
[ca]
default_ca = it
[it]
database = index
new_certs_dir = .
default_md = sha256
policy = any
rand_serial = yes
unique_subject = no
[any]
commonName = supplied
END
: >index
authority ca
authority other-ca
names='subjectAltName=DNS:localhost,IP:127.0.0.1'
signed server serverAuth "$names" 21200101000000Z
signed old-server serverAuth "$names" 20210101000000Z
signed client clientAuth '' 21200101000000Z
# Who needs the keys of the authorities makes others.
rm -f ca-key.pem other-ca-key.pem csr ext ca.conf index* ./[0-9A-F]*.pem
