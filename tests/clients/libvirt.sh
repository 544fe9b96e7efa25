#!/usr/bin/env bash
# libvirt's storage driver with our program first on its path as qemu-img: volumes are made, cloned, resized, put on each
# other and deleted; every call must reach our program, and every image must pass qemu-img's check.
#   tests/clients/libvirt.sh PROGRAM
# Needs root, libvirtd and virsh (Debian: libvirt-daemon, libvirt-clients), and the user libvirt-qemu that the daemon wants.
set -euo pipefail
program=$(realpath "$1")
reference=$(command -v qemu-img)
work=$(mktemp -d)
mkdir "$work/bin" "$work/real" "$work/pool"
ln -s "$program" "$work/real/qemu-img"
printf '#!/bin/sh\necho "$@" >> "%s/calls"\nexec "%s/real/qemu-img" "$@"\n' "$work" "$work" > "$work/bin/qemu-img"
chmod +x "$work/bin/qemu-img"
printf 'unix_sock_dir = "%s"\nauth_unix_rw = "none"\nlog_outputs = "3:file:%s/log"\n' "$work" "$work" > "$work/conf"

v() { virsh -q -c "storage+unix:///system?socket=$work/libvirt-sock" "$@"; }
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
v vol-clone a.qcow2 clone.qcow2 --pool $pool
v vol-resize a.qcow2 2G --pool $pool
v vol-resize clone.qcow2 1G --delta --pool $pool
v vol-dumpxml over.qcow2 --pool $pool | grep "<path>$work/pool/a.qcow2</path>" > /dev/null
v vol-info a.qcow2 --pool $pool | grep "Capacity: *2.00 GiB" > /dev/null
v vol-info clone.qcow2 --pool $pool | grep "Capacity: *2.00 GiB" > /dev/null
v vol-delete b.raw --pool $pool
for image in a over pre clone; do "$reference" check -q "$work/pool/$image.qcow2"; done
grep -q '^create .*over.qcow2' "$work/calls"
grep -q '^convert .*clone.qcow2' "$work/calls"
grep -q '^resize .*a.qcow2' "$work/calls"
echo "libvirt: $(wc -l < "$work/calls") calls of qemu-img, $(v vol-list $pool | wc -l) volumes, all clean"
