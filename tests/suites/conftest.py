"""The suites are compiled on this machine before a guest boots that runs them, too."""

from contextlib import suppress

import pytest

from tests.support import go_suite


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    names = {marker.args[0] for item in session.items for marker in item.iter_markers("go")}
    for name in sorted(names):
        if not go_suite.missing(name):
            with suppress(AssertionError):  # the tests that need it will say so
                go_suite.build(name)
