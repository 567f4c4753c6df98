"""What the README and the tutorial show is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import console

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]


@pytest.fixture
def place(tmp_path):
    """Stands in for /var/tmp; engines of graphs below it are stopped in any case."""
    yield tmp_path
    for metadata in tmp_path.glob("*/metadata"):
        words = ["--root", str(metadata.parent), "engine", "stop", "--force"]
        subprocess.run([sys.executable, "-m", "devmapper.cli.main", *words], check=True)


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/tutorial.md",
        pytest.param("docs/virtual-machines.md", marks=pytest.mark.qemu),
    ],
)
def test_console_examples(document, place):
    listed = [
        console.Example(*(text.replace("/var/tmp", str(place)) for text in example))
        for example in console.examples(ROOT / document)
    ]
    assert listed
    bin_directory = Path(sys.executable).parent
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("DEVMAPPER_ROOT")
    }
    environment["PATH"] = f"{bin_directory}:{os.environ['PATH']}"
    outputs = console.run(listed, environment, ROOT)
    for example, output in zip(listed, outputs, strict=True):
        assert console.shape(output) == console.shape(example.output), example.command
    assert list(place.iterdir()) == []


def test_python_examples(place):
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 2
    code = "\n".join(blocks).replace("/var/tmp", str(place))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("[]\n")
    assert "\nsite " in done.stdout
