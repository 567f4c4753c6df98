"""Python programs that a test runs beside itself."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def program(source: str, *args: object) -> Iterator["subprocess.Popen[str]"]:
    """A Python program in a child process; killed if it still runs.

    Its standard input, output and error are pipes.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", source, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()
