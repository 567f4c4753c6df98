"""Storage options: every one of the seed's is read, and what is wrong is named."""

from pathlib import Path

import pytest

from devmapper.deviceset.options import (
    OPTION_NAMES,
    FileSystem,
    Options,
    parse_options,
)
from devmapper.errors import UsageError
from devmapper.units import GIB, MIB

SEED = {
    "dm.basesize",
    "dm.loopdatasize",
    "dm.loopmetadatasize",
    "dm.fs",
    "dm.mkfsarg",
    "dm.mountopt",
    "dm.thinpooldev",
    "dm.datadev",
    "dm.metadatadev",
    "dm.blocksize",
    "dm.blkdiscard",
    "dm.override_udev_sync_check",
    "dm.use_deferred_removal",
}
LATER = {  # what Docker added until it removed the driver
    "dm.use_deferred_deletion",
    "dm.min_free_space",
    "dm.xfs_nospace_max_retries",
    "dm.libdm_log_level",
    "dm.directlvm_device",
    "dm.directlvm_device_force",
    "dm.thinp_percent",
    "dm.thinp_metapercent",
    "dm.thinp_autoextend_percent",
    "dm.thinp_autoextend_threshold",
}


def test_dockers_options_and_no_others_are_known():
    assert set(OPTION_NAMES) == SEED | LATER


def test_defaults_are_the_seeds():
    options = parse_options([])
    assert options == Options()
    assert options.base_size == 10 * GIB
    assert options.loop_data_size == 100 * GIB
    assert options.loop_metadata_size == 2 * GIB
    assert options.file_system is FileSystem.EXT4
    assert options.block_size is None
    assert options.discard_on_delete
    assert not options.use_deferred_removal


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("dm.basesize=20G", "base_size", 20 * GIB),
        (" DM.BaseSize =512m", "base_size", 512 * MIB),
        ("dm.loopdatasize=200Gb", "loop_data_size", 200 * GIB),
        ("dm.loopmetadatasize=4G", "loop_metadata_size", 4 * GIB),
        ("dm.fs=xfs", "file_system", FileSystem.XFS),
        ("dm.mkfsarg=-O ^has_journal", "mkfs_arguments", ("-O ^has_journal",)),
        ("dm.mountopt=nodiscard", "mount_options", ("nodiscard",)),
        ("dm.mountopt=a=b,c", "mount_options", ("a=b,c",)),
        ("dm.datadev=/dev/sdb1", "data_device", Path("/dev/sdb1")),
        ("dm.metadatadev=/dev/sdc1", "metadata_device", Path("/dev/sdc1")),
        ("dm.thinpooldev=/dev/mapper/thin-pool", "thin_pool_device", "thin-pool"),
        ("dm.thinpooldev=thin-pool", "thin_pool_device", "thin-pool"),
        ("dm.blocksize=512K", "block_size", 512 * 1024),
        ("dm.blkdiscard=False", "blkdiscard", False),
        ("dm.blkdiscard=T", "blkdiscard", True),
        ("dm.override_udev_sync_check=1", "override_udev_sync_check", True),
        ("dm.use_deferred_removal=true", "use_deferred_removal", True),
        ("dm.min_free_space=0%", "min_free_space", 0),
        ("dm.min_free_space=99%", "min_free_space", 99),
        ("dm.xfs_nospace_max_retries=0", "xfs_nospace_max_retries", 0),
        ("dm.libdm_log_level=7", "libdm_log_level", 7),
        ("dm.directlvm_device=/dev/sdb", "directlvm_device", Path("/dev/sdb")),
        ("dm.directlvm_device_force=true", "directlvm_device_force", True),
        ("dm.thinp_autoextend_percent=20", "thinp_autoextend_percent", 20),
        ("dm.thinp_autoextend_threshold=80%", "thinp_autoextend_threshold", 80),
    ],
)
def test_each_option_is_read(word, field, value):
    assert getattr(parse_options([word]), field) == value


def test_repeatable_options_add_up_and_the_last_of_others_wins():
    options = parse_options(
        [
            "dm.mkfsarg=-N",
            "dm.mkfsarg=100",
            "dm.mountopt=noatime",
            "dm.mountopt=data=writeback",
            "dm.basesize=1G",
            "dm.basesize=2G",
        ]
    )
    assert options.mkfs_arguments == ("-N", "100")
    assert options.mount_options == ("noatime", "data=writeback")
    assert options.base_size == 2 * GIB


@pytest.mark.parametrize(
    ("words", "discards"),
    [
        ([], True),
        (["dm.datadev=/dev/x"], False),
        (["dm.metadatadev=/dev/x"], True),
        (["dm.thinpooldev=x"], False),
        (["dm.datadev=/dev/x", "dm.blkdiscard=true"], True),
        (["dm.blkdiscard=true", "dm.thinpooldev=x"], True),
        (["dm.blkdiscard=false"], False),
        (["dm.directlvm_device=/dev/x"], False),
    ],
)
def test_discards_by_default_only_on_loop_files(words, discards):
    assert parse_options(words).discard_on_delete is discards


@pytest.mark.parametrize(
    ("word", "mentions"),
    [
        ("dm.basesize", ("'dm.basesize'", "key=value")),
        ("dm.nonsense=1", ("dm.nonsense", "unknown")),
        ("overlay.size=1", ("overlay.size", "unknown")),
        ("dm.basesize=10X", ("dm.basesize=10X", "size")),
        ("dm.basesize=", ("dm.basesize=", "size")),
        ("dm.basesize=-1", ("dm.basesize=-1", "size")),
        ("dm.basesize=0", ("dm.basesize=0", "larger than 0")),
        ("dm.basesize=1.5.0G", ("dm.basesize=1.5.0G", "size")),
        ("dm.loopmetadatasize=17G", ("dm.loopmetadatasize=17G", "16G")),
        ("dm.loopmetadatasize=4K", ("dm.loopmetadatasize=4K", "64K")),
        ("dm.fs=btrfs", ("dm.fs=btrfs", "ext4 or xfs")),
        ("dm.blocksize=100K", ("dm.blocksize=100K", "64K")),
        ("dm.blocksize=32K", ("dm.blocksize=32K", "64K")),
        ("dm.blocksize=2G", ("dm.blocksize=2G", "1G")),
        ("dm.blkdiscard=yes", ("dm.blkdiscard=yes", "true or false")),
        ("dm.use_deferred_removal=", ("dm.use_deferred_removal=", "true or false")),
        ("dm.datadev=", ("dm.datadev=", "path")),
        ("dm.thinpooldev=/dev/sdb", ("dm.thinpooldev=/dev/sdb", "/dev/mapper/")),
        ("dm.min_free_space=10", ("dm.min_free_space=10", "10%")),
        ("dm.min_free_space=100%", ("dm.min_free_space=100%", "99")),
        ("dm.min_free_space=-1%", ("dm.min_free_space=-1%", "0 to 99")),
        ("dm.xfs_nospace_max_retries=-1", ("dm.xfs_nospace_max_retries=-1", "whole number")),
        ("dm.xfs_nospace_max_retries=٣", ("dm.xfs_nospace_max_retries=٣", "whole number")),
        ("dm.libdm_log_level=1", ("dm.libdm_log_level=1", "2 to 7")),
        ("dm.libdm_log_level=x", ("dm.libdm_log_level=x", "2 to 7")),
        ("dm.thinp_percent=100%", ("dm.thinp_percent=100%", "99")),
        ("dm.thinp_autoextend_percent=101", ("dm.thinp_autoextend_percent=101", "100")),
    ],
)
def test_what_is_wrong_is_named(word, mentions):
    with pytest.raises(UsageError) as caught:
        parse_options([word])
    assert all(text in str(caught.value) for text in mentions), str(caught.value)


@pytest.mark.parametrize(
    ("words", "mentions"),
    [
        (["dm.use_deferred_deletion=true"], "dm.use_deferred_removal"),
        (["dm.directlvm_device=/dev/x", "dm.thinpooldev=y"], "exclude each other"),
        (["dm.metadatadev=/dev/y", "dm.directlvm_device=/dev/x"], "exclude each other"),
        (["dm.thinp_percent=90%"], "dm.thinp_metapercent"),
        (["dm.thinp_metapercent=1%"], "dm.thinp_percent"),
        (["dm.thinp_percent=99%", "dm.thinp_metapercent=2%"], "101%"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(words, mentions):
    with pytest.raises(UsageError, match=mentions):
        parse_options(words)


def test_a_disk_for_lvm_has_dockers_defaults():
    chosen = parse_options(["dm.directlvm_device=/dev/x"]).direct_lvm
    assert chosen is not None
    assert chosen == (Path("/dev/x"), False, 95, 1, 20, 80)
    words = ["dm.thinp_percent=50%", "dm.thinp_metapercent=5", "dm.directlvm_device=/dev/x"]
    chosen = parse_options(words).direct_lvm
    assert chosen is not None
    assert (chosen.thinp_percent, chosen.thinp_metapercent) == (50, 5)
    assert parse_options([]).direct_lvm is None
