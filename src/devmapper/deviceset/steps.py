"""The points at which a crash leaves something different behind."""

from collections.abc import Callable
from enum import StrEnum, auto


class Step(StrEnum):
    """A moment right after something became durable, or was sent to the pool.

    The crash tests walk through every member, so a new one cannot be forgotten.
    """

    DATA_FILE_MADE = auto()
    METADATA_FILE_MADE = auto()
    POOL_ACTIVATED = auto()
    LAYER_MIGRATED = auto()
    LEGACY_MIGRATED = auto()
    METADATA_FILE_GROWN = auto()
    METADATA_GROWN = auto()
    DATA_FILE_GROWN = auto()
    DATA_GROWN = auto()
    INTENT_WRITTEN = auto()
    THIN_CREATED = auto()
    RECORD_SAVED = auto()
    COMMITTED = auto()
    LAYER_DOOMED = auto()
    REMOVAL_DEFERRED = auto()
    THIN_DISCARDED = auto()
    THIN_DELETED = auto()
    RECORD_REMOVED = auto()
    BASE_ACTIVATED = auto()
    BASE_FORMATTED = auto()
    BASE_DEACTIVATED = auto()
    BASE_IDENTIFIED = auto()
    BASE_INITIALIZED = auto()
    BASE_SIZE_RECORDED = auto()
    BASE_GROWN = auto()
    BASE_GROWTH_RECORDED = auto()
    LAYER_GROWN = auto()
    LAYER_COMPLETED = auto()
    RECORD_REWRITTEN = auto()
    RECOVERED_THIN = auto()
    RECOVERED_RECORD = auto()
    RECOVERED = auto()


Checkpoint = Callable[[Step], None]


def no_checkpoint(step: Step) -> None:
    """What everybody but a test passes."""
