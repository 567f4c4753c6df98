#!/bin/sh
# The guest's process 1.  The host's root, mounted read-only by the kernel, gets a layer of tmpfs on top,
# so that everything can be written and nothing reaches the host; session.sh goes on inside of it.
# RUN, a word of the kernel's command line, is the host's folder of this run; see boot.py for `settings`.
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
. "$RUN/settings"

mount -t proc proc /proc
modprobe -d "$RUN" -a $EARLY_MODULES
mount -t tmpfs -o size=50% tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root /mnt/kept
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
root=/mnt/root

# What the session needs of a folder that gets a mount of its own: the checkout may lie in /tmp
number=0
printf '%s\n' "$KEPT" | while read -r path; do
  [ -n "$path" ] || continue
  number=$((number + 1))
  mkdir "/mnt/kept/$number"
  mount --bind "$root$path" "/mnt/kept/$number"
done

mount -t proc proc $root/proc
mount -t sysfs sys $root/sys
mount -t devtmpfs dev $root/dev
mkdir -p $root/dev/pts $root/dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts $root/dev/pts
mount -t tmpfs shm $root/dev/shm
mount -t tmpfs -o mode=755 run $root/run
mount -t tmpfs -o size=75%,mode=1777 tmp $root/tmp
mkdir $root/run/lock $root/run/uml

number=0
printf '%s\n' "$KEPT" | while read -r path; do
  [ -n "$path" ] || continue
  number=$((number + 1))
  mkdir -p "$root$path"
  mount --bind "/mnt/kept/$number" "$root$path"
done

# Folders of the host that the guest may write, at the same path
printf '%s\n' "$WRITABLE" | while read -r path; do
  [ -n "$path" ] || continue
  mkdir -p "$root$path"
  mount -t hostfs -o "$path" none "$root$path"
done

# Moved over the old root, not only chroot: who enters a container's mount namespace (runc exec) begins
# at the root of the namespace, which pivot_root has to have replaced
cd $root
mount -n --move . /
exec chroot . /bin/sh "$HERE/session.sh"
