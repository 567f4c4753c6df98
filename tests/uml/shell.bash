# Read by the shell of `python -m tests.uml`: makes a pool, by us where our kernel engine is there.
PS1='uml:\w# '
export DEVMAPPER_ROOT=/tmp/graph DEVMAPPER_ENGINE=kernel
export DEVMAPPER_STORAGE_OPT='dm.loopdatasize=2G dm.loopmetadatasize=16M dm.basesize=512M
  dm.override_udev_sync_check=true'

if said=$(devmapper create first 2>&1); then
  echo "a graph in $DEVMAPPER_ROOT with a layer, see: devmapper ls; dmsetup status"
else
  echo "$said"
  mkdir -p /tmp/pool
  truncate -s 16M /tmp/pool/metadata
  truncate -s 2G /tmp/pool/data
  dmsetup create pool --table "0 4194304 thin-pool $(losetup -f --show /tmp/pool/metadata) \
    $(losetup -f --show /tmp/pool/data) 128 0 1 skip_block_zeroing" &&
    echo "a thin pool made by hand: /dev/mapper/pool"
fi
unset said
