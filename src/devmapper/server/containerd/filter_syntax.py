"""The syntax of containerd's filters: text becomes selectors.  No meaning, no I/O.

    filter   = selector ("," selector)*                all must match
    selector = path [operator value]                   without operator: the field is there
    path     = field ("." field)*
    field    = [A-Za-z0-9_]+ | quoted
    operator = "==" | "!=" | "~="
    value    = anything up to the next comma or white space | quoted
    quoted   = Go's "string"; after ~= also /string/ and |string|

It follows containerd `filters/{parser,scanner,quote}.go` in what is taken and what is refused, also
where that is surprising: a dot begins no value, `\\d` in quotes has to be written `\\\\d`, white
space is skipped before a token and refused after the last one.  tests/suites compares both.
"""

import unicodedata
from enum import StrEnum
from typing import Final, NamedTuple

from devmapper.errors import UsageError

_FIELD: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
_OPERATOR: Final = frozenset("=!~")
_SEPARATORS: Final = frozenset(",.")
_QUOTES: Final = frozenset('"/|')
_ILLEGAL: Final = frozenset("\0\ufffd")  # U+FFFD is what Go decodes damaged UTF-8 to
_NO_SPACE: Final = frozenset("\x1c\x1d\x1e\x1f")  # white space for Python, not for Go
_OCTAL: Final = frozenset("01234567")
_HEX: Final = frozenset("0123456789abcdefABCDEF")
_DIGITS: Final = {"x": 2, "u": 4, "U": 8}  # of numeric escapes
_ESCAPES: Final = {
    "a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92,
}  # fmt: skip
_MAX_RUNE: Final = 0x10FFFF
_MAX_BYTE: Final = 0xFF
_SHOWN: Final = 200  # characters of a filter in an error


class Operator(StrEnum):
    PRESENT = ""
    EQUAL = "=="
    NOT_EQUAL = "!="
    MATCHES = "~="


class Selector(NamedTuple):
    """One condition; *value* may hold bytes that are no UTF-8 as Python's surrogate escapes."""

    path: tuple[str, ...]
    operator: Operator
    value: str


class _Kind(StrEnum):
    END = "the end"
    QUOTED = "a quoted string"
    VALUE = "a value"
    FIELD = "a field"
    SEPARATOR = "a separator"
    OPERATOR = "an operator"
    OTHER = "a character"


class _Token(NamedTuple):
    kind: _Kind
    position: int
    text: str


def parse(text: str) -> tuple[Selector, ...]:
    """The selectors of one filter; none for the empty one.  `UsageError` says where it is wrong."""
    if not text:
        return ()
    return _Parser(text).filter()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._value_follows = False

    def filter(self) -> tuple[Selector, ...]:
        found = [self._selector()]
        while self._next_character() == ",":
            self._token()
            found.append(self._selector())
        if self._position < len(self._text):
            raise self._error(self._position, "expected a comma or the end")
        return tuple(found)

    def _selector(self) -> Selector:
        path = self._path()
        if self._next_character() in ("", ","):
            return Selector(path, Operator.PRESENT, "")
        operator = self._operator()
        return Selector(path, operator, self._value(operator))

    def _path(self) -> tuple[str, ...]:
        path = [self._field()]
        while self._next_character() == ".":
            self._token()
            path.append(self._field())
        return tuple(path)

    def _field(self) -> str:
        token = self._token()
        if token.kind is _Kind.FIELD:
            return token.text
        if token.kind is _Kind.QUOTED:
            return self._unquoted(token, regular_expression=False)
        raise self._error(token.position, f"expected a field, found {token.kind}")

    def _operator(self) -> Operator:
        token = self._token()
        if token.kind is not _Kind.OPERATOR or token.text not in set(Operator):
            raise self._error(token.position, "expected one of the operators ==, != and ~=")
        return Operator(token.text)

    def _value(self, operator: Operator) -> str:
        token = self._token()
        if token.kind in (_Kind.VALUE, _Kind.FIELD):
            return token.text
        if token.kind is _Kind.QUOTED:
            return self._unquoted(token, regular_expression=operator is Operator.MATCHES)
        raise self._error(token.position, f"expected a value, found {token.kind}")

    def _unquoted(self, token: _Token, *, regular_expression: bool) -> str:
        if token.text[0] != '"' and not regular_expression:
            raise self._error(token.position, "only a regular expression is quoted by / or |")
        return self._unescape(token)

    def _next_character(self) -> str:
        return self._text[self._position : self._position + 1]

    def _token(self) -> _Token:
        while self._next_character() and _is_space(self._next_character()):
            self._position += 1
        begin, first = self._position, self._next_character()
        kind = self._kind(first)
        if kind is _Kind.END:
            return _Token(kind, begin, "")
        self._position += 1
        match kind:
            case _Kind.QUOTED:
                self._skip_quoted(first)
            case _Kind.OPERATOR:
                self._skip(_OPERATOR)
                self._value_follows = True
            case _Kind.SEPARATOR:
                self._value_follows = False
            case _Kind.VALUE:
                self._value_follows = False
                while self._next_character() and _is_value(self._next_character()):
                    self._position += 1
            case _Kind.FIELD:
                self._skip(_FIELD)
            case _:
                pass
        return _Token(kind, begin, self._text[begin : self._position])

    def _kind(self, first: str) -> _Kind:
        if not first:
            return _Kind.END
        if first in _ILLEGAL:
            raise self._error(self._position, f"the character {first!a} is not allowed")
        for kind, characters in (
            (_Kind.QUOTED, _QUOTES),
            (_Kind.SEPARATOR, _SEPARATORS),
            (_Kind.OPERATOR, _OPERATOR),
        ):
            if first in characters:
                return kind
        if self._value_follows:
            return _Kind.VALUE
        return _Kind.FIELD if first in _FIELD else _Kind.OTHER

    def _skip(self, characters: frozenset[str]) -> None:
        while self._next_character() in characters:
            self._position += 1

    def _skip_quoted(self, quote: str) -> None:
        """To behind the quote that ends it; what is escaped does not."""
        begin = self._position - 1
        while (character := self._next_character()) != quote:
            if character in ("", "\n"):
                raise self._error(begin, "a quoted string that does not end")
            if character in _ILLEGAL:
                raise self._error(self._position, f"the character {character!a} is not allowed")
            self._position += 2 if character == "\\" else 1
        self._position += 1

    def _unescape(self, token: _Token) -> str:
        """What a quoted string stands for, bytes that are no UTF-8 as surrogate escapes."""
        quote, inside = token.text[0], token.text[1:-1]
        out = bytearray()
        at = 0
        while at < len(inside):
            if inside[at] == "\\":
                piece, length = self._escape(inside[at + 1 :], quote, token.position + at + 1)
                at += 1 + length
            else:
                piece = inside[at].encode()
                at += 1
            out += piece
        return out.decode("utf-8", "surrogateescape")

    def _escape(self, rest: str, quote: str, position: int) -> tuple[bytes, int]:
        """One escape sequence without its backslash: what it stands for and its length."""
        kind = rest[:1]
        if kind == quote:
            return kind.encode(), 1
        if kind in _ESCAPES:
            return bytes([_ESCAPES[kind]]), 1
        if kind in _OCTAL:
            digits, value = rest[:3], _number(rest[:3], 3, _OCTAL)
            if value is not None and value <= _MAX_BYTE:
                return bytes([value]), len(digits)
        elif kind in _DIGITS:
            count = _DIGITS[kind]
            value = _number(rest[1 : 1 + count], count, _HEX)
            if value is not None and value <= _MAX_RUNE:
                raw = bytes([value]) if kind == "x" else _rune(value)
                return raw, 1 + count
        raise self._error(position, "an escape sequence that Go does not know")

    def _error(self, position: int, reason: str) -> UsageError:
        text = self._text
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        return UsageError(f"filter {shown!r}: character {position + 1}: {reason}")


def _number(digits: str, count: int, allowed: frozenset[str]) -> int | None:
    if len(digits) < count or not allowed.issuperset(digits):
        return None
    return int(digits, 8 if allowed is _OCTAL else 16)


def _rune(value: int) -> bytes:
    """UTF-8 as Go's `utf8.EncodeRune` makes it: no surrogates."""
    return ("\ufffd" if 0xD800 <= value <= 0xDFFF else chr(value)).encode()


def _is_space(character: str) -> bool:
    return character.isspace() and character not in _NO_SPACE


def _is_value(character: str) -> bool:
    """Letters, marks, numbers, punctuation and symbols: Go's graphic characters but for spaces."""
    if character == "," or character in _ILLEGAL or _is_space(character):
        return False
    return unicodedata.category(character)[0] in "LMNPS"
