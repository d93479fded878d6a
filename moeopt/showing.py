"""Text of others, such as names in a study, as it may be shown: nothing in it moves a cursor, and it is not endless.

And what notebooks show by itself, which a room far above draws.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, of format characters such as right-to-left overrides, of surrogates, and
of the separators of lines and paragraphs."""


def visible(text: str) -> str:
    r"""The text with all that controls a terminal, but for new lines and tabs, written as Python escapes it.

    >>> visible("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in HIDDEN
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def line(value: object, most: int = 200) -> str:
    r"""A value's text on one visible line, the middle left out where it is longer.

    >>> line("two\nlines, and more than so many characters", most=24)
    'two\\nlines...characters'
    """
    text = value if isinstance(value, str) else shown(value, most)
    if len(text) > 2 * most:
        text = text[:most] + text[-most:]
    return _cut(visible(text).replace("\n", "\\n").replace("\t", "\\t"), most)


def shown(value: object, most: int = 120) -> str:
    """A value's `repr` for a message, the middle left out where it is long.

    >>> shown("a" * 400, most=21)
    "'aaaaaaaa...aaaaaaaa'"
    """
    if isinstance(value, str) and len(value) > 2 * most:
        value = value[:most] + value[-most:]
    try:
        return _cut(repr(value), most)
    except Exception as error:  # an integer of more digits than Python writes, or lists within lists within lists
        return f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"


def listed(parts: Iterable[str], most: int = 5) -> str:
    """Texts in a row of a sentence, the last ones counted where there are many.

    >>> listed(["a", "b", "c"]), listed("abcdef", most=2)
    ('a, b and c', 'a, b and 4 more')
    """
    parts = list(parts)
    if len(parts) > most:
        parts = [*parts[:most], f"{len(parts) - most:,} more"]
    return " and ".join([*([", ".join(parts[:-1])] if parts[1:] else []), *parts[-1:]])


def first_line(error: BaseException) -> str:
    r"""What an error says, in a line: its first one, and the second where the first ends with a colon.

    >>> first_line(ValueError("no such thing:\n  at all"))
    'no such thing: at all'
    """
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


_URL = re.compile(r"(?<![\w+.-])(?!https?:)[\w+.-]+://[^\s'\"]*")
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@]*@")
_MARK = r"(?:~[\w.-]*|\.{1,2}|[A-Za-z]:)?[/\\]"
_WHOLE = re.compile(rf"{_MARK}[^\n]*[/\\](?=[^/\\\n])")
_FOLDERS = re.compile(rf"(?<![^\s'\"(\[{{=,:`])(?!(?<=:)//){_MARK}(?:[^\s'\",;:=()]*[/\\])?(?=[^\s/\\'\",;:=()])")


def public(value: Any) -> Any:
    """JSON for the eyes of others: its texts name no database, hold no password of a URL, and of paths the last name.

    >>> public({"from": "/home/jo/models/mixtral", "with": ["--storage=postgresql://jo:secret@db/x", "org/name"]})
    {'from': 'mixtral', 'with': ['--storage=***', 'org/name']}
    """
    if isinstance(value, dict):
        return {public(key): public(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if path := _WHOLE.match(value):
        return value[path.end() :]
    return _FOLDERS.sub("", _CREDENTIALS.sub("", _URL.sub("***", value)))


def public_command(command: str) -> str:
    """A command for the eyes of others: without a change of folder before it, and without the storage of its studies.

    >>> public_command("cd /home/jo && moeopt search '/my models/mixtral' --storage sqlite:///x.db --trials=9")
    'moeopt search mixtral --trials=9'
    """
    try:
        words = shlex.split(command)
    except ValueError:  # no command
        return str(public(command))
    words = words[words.index("&&") + 1 :] if "&&" in words else words
    left = [
        word
        for before, word in zip(["", *words], words)
        if before != "--storage" and word.partition("=")[0] != "--storage"
    ]
    return shlex.join(map(public, left))


def _cut(text: str, most: int) -> str:
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


class Shown:
    """A plan, an evaluation or a result: notebooks show it as `moeopt.report.html` draws it."""

    drawn: Callable[[Shown], str]
    """How; the package sets it, as what draws may import what is drawn, and not the other way round."""

    def _repr_html_(self) -> str:
        return Shown.drawn(self)
