"""The examples of a document: blocks marked `console`, commands after `$ `, and what they print.

A reader runs them in one shell from top to bottom, and so does `run`.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = "@@@ example"


class Example(NamedTuple):
    """One command and what the document shows of its output."""

    command: str
    output: str


def examples(document: Path) -> list[Example]:
    """All examples of a document in order; a line that ends with a backslash goes on."""
    found: list[Example] = []
    for block in _BLOCK.findall(document.read_text(encoding="utf-8")):
        lines = iter(block.splitlines())
        for line in lines:
            if line.startswith("$ "):
                command = line[2:]
                while command.endswith("\\"):
                    command += "\n" + next(lines)
                found.append(Example(command, ""))
            else:
                found[-1] = found[-1]._replace(output=f"{found[-1].output}{line}\n")
    return found


def run(listed: list[Example], environment: dict[str, str], cwd: Path) -> list[str]:
    """Run all commands in one shell, as a reader does; returns their outputs.

    A command that fails ends it, unless the document shows its message.
    """
    script = []
    for example in listed:
        script += [f"echo '{_MARK}'", "set +e" if "devmapper: " in example.output else "set -e"]
        script.append(example.command)
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
        env=environment, cwd=cwd,
    )  # fmt: skip
    outputs = done.stdout.split(f"{_MARK}\n")[1:]
    assert done.returncode == 0, f"{listed[len(outputs) - 1].command}: {outputs[-1]}"
    return outputs


def shape(text: str) -> str:
    """Text without what differs from run to run: numbers, places, widths of columns."""
    text = re.sub(r"/\S*/(site|tour|tutorial)\S*", "PATH", text)
    text = re.sub(r"/dev/loop\d+", "LOOP", text)
    text = re.sub(r"\d[\d.:-]*( [kMGT]?B\b)?", "N", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines()).strip()
