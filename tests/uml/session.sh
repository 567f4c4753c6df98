#!/bin/sh
# The second half of init.sh, inside the writable root: devices, then the command; its exit status goes
# out on the control line, /dev/ttyS1, as `status N`.  Whatever ends without that word is a lost kernel.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
. "$RUN/settings"

finish() {
  [ -z "$1" ] || echo "status $1" >/dev/ttyS1
  printf '%s\n' "$WRITABLE" | while read -r path; do
    [ -z "$path" ] || sync -f "$path"
  done
  busybox halt -f
}
trap 'finish ""' EXIT # of a set-up that failed
set -eu

stty raw -echo </dev/ttyS1
hostname "$NAME" 2>/dev/null || echo "$NAME" >/proc/sys/kernel/hostname
busybox ip link set lo up

mkdir -p /lib/modules
[ -e "/lib/modules/$KERNEL" ] || ln -s "$RUN/lib/modules/$KERNEL" "/lib/modules/$KERNEL"
modprobe loop max_loop="$LOOPS"
modprobe -a $MODULES

if [ -n "$CGROUP" ]; then
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
if [ -n "$UDEV" ]; then
  mkdir -p /run/udev
  /lib/systemd/systemd-udevd --daemon
  udevadm trigger --subsystem-match=block
  udevadm settle --timeout=60
fi
if [ -n "$DISK" ]; then
  mkdir -p /scratch
  mount -t ext4 -o discard "$DISK" /scratch
fi

trap - EXIT
set +e
if [ -n "$TERMINAL" ]; then
  { # held open: the line forgets its size when it is closed
    stty sane rows "$ROWS" cols "$COLUMNS"
    setsid --ctty --wait /bin/sh "$RUN/command"
  } </dev/ttyS0 >/dev/ttyS0 2>&1
else
  stty raw -echo </dev/ttyS0
  setsid --wait /bin/sh "$RUN/command" </dev/null >/dev/ttyS0 2>&1
fi
finish $?
