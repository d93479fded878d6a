"""A space from the JSON description that a study keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import SpaceError, StorageError, StudyError
from moeopt.plan import ModelShape
from moeopt.showing import line, shown
from moeopt.spaces.active import ActiveSpace, plan_described
from moeopt.spaces.base import Space
from moeopt.spaces.eep import EEPSpace
from moeopt.spaces.merge import MergeSpace
from moeopt.spaces.prune import PruneSpace, whole_order
from moeopt.trials import genome
from moeopt.trials.description import DESCRIPTION, described

if TYPE_CHECKING:
    import optuna

MOST_LAYERS = 4096
"""Of a described space; with more, the numbers of a hostile description would fill the memory."""


def from_description(description: Mapping[str, Any]) -> Space:
    """The space whose `describe()` gave this.

    Raises:
        SpaceError: when it is no description of a space, one of a newer moeopt, or one of a space too large.
    """
    try:
        shape = ModelShape(**description["shape"])
        groups = [(first, last) for first, last in description["groups"]]
        keep, k, varies = description["keep"], description["k"], description.get("range")
        numbers = 2 * len(groups) * min(keep, shape.experts) * shape.experts
        if shape.layers > MOST_LAYERS or numbers > genome.LARGEST:
            raise SpaceError(f"{shape} with {len(groups)} groups is larger than any model that moeopt knows")
        mapped = {"router": description["router"], "negative": description["negative"]}
        counted: dict[str, Any] = {"keep": keep}
        if varies is not None:
            counted = {"keep": (varies["low"], keep), "total": varies["total"]}
        match description["kind"]:
            case "prune":
                ranked, order = genome.unpack("order", description), None
                if ranked is not None:
                    order = whole_order(ranked.reshape(len(groups), -1), groups, shape.experts)
                encoding = description["encoding"]
                return PruneSpace(shape, **counted, groups=groups, k=k, encoding=encoding, order=order)
            case "eep":
                return EEPSpace(shape, **counted, groups=groups, k=k, **mapped)
            case "merge":
                entries = genome.unpack("around", description)
                if entries is None:
                    raise KeyError("around")
                space = EEPSpace(shape, **counted, groups=groups, k=k, **mapped)
                counts = space.counts(entries)
                if "counts" in description:
                    counts = _counts(description["counts"], len(groups), keep, shape.router_groups)
                around = space.decode_matrices(space.matrices(entries), counts)
                more = counted if varies is not None else {}
                return MergeSpace(
                    shape, around=around, groups=groups, scale=description["scale"], router=mapped["router"], **more
                )
            case "active":
                inner = description["inner"]
                alone = inner["kind"] == "plan"
                k_range, skip_range = description["k_range"], description["skip_range"]
                return ActiveSpace(
                    shape if alone else from_description(inner),
                    around=plan_described(inner["plan"], shape) if alone else None,
                    k=k_range and tuple(k_range),
                    skip=tuple(skip_range) if skip_range else False,
                    groups=[(first, last) for first, last in description["active_groups"]],
                )
            case kind:
                raise SpaceError(f"this moeopt knows no space of kind {shown(kind)}")
    except SpaceError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, StorageError) as error:
        raise SpaceError(f"not the description of a space: {shown(error)}") from None


def _counts(given: Any, groups: int, keep: int, unit: int) -> NDArray[np.int64]:
    """How many experts each group of layers keeps, (groups,), as a study holds it."""
    if not isinstance(given, list) or len(given) != groups or not all(type(count) is int for count in given):
        raise SpaceError(f"counts must be {groups} integers, one a group of layers, got {shown(given)}")
    if wrong := [count for count in given if not 1 <= count <= keep or count % unit]:
        multiples = f", multiples of {unit}" if unit > 1 else ""
        raise SpaceError(f"counts must be from 1 to {keep}{multiples}, got {shown(wrong[0])}")
    return np.array(given, dtype=np.int64)


def space_of(study: optuna.Study) -> Space:
    """The space that a study of moeopt searches, rebuilt from its description.

    Raises:
        StudyError: when moeopt did not make the study, a newer one did, or no space is described so.
    """
    description = described(study)["space"]
    try:
        return from_description(description)
    except SpaceError as error:
        raise StudyError(
            f"study {study.study_name!r}: its attribute {DESCRIPTION!r}.space: {line(str(error), 500)}"
        ) from None
