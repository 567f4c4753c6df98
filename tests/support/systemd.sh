#!/bin/sh
# The first process of the namespaces that systemd.py makes: the machine as systemd shall see it, then
# systemd.  RIG is the test's folder: what is written below /etc and /usr/bin here ends up in it.
set -eu

mount -t proc proc /proc
umount /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=755 run /run
for path in etc usr/bin; do
  mkdir -p "$RIG/over/$path" "$RIG/work/$path"
  mount -t overlay -o "lowerdir=/$path,upperdir=$RIG/over/$path,workdir=$RIG/work/$path" overlay "/$path"
done
mount --bind "$RIG/units" /etc/systemd/system
mkdir -p /var/lib/devmapper
mount --bind "$RIG/graph" /var/lib/devmapper
mount --make-rshared / # as systemd does it where it is told of no container

# What systemd.io/CONTAINER_INTERFACE asks for: it leaves devices and the clock alone, and at its end
# detaches nothing.  Its units come from one folder, none are generated.
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
  container=devmapper-test NOTIFY_SOCKET="$READY" \
  SYSTEMD_UNIT_PATH=/etc/systemd/system \
  SYSTEMD_GENERATOR_PATH="$RIG/none" SYSTEMD_ENVIRONMENT_GENERATOR_PATH="$RIG/none" \
  /lib/systemd/systemd --system --unit=multi-user.target --show-status=no --log-target=journal
