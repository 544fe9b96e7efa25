#!/usr/bin/env bash
# Runs libvirt's storage driver with our program first on its path as qemu-img: creates, clones, resizes, stacks, fills,
# reads, wipes and deletes volumes. Every call must reach our program and succeed, and every image must pass qemu-img's
# check. Prints each call and its exit code. The storage driver has no snapshots: libvirt takes them of domains, and defining
# a domain needs a qemu-system. With EMULATOR, the path of one, internal and external snapshots of a shut-off domain's disk
# are created, reverted to and deleted too.
#   tests/clients/libvirt.sh PROGRAM [EMULATOR]
# Needs root, libvirtd and virsh (Debian: libvirt-daemon, libvirt-daemon-driver-qemu, libvirt-clients), and the user
# libvirt-qemu, which the daemon requires and which must be able to run EMULATOR.
set -euo pipefail
program=$(realpath "$1")
reference=$(command -v qemu-img)
work=$(mktemp -d)
mkdir "$work/bin" "$work/real" "$work/pool"
ln -s "$program" "$work/real/qemu-img"
cat > "$work/bin/qemu-img" <<END
#!/bin/sh
"$work/real/qemu-img" "\$@"
code=\$?
echo "\$code \$*" >> "$work/calls"
exit \$code
END
chmod +x "$work/bin/qemu-img"
printf 'unix_sock_dir = "%s"\nauth_unix_rw = "none"\nlog_outputs = "3:file:%s/log"\n' "$work" "$work" > "$work/conf"

v() { virsh -q -c "storage+unix:///system?socket=$work/libvirt-sock" "$@"; }
d() { virsh -q -c "qemu+unix:///system?socket=$work/libvirt-sock" "$@"; }

# True if the first MiB of a disk is filled with this byte.
holds() {
  local said
  said=$(qemu-io -r -c "read -P $1 0 1M" "$2")
  [[ $said == *'read 1048576/1048576'* && $said != *'verification failed'* ]]
}

# Snapshots of a shut-off domain: libvirt calls `qemu-img snapshot` and `qemu-img create` for them.
snapshots() {
  local disk=$work/vm/disk.qcow2
  chmod 755 "$work"; mkdir "$work/vm"
  "$work/real/qemu-img" create -q -f qcow2 "$disk" 64M
  cat > "$work/domain.xml" <<END
<domain type='qemu'>
  <name>$pool</name><memory unit='MiB'>128</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>$1</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='$disk'/><target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
END
  d define "$work/domain.xml"
  qemu-io -c 'write -P 1 0 1M' "$disk" > /dev/null
  d snapshot-create-as $pool first
  qemu-io -c 'write -P 2 0 1M' "$disk" > /dev/null
  d snapshot-create-as $pool second
  d snapshot-revert $pool first
  holds 1 "$disk"
  d snapshot-revert $pool second
  holds 2 "$disk"
  d snapshot-delete $pool first
  d snapshot-create-as $pool outside --disk-only
  d domblklist $pool | grep -F "$work/vm/disk.outside" > /dev/null
  for image in "$disk" "$work/vm/disk.outside"; do "$reference" check -q "$image"; done
  d undefine $pool --snapshots-metadata
  echo "snapshots of a domain: 2 inside, 2 reverts, 1 delete, 1 outside, all clean"
}
pool=qcow2-$$
PATH="$work/bin:$PATH" libvirtd -f "$work/conf" -p "$work/pid" &
daemon=$!
trap 'v pool-destroy $pool || true; kill $daemon 2>/dev/null || true; wait $daemon 2>/dev/null || true; rm -rf "$work"' EXIT
for _ in $(seq 100); do [ -S "$work/libvirt-sock" ] && break; sleep 0.1; done

v pool-create-as $pool dir --target "$work/pool"
v vol-create-as $pool a.qcow2 1G --format qcow2
v vol-create-as $pool b.raw 10M --format raw
v vol-create-as $pool over.qcow2 1G --format qcow2 --backing-vol a.qcow2 --backing-vol-format qcow2
v vol-create-as $pool pre.qcow2 10M --format qcow2 --prealloc-metadata
v vol-create $pool /dev/stdin <<END
<volume><name>lazy.qcow2</name><capacity unit='MiB'>64</capacity><target><format type='qcow2'/><compat>1.1</compat>
<clusterSize unit='KiB'>128</clusterSize><features><lazy_refcounts/><extended_l2/></features></target></volume>
END
v vol-clone a.qcow2 clone.qcow2 --pool $pool
v vol-resize a.qcow2 2G --pool $pool
v vol-resize clone.qcow2 1G --delta --pool $pool
v vol-dumpxml over.qcow2 --pool $pool | grep "<path>$work/pool/a.qcow2</path>" > /dev/null
v vol-info a.qcow2 --pool $pool | grep "Capacity: *2.00 GiB" > /dev/null
v vol-info clone.qcow2 --pool $pool | grep "Capacity: *2.00 GiB" > /dev/null
head -c 3000000 /dev/urandom > "$work/disk"
v vol-upload b.raw "$work/disk" --pool $pool
v vol-clone b.raw copy.raw --pool $pool
v vol-download copy.raw "$work/back" --pool $pool --length 3000000
cmp "$work/disk" "$work/back"
"$work/real/qemu-img" convert -O qcow2 "$work/disk" "$work/disk.qcow2"
v vol-create-as $pool up.qcow2 3000320 --format qcow2
v vol-upload up.qcow2 "$work/disk.qcow2" --pool $pool
v vol-clone up.qcow2 up2.qcow2 --pool $pool
v vol-create-as $pool old.qcow2 3000320 --format qcow2 --backing-vol up2.qcow2 --backing-vol-format qcow2
v vol-clone old.qcow2 flat.qcow2 --pool $pool
v pool-refresh $pool
"$reference" compare -q -f raw -F qcow2 "$work/disk" "$work/pool/flat.qcow2"
v vol-create-from $pool /dev/stdin --vol flat.qcow2 --inputpool $pool <<END
<volume><name>flat.raw</name><capacity>3000320</capacity><target><format type='raw'/></target></volume>
END
"$reference" compare -q -f raw -F raw "$work/disk" "$work/pool/flat.raw"
v vol-resize flat.raw 4M --pool $pool
v vol-resize clone.qcow2 1G --shrink --pool $pool
v vol-create-from $pool /dev/stdin --vol flat.qcow2 --inputpool $pool <<END
<volume><name>new.qcow2</name><capacity>3000320</capacity><target><format type='qcow2'/><compat>1.1</compat>
<features><lazy_refcounts/></features></target></volume>
END
"$reference" compare -q -f qcow2 -F qcow2 "$work/pool/flat.qcow2" "$work/pool/new.qcow2"
v vol-download new.qcow2 "$work/back.qcow2" --pool $pool
cmp "$work/pool/new.qcow2" "$work/back.qcow2"
v vol-wipe copy.raw --pool $pool
v vol-wipe new.qcow2 --pool $pool --algorithm zero
for volume in b.raw copy.raw old.qcow2 flat.raw; do v vol-delete $volume --pool $pool; done
for image in a over pre lazy clone up up2 flat; do "$reference" check -q "$work/pool/$image.qcow2"; done
[ $# -lt 2 ] || snapshots "$2"
grep -q '^0 create .*over.qcow2' "$work/calls"
grep -q '^0 convert .*clone.qcow2' "$work/calls"
grep -q '^0 resize .*a.qcow2' "$work/calls"
sed "s|$work/||g" "$work/calls"
! grep -v '^0 ' "$work/calls"
echo "libvirt: $(wc -l < "$work/calls") calls of qemu-img, $(v vol-list $pool | wc -l) volumes, all clean"
