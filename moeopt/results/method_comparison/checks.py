"""What can be judged before anything heavy is imported: numbers, names, the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeopt import __version__
from moeopt.errors import MethodError, MoeoptError
from moeopt.files import MALFORMED
from moeopt.methods import names as method_names
from moeopt.plan import ModelShape, why_unequal
from moeopt.showing import shown

MANIFEST = "comparison.json"
FORMAT, VERSION = "moeopt-comparison", 1
MAY_DIFFER = ("model.name_or_path",)
"""The same weights may lie elsewhere."""


class ComparisonError(MoeoptError, ValueError):
    """A comparison cannot be made as asked, or not in this folder."""


def check(shape: ModelShape, keep: Sequence[int], active: Sequence[int] | None = None) -> tuple[int, ...]:
    """The numbers of active experts that are asked for.

    Raises:
        ComparisonError: when a model of this shape does not have so many experts, or more would run than are kept.
    """
    ks = tuple(dict.fromkeys((shape.k,) if active is None else active))
    if not keep or not ks:
        raise ComparisonError("say how many experts are kept and active: at least one number of each")
    for name, values in (("keep", keep), ("active", ks)):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= shape.experts:
                raise ComparisonError(
                    f"{name} must be between 1 and the {shape.experts} experts each layer has, got {value!r}"
                )
    for r in keep:
        unequal = why_unequal(r, shape.router_groups)
        if unequal is not None:
            raise ComparisonError(unequal)
    if max(ks) > min(keep):
        hint = "" if active is not None else f", the model's own; ask for fewer with active={min(keep)}"
        raise ComparisonError(f"keep={min(keep)} is fewer than the k={max(ks)} experts each token activates{hint}")
    return ks


def check_methods(names: Sequence[str] | None) -> tuple[str, ...]:
    """The methods that are asked for, each once; None: all but random.

    Raises:
        MethodError: for an unknown one, the nearest name being suggested, or for random.
    """
    if names is None:
        return tuple(name for name in method_names.ROUTERS if name != "random")
    for name in names:
        method_names.check(name)
    if "random" in names:
        raise MethodError("random prunings are always compared; say how many with draws, and leave out 'random'")
    return tuple(dict.fromkeys(names))


def check_folder(folder: Path, about: Mapping[str, Any]) -> None:
    """Raise ComparisonError unless a folder is new, empty, or of a comparison of the same model and tasks.

    Args:
        folder: the folder.
        about: descriptions of model, task and calibration task, or of some of these.
    """
    if folder.exists() and not folder.is_dir():
        raise ComparisonError(f"{str(folder)!r} is a file; give a folder for the comparison")
    try:
        if not folder.is_dir() or not any(folder.iterdir()):
            return
        there = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        ours, written = there["format"] == FORMAT, there.get("version")
    except FileNotFoundError:
        raise ComparisonError(f"{str(folder)!r} is not empty and holds no comparison; give a new folder") from None
    except (OSError, *MALFORMED) as error:
        raise ComparisonError(f"{str(folder / MANIFEST)!r} cannot be read: {shown(error)}") from None
    if not ours:
        raise ComparisonError(f"{str(folder)!r} is of another program")
    if written != VERSION:
        by = f"moeopt {shown(there['moeopt'])}, in " if "moeopt" in there else ""
        raise ComparisonError(
            f"{str(folder)!r} is a comparison of {by}format version {shown(written)}; this is moeopt {__version__}, "
            f"which reads {VERSION}: give another folder"
        )
    from moeopt.study import differences_of

    differences = [
        f"{path}: it has {shown(old)}, now {shown(new)}"
        for key in about
        for path, old, new in differences_of(there.get(key), json.loads(json.dumps(about[key])), key)
        if path not in MAY_DIFFER
    ]
    if differences:
        raise ComparisonError(
            f"{str(folder)!r} holds a comparison of something else; give another folder. {'; '.join(differences)}"
        )
