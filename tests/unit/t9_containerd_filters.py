"""containerd's filters: what they match, and what is refused.

tests/suites compares all of it with containerd's own code.
"""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmapper.errors import UsageError
from devmapper.server.containerd.filter_syntax import Operator, Selector, parse
from devmapper.server.containerd.filters import compile_filters
from devmapper.snapshots.model import Info, Kind

LABELS = {"containerd.io/gc.root": "now", "l": "1", "two words": "ü", "dot.ted": "x", "empty": ""}
INFO = Info("default/12/sha256:abc", Kind.ACTIVE, "default/11/base", LABELS, 1, 2)
ALONE = Info("alone", Kind.COMMITTED, "", {}, 1, 2)

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd\0\n"))


def matches(*filters: str, info: Info = INFO) -> bool:
    return compile_filters(filters)(info)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name==default/12/sha256:abc",
        "name == default/12/sha256:abc",
        'name=="default/12/sha256:abc"',
        "kind==active",
        "kind!=view",
        "parent==default/11/base",
        'parent!=""',
        "parent",
        "name.more.of.it==default/12/sha256:abc",
        "labels.l",
        "labels.l==1",
        'labels."containerd.io/gc.root"==now',
        'labels."containerd.io/gc.root"!=then',
        'labels."two words"==ü',
        'labels."two words"=="\\u00fc"',
        'labels."two words"=="\\xc3\\xbc"',
        'labels."two words"=="\\303\\274"',
        "labels.dot.ted==x",
        'labels."dot.ted"==x',
        "labels.empty",
        "labels.missing!=1",
        "labels.missing~=^$",
        "unknown!=1",
        "unknown~=|.*|",
        "name~=sha256",
        "name~=^default",
        "name~=/sha256:[a-c]+/",
        "name~=/default\\/12/",
        "name~=|sha256:(abc\\|def)$|",
        'name~="\\\\d+"',
        "labels.l,kind==active",
        "labels.l, kind==active,\tname~=abc",
        "name~=(?i)SHA256",
        "name~=\\x64efault",  # unquoted: the regular expression's own escape
        "name~=[[:alpha:]]+\\z",
    ],
)
def test_matches(text):
    assert matches(text)


@pytest.mark.parametrize(
    "text",
    [
        "name==default",
        "name==sha256",
        'labels."two words"=="\\xfc"',  # a byte that is no UTF-8
        "kind==committed",
        "kind==ACTIVE",
        'parent==""',
        "labels.missing",
        "labels.missing==1",
        'labels.missing==""',
        "labels",
        "labels==1",
        "labels.l!=1",
        "unknown",
        "unknown==1",
        'unknown==""',
        "snapshotter==devmapper",
        'unknown!=""',
        "labels.l,kind==view",
        "name~=^sha256",
    ],
)
def test_does_not_match(text):
    assert not matches(text)


def test_any_of_several():
    assert matches("kind==view", "kind==active")
    assert not matches("kind==view", "kind==committed")
    assert matches("kind==view", "")
    assert matches()


def test_what_has_no_parent_has_an_empty_one():
    assert matches('parent==""', info=ALONE)
    assert matches("parent", info=ALONE)
    assert not matches('parent!=""', info=ALONE)
    assert not matches("labels.l", info=ALONE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ", "character 2: expected a field, found the end"),
        (",", "character 1: expected a field, found a separator"),
        ("name==", "character 7: expected a value, found the end"),
        ("name==,kind", "character 7: expected a value, found a separator"),
        ("name==.x", "character 7: expected a value, found a separator"),
        ("name=x", "character 5: expected one of the operators"),
        ("name===x", "character 5: expected one of the operators"),
        ("name ", "character 6: expected one of the operators"),
        ("name==x ", "character 8: expected a comma or the end"),
        ("name==x y", "character 8: expected a comma or the end"),
        ("labels.a-b", "character 9: expected one of the operators"),
        ("labels.", "character 8: expected a field, found the end"),
        ("labels..x", "character 8: expected a field, found a separator"),
        ("name,", "character 6: expected a field, found the end"),
        ('name=="x', "character 7: a quoted string that does not end"),
        ('name=="x\n"', "character 7: a quoted string that does not end"),
        ('name=="\\d"', "character 8: an escape sequence that Go does not know"),
        ('name=="\\400"', "character 8: an escape sequence that Go does not know"),
        ('name=="\\xg0"', "character 8: an escape sequence that Go does not know"),
        ('name=="\\U00110000"', "character 8: an escape sequence that Go does not know"),
        ("name==/x/", "character 7: only a regular expression is quoted by / or |"),
        ("name==|x|", "character 7: only a regular expression is quoted by / or |"),
        ("/name/==x", "character 1: only a regular expression is quoted by / or |"),
        ("name==\0", "character 7: the character '\\x00' is not allowed"),
        ("name~=(", "no regular expression"),
        ("name~=(?=x)", "no regular expression"),  # RE2 has none of these
        ('name~="\\xff"', "no regular expression"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(UsageError) as raised:
        compile_filters(["kind==view", text])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_regular_expressions_take_linear_time():
    """Python's own module would not end."""
    assert not matches("name~=^(a+)+$", info=ALONE._replace(name="a" * 5000 + "b"))


@given(TEXTS)
def test_what_is_quoted_is_found(text):
    quoted = json.dumps(text, ensure_ascii=False)
    assert parse(f"labels.{quoted}=={quoted}") == (
        Selector(("labels", text), Operator.EQUAL, text),
    )


@given(st.text() | st.text(st.sampled_from('nl".,=!~/|\\x0u \t')))
def test_parses_or_says_why(text):
    with suppress(UsageError):
        assert all(isinstance(selector, Selector) for selector in parse(text))
