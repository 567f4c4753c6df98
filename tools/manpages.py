"""Write docs/man/*.1.md from the command's own declarations; the unit tests compare them."""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import typer

from devmapper.cli.main import app

TARGET: Final = Path(__file__).parents[1] / "docs" / "man"
WIDTH: Final = 98

Declared: TypeAlias = Any  # typer's classes of commands and parameters have no public names


def pages() -> dict[str, str]:
    """All pages by the names of their files."""
    top = typer.main.get_command(app)
    found = {"devmapper.1.md": _page("", top, [name for name, _ in _commands(top)])}
    for name, command in _commands(top):
        found[f"devmapper-{name.replace(' ', '-')}.1.md"] = _page(name, command, [])
    return found


def _commands(group: Declared, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _page(name: str, command: Declared, below: list[str]) -> str:
    paragraphs = [" ".join(part.split()) for part in command.help.split("\n\n")]
    example = paragraphs.pop().removeprefix("Example: ")
    title = f"devmapper {name}".strip()
    summary = paragraphs[0].rstrip(".")
    parts = [
        f"# {title.replace(' ', '-')}(1)",
        f"## Name\n\n`{title}`: {summary[:1].lower()}{summary[1:]}",
        f"## Synopsis\n\n    {_synopsis(name, command)}",
        "## Description\n\n" + "\n\n".join(textwrap.fill(part, WIDTH) for part in paragraphs),
    ]
    described = [_parameter(each) for each in command.params if each.help]
    described = [each for each in described if "completion" not in each]
    if described:
        parts.append("## Arguments and options\n\n" + "\n".join(described))
    if below:
        listed = (f"- [{each}](devmapper-{each.replace(' ', '-')}.1.md)" for each in below)
        parts.append("## Commands\n\n" + "\n".join(listed))
    parts.append(f"## Example\n\n    {example}")
    parts.append(
        "## See also\n\n[Exit codes and JSON](../cli.md), [the storage options](../options.md)"
    )
    return "\n\n".join(parts) + "\n"


def _synopsis(name: str, command: Declared) -> str:
    words = ["devmapper", "[OPTIONS]", *name.split()]
    if not name:
        return " ".join([*words, "COMMAND [ARGUMENTS]"])
    words += [f"[{_option(each)}]" for each in command.params if each.param_type_name == "option"]
    words += [_argument(each) for each in command.params if each.param_type_name == "argument"]
    return " ".join(words)


def _parameter(parameter: Declared) -> str:
    is_option = parameter.param_type_name == "option"
    name = _option(parameter, all_names=True) if is_option else _argument(parameter)
    variable = f" Environment: `{parameter.envvar}`." if parameter.envvar else ""
    return f"- `{name}`: {parameter.help}{variable}"


def _option(parameter: Declared, *, all_names: bool = False) -> str:
    names = ", ".join(parameter.opts) if all_names else parameter.opts[-1]
    return f"{names} {parameter.metavar}" if parameter.metavar else names


def _argument(parameter: Declared) -> str:
    return str(parameter.metavar)


def main() -> int:
    TARGET.mkdir(exist_ok=True)
    wanted = pages()
    for path in TARGET.glob("*.1.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (TARGET / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
