"""Examples of an interpreter within a docstring as blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring:
            lines = re.compile(r"^( *)>>> .*?(?=\n *\n|\Z)", re.MULTILINE | re.DOTALL)
            obj.docstring.value = lines.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
