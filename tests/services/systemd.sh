#!/bin/sh
# Boot a systemd that is PID 1 of namespaces of its own, over a root that forgets all that is written, and wait for its
# end. Started by tests/services/systemd.py inside a mount namespace:
#
#     systemd.sh FOLDER PYTHON PACKAGES CHECKOUT
#
# The network is the machine's own. Python, its packages and the sources are where a sandbox without /home and /root sees
# them; unit files lie in CHECKOUT/deploy/systemd, and are installed by the tests.
set -eu
folder=$1 python=$2 packages=$3 checkout=$4

if [ "${5:-}" != inside ]; then
    mount -t tmpfs tmpfs "$folder"
    mkdir "$folder/cgroup" "$folder/upper" "$folder/work" "$folder/root"
    mount -t cgroup2 cgroup2 "$folder/cgroup"
    group="$folder/cgroup/letta-gateway-tests-$$"
    mkdir "$group"
    echo $$ >"$group/cgroup.procs"
    unshare --cgroup --pid --fork --kill-child --ipc --uts --mount --propagation private \
        sh "$0" "$folder" "$python" "$packages" "$checkout" inside || true
    echo $$ >"$folder/cgroup/cgroup.procs"
    find "$group" -depth -type d -exec rmdir {} +
    exit
fi

root="$folder/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" "$root"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s pts/ptmx "$root/dev/ptmx"
for place in run etc/systemd/system opt; do
    mkdir -p "$root/$place"
    mount -t tmpfs -o mode=755 tmpfs "$root/$place"
done
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
rm -rf "$root/etc/credstore" "$root/etc/letta-gateway"
mkdir -p "$root/run/before" "$root/opt/letta-gateway/bin"

for bound in "$python:python" "$packages:packages" "$checkout/gateway:source/gateway" \
    "$checkout/middleware:source/middleware" "$checkout/deploy:source/deploy"; do
    mkdir -p "$root/opt/${bound##*:}"
    mount --bind "${bound%:*}" "$root/opt/${bound##*:}"
    mount -o remount,bind,ro "$root/opt/${bound##*:}"
done
cat >"$root/opt/letta-gateway/bin/letta-gateway" <<X
#!/opt/python/bin/python3
import sys
sys.path[:0] = ["/opt/source", "/opt/packages"]
from gateway.__main__ import main
main()
X
chmod 755 "$root/opt/letta-gateway/bin/letta-gateway"

printf '[Unit]\nDefaultDependencies=no\n' >"$root/etc/systemd/system/tests.target"

cd "$root"
pivot_root . run/before
umount -l /run/before
mount --make-rshared /
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=tests \
    /lib/systemd/systemd --system --unit=tests.target --log-target=null --show-status=no </dev/null
