"""The one place where an error becomes the `Err` that Docker shows to its user."""

from devmapper.errors import DevmapperError


def sentence(error: BaseException) -> str:
    """One line: what failed, what was done about it meanwhile (its notes), and the hint."""
    match error:
        case DevmapperError():
            text, hint = str(error), error.hint
        case OSError():
            text, hint = _os_error(error), ""
        case MemoryError():
            text, hint = "out of memory", ""
        case _:
            text, hint = f"internal error: {type(error).__name__}: {error}", "see the daemon's log"
    text = "; ".join([text, *getattr(error, "__notes__", ())])
    return " ".join(f"{text} ({hint})".split() if hint else text.split())


def is_expected(error: BaseException) -> bool:
    """Whether it is one of ours or the system's; everything else is a defect."""
    return isinstance(error, DevmapperError | OSError | MemoryError)


def _os_error(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' and '.join(map(repr, names))}: {reason}" if names else reason
