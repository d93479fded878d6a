"""When two examples count as the same one, and which of them must stay in one split.

Two examples are near-duplicates when their questions differ only in Unicode's normal form, letter case, characters
that are not seen, white space, or the order of their options, also of those that a prompt lists as "A. ...", "B. ...".
Examples that are near-duplicates, or name a group that another one names, are of one family: directly, or by others in
between. A family never straddles two splits.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from moeopt.errors import TaskError
from moeopt.showing import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moeopt.tasks.base import Example

_UNSEEN = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]")
_LISTED = re.compile(r"^[ \t]*[(\[]?(?:[A-Za-z]|\d{1,2})[.):\]][ \t]+(\S.*)$", re.MULTILINE)
_AROUND_SIGNS = re.compile(r" ?([^\w ]) ?")


def plain(text: str) -> str:
    r"""A text as it is compared: of its white space only what parts two words is left.

    >>> plain("Is\u00a0Ice  cold ?\n")
    'is ice cold?'
    """
    if not text.isascii():
        text = _UNSEEN.sub("", unicodedata.normalize("NFKC", text))
    text = unicodedata.normalize("NFKC", text.casefold())
    return _AROUND_SIGNS.sub(r"\1", " ".join(text.split()))


def question(prompt: str, options: Iterable[str]) -> str:
    """SHA-256 of what is asked, the same for near-duplicates. The answer is left out: one question, one split."""
    listed = sorted(map(plain, _LISTED.findall(prompt)))
    parts = [plain(_LISTED.sub("", prompt)), listed, sorted(map(plain, options))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def group_names(group: Any) -> tuple[str, ...]:
    """The names in what an example, or a row's column, calls its group: a text, a number, or several of them.

    None, an empty text and NaN (an empty cell, as some writers of parquet have it) are no group.

    Raises:
        TaskError: naming a value of another type.
    """
    if isinstance(group, (tuple, list)) and not any(isinstance(part, (tuple, list)) for part in group):
        return tuple(dict.fromkeys(name for part in group for name in group_names(part)))
    if group is None or (isinstance(group, float) and math.isnan(group)):
        return ()
    if isinstance(group, str):
        name = re.sub(r"^(\d+)\.0+$", r"\1", group)  # as a table writes the numbers of a column with gaps
        return (name,) if name.strip() else ()
    if isinstance(group, Real) and not isinstance(group, bool):
        whole = not isinstance(group, Integral) and float(group).is_integer()
        return (f"{group:.0f}" if whole else str(group),)
    raise TaskError(f"a group must be a text or a number, got {shown(group)}")


def families(examples: Sequence[Example]) -> list[str]:
    """The name of each example's family, 64 hexadecimal digits.

    It is a hash of a group, of those that come first in their example if there are several, or of the question where
    there is none, so that it stays when other examples join, unless they tie two families together.
    """
    parent: dict[str, str] = {}
    rank: dict[str, int] = {}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    keys = []
    for example in examples:
        groups = [hashlib.sha256(plain(name).encode()).hexdigest() for name in group_names(example.group)]
        keys.append([*groups, example.likeness])
        for place, key in enumerate(keys[-1]):
            place = len(examples) if key == example.likeness else place
            rank[key] = min(place, rank.get(key, place))
            parent.setdefault(key, key)
            parent[root(key)] = root(keys[-1][0])
    name: dict[str, tuple[int, str]] = {}
    for key in parent:
        name[root(key)] = min((rank[key], key), name.get(root(key), (rank[key], key)))
    return [name[root(names[0])][1] for names in keys]
