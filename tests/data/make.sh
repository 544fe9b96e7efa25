#!/usr/bin/env bash
# Regenerates the fixtures with qemu-img and qemu-io; run it through `cargo xtask fixtures`.
#
#   images/      valid images over the whole matrix, with their backing and data files
#   images.tsv   name, guest size, CRC-32 of the guest content, exit code of qemu-img check
#   damaged.tsv  damaged images, each a change of a valid one: name, exit code of qemu-img check, CRC-32 of what qemu-img
#                convert reads (fails, or endless if it was stopped), the valid image, length of the file, changes as
#                OFFSET:HEX
#
# The guest content is read with qemu-img convert, so the checksums are the reference tool's, not ours.
set -euo pipefail
cd "$(dirname "$0")"
export LC_ALL=C

rm -rf images
mkdir images
cd images

# Text without repetition, to write with `write -s`.
seq 1 60000 >../text.tmp
trap 'rm -f ../*.tmp' EXIT
trap 'echo "make.sh: line $LINENO failed" >&2' ERR

quiet() { "$@" >/dev/null 2>../log.tmp || { cat ../log.tmp >&2; echo "failed: $*" >&2; exit 1; }; }

# image NAME SIZE OPTIONS [qemu-io command]...
image() {
  local name=$1 size=$2 options=$3
  shift 3
  quiet qemu-img create -f qcow2 ${options:+-o "$options"} "$name.qcow2" "$size"
  change "$name" "$@"
}

# change NAME [qemu-io command]...: all commands in one process
change() {
  local name=$1 args=() command
  shift
  for command in "$@"; do args+=(-c "$command"); done
  [ ${#args[@]} = 0 ] || quiet qemu-io -f qcow2 -t writeback -d unmap "${args[@]}" "$name.qcow2"
}

text() { echo "write -s ../text.tmp $1 $2"; }

# Content that crosses clusters and L2 tables (one covers 32 KiB with clusters of 512 bytes), starts and ends inside
# clusters, and leaves holes.
common=("$(text 0 3000)" "write -P 0x21 5k 512" "$(text 12800 2300)" "write -P 0x22 29k 7k" "$(text 60k 3k)"
  "write -P 0 40k 1k" "write -z 42k 1536" "write -z -u 30k 1k" "discard 61k 1k")
size=$((66 * 1024 + 512))

# Versions and cluster sizes.
for bits in 512 1k 2k 4k; do
  image "v2-$bits" $size "compat=0.10,cluster_size=$bits" "${common[@]}"
  image "v3-$bits" $size "compat=1.1,cluster_size=$bits" "${common[@]}"
done
image v3-64k 3M cluster_size=64k "$(text 2000k 300)"
image empty-512 1M cluster_size=512
image empty-v2 1M compat=0.10,cluster_size=512
image size-0 0 cluster_size=512
image size-512 512 cluster_size=512 "write -P 9 0 512"

# Refcount widths.
for bits in 1 2 4 8 32 64; do
  image "refcount-$bits" $size "cluster_size=512,refcount_bits=$bits" "${common[@]}"
done

# Lazy refcounts: closed cleanly, and left dirty.
image lazy $size cluster_size=512,lazy_refcounts=on "${common[@]}"
image dirty $size cluster_size=512,lazy_refcounts=on
(qemu-io -f qcow2 -c "write -P 5 1k 9k" -c flush -c abort dirty.qcow2 || true) >/dev/null 2>&1

# Preallocation.
image prealloc-metadata 20k cluster_size=512,preallocation=metadata "write -P 3 1k 3k"
image prealloc-zero 64k cluster_size=512 "write -P 3 0 12k" "write -z 4k 6k" "write -P 4 5k 600"

# Compression: both methods, streams that share a host cluster, some overwritten since, some bytes that do not compress.
head -c 40000 ../text.tmp >../plain.tmp
head -c 6000 /dev/zero >>../plain.tmp
gzip -9 -n <../text.tmp >../packed.tmp
head -c 6000 ../packed.tmp >>../plain.tmp
truncate -s 60k ../plain.tmp
compressed() { quiet qemu-img convert -c -f raw -O qcow2 -o "$2" ../plain.tmp "$1.qcow2"; }
compressed zlib-512 cluster_size=512,compression_type=zlib
compressed zlib-4k cluster_size=4k,compression_type=zlib
compressed zlib-v2 cluster_size=2k,compat=0.10
compressed zstd-1k cluster_size=1k,compression_type=zstd
compressed zstd-4k cluster_size=4k,compression_type=zstd
for method in zlib zstd; do
  change "$method-4k" "write -P 6 20k 100" "discard 32k 8k" "write -z 12k 4k"
done

# Extended L2 entries: subclusters allocated, zero, from the backing file.
subclusters=("$(text 0 700)" "write -P 0x31 5000 3000" "write -z 2k 1k" "write -z -u 9k 2k" "write -P 0x32 40k 512" "discard 16k 16k")
image extended 70k extended_l2=on,cluster_size=16k "${subclusters[@]}"

# Backing files: raw and qcow2, shorter and longer than the overlay, chains of three, both versions.
head -c 20000 ../text.tmp >base-short.raw
truncate -s 20k base-short.raw
tail -c 60000 ../text.tmp >base-long.raw
truncate -s 72k base-long.raw
over() { image "$1" "$2" "$3,backing_file=$4,backing_fmt=$5" "${@:6}"; }
few=("write -P 1 1k 700" "write -z 8k 4k" "discard 12k 5k")
over overlay-raw-short 40k cluster_size=512 base-short.raw raw "${few[@]}" "write -P 2 19k 3k"
over overlay-raw-long 50k cluster_size=4k base-long.raw raw "${few[@]}"
over overlay-v2 50k compat=0.10,cluster_size=512 base-long.raw raw "${few[@]}"
over overlay-middle 50k cluster_size=1k v3-512.qcow2 qcow2 "write -P 0x41 2k 3k" "write -z 30k 9k"
over overlay-top 45k cluster_size=512 overlay-middle.qcow2 qcow2 "write -P 0x42 4k 300" "discard 31k 1k" "write -P 0x43 44k 1k"
over overlay-extended 68k extended_l2=on,cluster_size=16k,refcount_bits=1 base-long.raw raw "${subclusters[@]}"
over overlay-on-compressed 60k cluster_size=2k zlib-4k.qcow2 qcow2 "write -P 0x44 21k 300"

# External data files: with holes of its own, byte for byte the disk, and below it a backing file.
image data-file 40k cluster_size=512,data_file=data-file.raw "${common[@]:0:4}"
image data-file-raw 40k cluster_size=4k,data_file=data-file-raw.raw,data_file_raw=on "${common[@]:0:4}"
over data-file-overlay 24k cluster_size=512,data_file=data-file-overlay.raw base-long.raw raw "${few[@]}"

# Internal snapshots: the active content differs from each of them.
image snapshots $size cluster_size=512 "${common[@]}"
quiet qemu-img snapshot -c one snapshots.qcow2
change snapshots "write -P 0x51 2k 3k" "write -P 0x52 50k 1k"
quiet qemu-img snapshot -c two snapshots.qcow2
change snapshots "write -P 0x53 2k 1k" "discard 12k 8k"

# Persistent bitmaps.
image bitmaps 100k cluster_size=512 "write -P 4 0 1k"
quiet qemu-img bitmap --add -g 512 bitmaps.qcow2 changed
quiet qemu-img bitmap --add --disable -g 64k bitmaps.qcow2 old
change bitmaps "write -P 5 70k 2k"

# poke FILE OFFSET HEX: overwrites bytes
poke() { printf "$(sed 's/../\\x&/g' <<<"$3")" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }

# What a later version might add: compatible and autoclear bits, a longer header, an unknown extension.
cp v3-512.qcow2 future.qcow2
poke future.qcow2 80 8000000000000000
poke future.qcow2 88 4000000000000000
poke future.qcow2 100 00000078
poke future.qcow2 112 0000000000000000
poke future.qcow2 120 12345678000000056c617465720000000000000000000000

# Encrypted with the old method: must be refused without a key, not read as plain data.
quiet qemu-img create -f qcow2 --object secret,id=s,data=secret -o cluster_size=512,encrypt.format=aes,encrypt.key-secret=s encrypted-aes.qcow2 64k

# --- damaged ---------------------------------------------------------------------------------------------------------
number() { od -An -tu8 --endian=big -j "$2" -N 8 "$1" | tr -d ' '; }
masked() { echo $(($(od -An -td8 --endian=big -j "$2" -N 8 "$1") & 0x00fffffffffffe00)); }
word() { printf '%016x' "$1"; }
crc() { gzip -1 -c "$1" | tail -c 8 | od -An -tx4 --endian=little -N 4 | tr -d ' '; }
code() { local code=0; timeout 5 "$@" >/dev/null 2>&1 || code=$?; echo $code; }

# sound NAME: selects the image to damage from here on, and finds its tables
sound() {
  sound=$1.qcow2
  bytes=$(stat -c %s "$sound")
  l1=$(number "$sound" 40)
  l2=$(masked "$sound" "$l1")
  data=$(masked "$sound" "$l2")
  refcounts=$(number "$sound" 48)
  block=$(number "$sound" "$refcounts")
}
copied=$((1 << 63))
: >../damaged.tsv

# damage NAME LENGTH [OFFSET HEX]...
damage() {
  local name=$1 length=$2 changes=() check read
  shift 2
  head -c "$length" "$sound" >../damaged.tmp
  while [ $# -gt 0 ]; do
    poke ../damaged.tmp "$1" "$2"
    changes+=("$1:$2")
    shift 2
  done
  check=$(code qemu-img check -f qcow2 ../damaged.tmp)
  read=$(code qemu-img convert -f qcow2 -O raw ../damaged.tmp ../content.tmp)
  case $read in
    0) read=$(crc ../content.tmp) ;;
    124) read=endless ;;
    *) read=fails ;;
  esac
  printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$name" "$check" "$read" "$sound" "$length" "${changes[*]:--}" >>../damaged.tsv
}
# patch NAME [OFFSET HEX]...: damage that keeps the length
patch() { damage "$1" "$bytes" "${@:2}"; }

sound v3-512
free=$block # becomes the place of the first refcount that is 0
while [ "$(od -An -tu2 -j "$free" -N 2 "$sound" | tr -d ' ')" != 0 ]; do free=$((free + 2)); done
# Truncated files.
damage empty-file 0
damage three-bytes 3
damage short-header-v2 60 4 00000002
damage short-header-v3 90
damage only-header 512
damage cut-in-l1 $((l1 + 8))
damage cut-in-l2 $((l2 + 100))
damage cut-in-data $((bytes - 2000))
# Header fields.
patch bad-magic 0 51464900
patch version-1 4 00000001
patch version-4 4 00000004
patch cluster-bits-8 20 00000008
patch cluster-bits-22 20 00000016
patch cluster-bits-huge 20 ffffffff
patch crypt-method-3 32 00000003
patch refcount-order-7 96 00000007
patch header-length-8 100 00000008
patch header-length-huge 100 7ffffff8
patch extension-too-long 112 1234567800001000
patch backing-outside 8 0000000000001000 16 00000010
patch backing-name-long 8 0000000000000100 16 00000400
patch unknown-incompatible 72 8000000000000000
patch compression-unknown 104 07
patch compression-mismatch 104 01
patch extended-small-clusters 72 0000000000000010
patch raw-without-data-file 88 0000000000000002
patch data-file-unnamed 72 0000000000000004
patch luks-without-header 32 00000002
patch corrupt-bit 72 0000000000000002
patch dirty-bit 72 0000000000000001
# Sizes that claim gigabytes.
patch size-huge 24 7ffffffffffffe00
patch l1-too-small 36 00000001
patch l1-gigabytes 36 7fffffff
patch l1-at-limit 36 00400000
patch l1-past-end 40 0000000040000000
patch l1-misaligned 40 "$(word $((l1 + 8)))"
patch refcount-table-gigabytes 56 7fffffff
patch refcount-table-at-limit 56 00004000
patch refcount-table-missing 56 00000000
patch refcount-table-misaligned 48 "$(word $((refcounts + 8)))"
patch snapshots-claimed 60 00010000 64 "$(word "$bytes")"
patch snapshots-too-many 60 7fffffff
# L1 and L2 entries.
patch l1-entry-past-end "$l1" 8000000040000000
patch l1-entry-reserved "$l1" "$(word $((copied | l2 | 1 << 56)))"
patch l1-entry-not-copied "$l1" "$(word "$l2")"
patch l1-entry-on-l1 "$l1" "$(word $((copied | l1)))"
patch l2-entry-past-end "$l2" 8000000040000000
patch l2-entry-reserved "$l2" "$(word $((copied | data | 2)))"
patch l2-entry-on-header "$l2" "$(word $((copied | refcounts)))"
patch l2-entry-on-l1 "$l2" "$(word $((copied | l1)))"
patch l2-entry-not-copied "$l2" "$(word "$data")"
patch l2-entries-shared $((l2 + 8)) "$(word $((copied | data)))"
patch compressed-garbage "$l2" "$(word $((1 << 62 | data)))"
patch compressed-copied "$l2" "$(word $((copied | 1 << 62 | data)))"
patch compressed-past-end "$l2" 4000000040000000
# Refcounts.
patch refcount-leak "$free" 0001
patch refcount-high $((block + 2 * (data / 512))) 0002
patch refcount-low $((block + 2 * (data / 512))) 0000
patch refcount-of-header "$block" 0000
patch refcount-block-past-end "$refcounts" 0000000040000000
patch refcount-entry-reserved "$refcounts" "$(word $((block | 1)))"
patch refcount-block-missing "$refcounts" 0000000000000000

# With larger clusters an offset can be misaligned.
sound v3-4k
patch l1-entry-misaligned "$l1" "$(word $((copied | l2 + 512)))"
patch l2-entry-misaligned "$l2" "$(word $((copied | data + 512)))"
patch l2-zero-misaligned "$l2" "$(word $((copied | data + 512 | 1)))"
patch refcount-block-misaligned "$refcounts" "$(word $((block + 512)))"
# Version 2 has no zero flag.
sound v2-4k
patch zero-flag-in-v2 "$l2" 0000000000000001
patch extension-past-backing 8 0000000000000050 16 00000004 72 1234567800000100
# Subclusters both allocated and zero, or allocated without a host cluster; a compressed cluster with a bitmap.
sound extended
patch subclusters-both $((l2 + 8)) 00000001ffffffff
patch subclusters-nowhere "$l2" 000000000000000000000000ffffffff
patch compressed-with-bitmap "$l2" "$(word $((1 << 62 | data)))" $((l2 + 8)) 0000000000000001
# A damaged snapshot table.
sound snapshots
snapshots=$(number "$sound" 64)
patch snapshot-l1-huge $((snapshots + 8)) 7fffffff
patch snapshot-l1-past-end "$snapshots" 0000000040000000
patch snapshot-l1-misaligned "$snapshots" 0000000000000a08
patch snapshot-extra-huge $((snapshots + 36)) 7fffffff
# Damaged bitmaps.
sound bitmaps
directory=$(number "$sound" 136)
patch bitmap-table-huge $((directory + 8)) 7fffffff
patch bitmap-granularity $((directory + 17)) ff
patch bitmaps-claimed 120 7fffffff
patch bitmap-directory-huge 128 000000007fffffff

# --- results of the reference -----------------------------------------------------------------------------------------
: >../images.tsv
for file in *.qcow2; do
  digest=-
  if [ "$file" != encrypted-aes.qcow2 ]; then
    quiet qemu-img convert -f qcow2 -O raw "$file" ../content.tmp
    digest=$(crc ../content.tmp)
  fi
  printf '%s\t%s\t%s\t%s\n' "$file" "$(number "$file" 24)" "$digest" "$(code qemu-img check -f qcow2 "$file")" >>../images.tsv
done
