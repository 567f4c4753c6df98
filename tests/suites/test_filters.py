"""Our filters and containerd's own code for them agree: what they match, and what they refuse."""

import json
import subprocess
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from devmapper.errors import UsageError
from devmapper.server.containerd.filters import compile_filters
from devmapper.snapshots.model import Info, Kind
from tests.support import go_suite

pytestmark = pytest.mark.go("filters")

LABELS = ("l", "containerd.io/gc.root", "a b", "x.y", "ü", "")
VALUES = ("", "1", "now", "a b", "x,y", "ü", '"', "sha256:0a/b|c", "\U0001f40d", "two\nlines")
INFOS = [
    Info("default/12/sha256:abc", Kind.ACTIVE, "p", {"l": "1", "x.y": "a b", "ü": "ü"}, 1, 1),
    Info("p", Kind.COMMITTED, "", {}, 1, 1),
    Info("v", Kind.VIEW, "p", dict(zip(LABELS, VALUES[1:], strict=False)), 1, 1),
    Info("now", Kind.COMMITTED, "x,y", dict.fromkeys(LABELS, "two\nlines"), 1, 1),
]


class Oracle:
    """containerd's own code, in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def ask(self, **question: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def matches(self, filters: list[str], infos: list[Info]) -> list[bool] | None:
        """For each of *infos*; None if a filter is refused."""
        asked = [
            {"Name": i.name, "Parent": i.parent, "Kind": i.kind, "Labels": dict(i.labels)}
            for i in infos
        ]
        answer = self.ask(Filters=filters, Infos=asked)
        return None if answer["Error"] else list(answer["Matches"])


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    with subprocess.Popen(
        [str(go_suite.build("filters"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as process:
        yield Oracle(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def ours(filters: list[str]) -> list[bool] | None:
    try:
        wanted = compile_filters(filters)
    except UsageError:
        return None
    return [wanted(info) for info in INFOS]


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def spelled(text: str) -> str:
    """With each character as an escape sequence of Go."""
    return '"' + "".join(f"\\U{ord(character):08x}" for character in text) + '"'


FIELDS = st.sampled_from(["name", "parent", "kind", "labels", "unknown", "name.more"]) | st.builds(
    "labels.{}".format, st.sampled_from([*LABELS, *map(quoted, LABELS), *map(spelled, LABELS)])
)
WANTED = st.sampled_from([*VALUES, "active", "committed", "p", "sha256"])
PATTERNS = st.sampled_from(
    [
        "^p$",
        "a.c",
        "[0-9]+",
        "(?i)NOW",
        ".*",
        "\\d",
        "\\pL",
        "x|v",
        "^$",
        "\\z",
        "(",
        "a**",
        "(?=a)",
    ]
)
SPELLINGS = st.sampled_from([str, quoted, spelled])
REGULAR = st.sampled_from([str, quoted, "/{}/".format, "|{}|".format])
SELECTORS = st.one_of(
    FIELDS,
    st.builds(
        lambda field, operator, spelling, value: field + operator + spelling(value),
        FIELDS, st.sampled_from(["==", "!=", " == ", "~="]), SPELLINGS, WANTED,
    ),
    st.builds(
        lambda field, spelling, value: f"{field}~={spelling(value)}", FIELDS, REGULAR, PATTERNS
    ),
)  # fmt: skip
FILTERS = st.lists(SELECTORS, max_size=3).map(",".join)
# Text near the syntax, most of which is wrong
NEAR = st.text(st.sampled_from('nlabe1.,=!~"/|\\x0u \t\n\0\x1c\x85\u3000ü\ufffd'), max_size=12)
NEAR_FILTERS = st.builds("{}{}{}".format, st.sampled_from(["", "name", "labels.l"]), NEAR, NEAR)
# Characters that are the same in the editions of Unicode of all Gos and Pythons
SETTLED = st.characters(exclude_categories=["Cs"]).filter(
    lambda character: (
        unicodedata.category(character) == unicodedata.ucd_3_2_0.category(character) != "Cn"
    )
)
ANY_TEXT = st.text(SETTLED, max_size=8)


def is_regular(oracle: Oracle, filters: list[str]) -> bool:
    """Whether the one thing is in it that we deliberately refuse and containerd does not."""
    from devmapper.server.containerd.filter_syntax import Operator, parse

    for text in filters:
        for selector in parse(text):
            raw = selector.value.encode("utf-8", "surrogateescape")
            valid = raw.decode("utf-8", "replace").encode() == raw
            if selector.operator is Operator.MATCHES and (
                not valid or oracle.ask(Regexp=selector.value)["Error"]
            ):
                return False
    return True


@settings(
    max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(filters=st.lists(FILTERS | NEAR_FILTERS, min_size=1, max_size=2))
@example(filters=["name==p "])
@example(filters=["labels."])
@example(filters=['name=="\\xff"'])
@example(filters=['name=="\\ud800"'])
@example(filters=["name==\x01p"])
@example(filters=["name==\ufffd"])
@example(filters=['""'])
@example(filters=['labels.""'])
@example(filters=['name==p"q'])
@example(filters=["name==p=q"])
def test_agrees(oracle, filters):
    theirs = oracle.matches(filters, INFOS)
    if theirs is not None and ours(filters) is None:
        assert not is_regular(oracle, filters), filters
    else:
        assert ours(filters) == theirs, filters


@settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=ANY_TEXT)
def test_agrees_on_any_text(oracle, text):
    filters = [f"name=={text}", quoted(text), f"labels.{text}!={quoted(text)}"]
    for each in filters:
        assert ours([each]) == oracle.matches([each], INFOS), each
