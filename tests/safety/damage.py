"""Bytes that were a file once: cut, flipped, filled in and torn apart."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from moeopt.errors import MoeoptError


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
    """Anything at all, or an original after a few cuts, flips, insertions and repetitions."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=400))
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at, kind = (
            draw(st.integers(0, len(data))),
            draw(st.sampled_from(["flip", "cut", "insert", "repeat", "drop", "huge"])),
        )
        if kind == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 64))] * draw(st.integers(1, 4))
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "huge":
            data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from([0, 1, 1 << 31, 1 << 40, (1 << 64) - 1])))
    return bytes(data)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=8),
    st.sampled_from([10**400, -1, 2**63, "\ud800", "\x1b[31m", "../../x", "/etc/passwd", float("nan"), 1 << 40]),
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def changed(original: Any) -> st.SearchStrategy[Any]:
    """JSON with something else at one or two of its places."""
    from hostile import paths, replaced

    places = [at for at in paths(original) if at]

    @st.composite
    def build(draw: st.DrawFn) -> Any:
        value = original
        for at in draw(st.lists(st.sampled_from(places), min_size=1, max_size=2)):
            try:
                value = replaced(value, at, draw(JSON))
            except (KeyError, IndexError, TypeError):  # the first change took the place of the second
                continue
        return value

    return build()


def safetensors_bytes(header: Any, data: bytes) -> bytes:
    """A file of that header and data, whatever they are; a header may be text already."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


def evil_pth(canary: Path, protocol: int = 2) -> bytes:
    """A `.pth` as torch writes it, whose pickle is `Evil`."""
    import io

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"layers.0": Evil(canary)}, protocol=protocol))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()


def refused(call: Callable[[], Any], name: str, most: int = 64 << 20) -> MoeoptError | None:
    """None when a call succeeds, or its one MoeoptError, which must name the file; anything else fails the test."""
    tracemalloc.start()
    try:
        call()
        return None
    except MoeoptError as error:
        caught = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert name in str(caught), str(caught)[:500]
    assert len(str(caught)) < 5000, len(str(caught))
    assert peak < most, peak
    return caught
