#!/usr/bin/env bash
# Install what `make demo` and `make test` need: Debian packages (as root), then a virtual environment.
set -euo pipefail
venv=${1:-.venv}

packages=(
  python3-venv            # ensurepip, where Debian's own Python is used
  e2fsprogs xfsprogs      # mkfs of layers
  util-linux mount fdisk  # losetup, fstrim, blkdiscard, blkid for the tests
  lvm2 dmsetup            # a disk becomes a pool; the tables of the kernel tests
  thin-provisioning-tools # thin_check, thin_dump, thin_restore: the oracle of the tests
  fio qemu-utils          # verify under load; the peer of the benchmark, and a client of NBD
  qemu-system-x86         # a virtual machine boots from a snapshot, in software
  user-mode-linux kmod    # a kernel with dm-thin as a process, for the tests; modprobe in it
  busybox-static          # halt there, where no init system is installed
  systemd                 # our unit runs under it, as process 1 of namespaces in the guest; not here
  dmsetup udev lvm2       # devices made by hand, udevadm and udevd, pools of LVM
  libdevmapper1.02.1      # the library that the kernel engine calls
  docker.io containerd runc # the last dockerd with the devicemapper driver: hand-over in the guest
  prometheus              # scrapes the daemon, and its promtool tests the alert rules
  debootstrap zstd        # the demo's root file system; the graphs in tests/data
)
# What Docker's and containerd's own suites are compiled from
mapfile -t -O "${#packages[@]}" packages < <(cat tests/suites/*/apt-packages)
missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null || true)
  [[ $status == "install ok installed" ]] || missing+=("$package")
done
if ((${#missing[@]})); then
  if ((EUID == 0)) && command -v apt-get >/dev/null; then
    echo "setup: installing ${missing[*]}"
    # Tests start what they need themselves: no service of these packages is to run
    policy=/usr/sbin/policy-rc.d
    if [[ ! -e $policy ]]; then
      trap 'rm -f "$policy"' EXIT
      printf '#!/bin/sh\nexit 101\n' >"$policy"
      chmod 755 "$policy"
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    # Nor after the next boot: it would listen on all addresses
    if [[ " ${missing[*]} " == *" prometheus "* ]] && command -v systemctl >/dev/null; then
      systemctl disable --quiet prometheus.service
    fi
  else
    echo "setup: not root: going on without ${missing[*]}" >&2
  fi
fi

if [[ ! -x $venv/bin/python ]]; then
  python3 -m venv "$venv"
fi
"$venv/bin/pip" install -q --disable-pip-version-check --root-user-action=ignore -e '.[dev]'
