"""What `moeopt search` may vary: its options, each declared, checked and made a space of here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeopt.cli.arguments import read_plan
from moeopt.errors import SpaceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from moeopt.plan import ModelShape
    from moeopt.spaces import Space

SPACE = partial(typer.Option, rich_help_panel="What may vary")
BELONGS = {
    "keep": ("eep", "prune", "merge"),
    "active": ("eep", "prune"),
    "groups": ("eep", "prune", "merge"),
    "encoding": ("prune",),
    "total": ("eep", "prune", "merge"),
    "order": ("prune",),
    "router": ("eep", "merge"),
    "around": ("merge", "active"),
    "scale": ("merge",),
}
"""Options that only some spaces have; `active` where it is one k."""


@dataclass(frozen=True)
class SpaceOptions:
    """The options that say what may vary, each as it is given.

    Raises:
        SpaceError: naming an option that is out of range, missing, or not one of this kind of space.
    """

    keep: Annotated[
        str | None,
        SPACE(metavar="R|LOW-HIGH", help="Experts each layer keeps; a range as 2-6: a number of its own, searched."),
    ] = None
    total: Annotated[
        int | None, SPACE(metavar="N", min=1, help="Of a range: most experts that all layers keep together.")
    ] = None
    order: Annotated[
        str | None,
        SPACE(
            metavar="METHOD",
            help="Of a range: search numbers alone; each layer keeps the first of a method's ranking, as reap's or "
            "loss_aware's.",
        ),
    ] = None
    active: Annotated[
        str | None,
        SPACE(metavar="K|LOW-HIGH", help="Experts active per token; a range as 1-2 is searched. Default: the model's."),
    ] = None
    skip: Annotated[
        float | None,
        SPACE(metavar="BETA", help="Search dynamic skipping of experts of little weight, with betas from 0 to this."),
    ] = None
    active_groups: Annotated[
        str | None, SPACE(help="As --groups, for what --active and --skip search; 1: the same for all layers.")
    ] = None
    groups: Annotated[
        str | None,
        SPACE(help="Layers that share one choice: a number of groups, or ranges as 0-7,8-31. Default: none share."),
    ] = None
    kind: Annotated[
        Literal["eep", "prune", "merge", "active"],
        SPACE(
            "--space",
            help="prune: which experts stay. merge: matrices around a plan. eep: first the one, then the other. "
            "active: how many experts are active, of the full model or of a plan, and nothing else.",
        ),
    ] = "eep"
    router: Annotated[
        Literal["prob", "logit", "rows"] | None,
        SPACE(
            help="Merged routers act on probabilities, as in EEP; on logits, which an ordinary checkpoint can hold; or "
            "are rows of the router as it is, which it can hold, too. Default: prob, or logit where routers correct "
            "their choice by a bias or choose groups first."
        ),
    ] = None
    encoding: Annotated[
        Literal["scores", "rows", "subset"] | None,
        SPACE(help="Numbers of a prune space: one per expert, expert indices, a subset's index. Default: scores."),
    ] = None
    around: Annotated[
        Path | None, SPACE(metavar="PLAN", help="Plan file (or EEP .pth) that a merge or active space starts from.")
    ] = None
    scale: Annotated[float | None, SPACE(metavar="X", help="Step of a merge space. Default: 0.065.")] = None

    def __post_init__(self) -> None:
        if self.skip is not None and not 0 < self.skip <= 1:
            raise SpaceError(f"--skip must be a beta above 0 and at most 1, got {self.skip:g}")
        keep = _number_or_range("--keep", self.keep)
        for option, value in (("--total", self.total), ("--order", self.order)):
            if value is not None and not isinstance(keep, tuple):
                raise SpaceError(f"{option} {value} needs --keep as a range, such as 2-6, got {self.keep}")
        if self.order is not None:
            from moeopt.methods.names import check_ranks

            check_ranks(self.order)
        if self.kind == "merge" and keep is not None and not isinstance(keep, tuple):
            raise SpaceError(
                f"--space merge keeps as many experts as its plan, or a range such as 2-6, got --keep {keep}"
            )
        for option, text in (("--groups", self.groups), ("--active-groups", self.active_groups)):
            _groups(text, option)
        for option, needs in (("--active-groups", self.active_groups), ("--space active", self.kind == "active")):
            if needs and not self.searched:
                raise SpaceError(f"{option} needs something to search: --active with a range as 1-2, or --skip")
        for option, kinds in BELONGS.items():
            value = getattr(self, option) if option != "active" else self._k[0]
            if value is not None and self.kind not in kinds:
                raise SpaceError(f"--{option} {value} belongs to --space {' or '.join(kinds)}, not to {self.kind}")
        if self.kind == "merge" and self.around is None:
            raise SpaceError("--space merge needs --around, the plan it starts from")
        if self.kind not in ("merge", "active") and self.keep is None:
            raise SpaceError("say how many experts each layer keeps, such as --keep 4")

    @property
    def searched(self) -> bool:
        """Whether k or a beta is searched."""
        return self._k[1] is not None or self.skip is not None

    @property
    def _k(self) -> tuple[int | None, tuple[int, int] | None]:
        """`--active` as one k, or as a range to search."""
        k = _number_or_range("--active", self.active)
        return (None, k) if isinstance(k, tuple) else (k, None)

    def space(self, shape: ModelShape, order: ArrayLike | None = None) -> Space:
        """The space, once the model's shape is known.

        Args:
            shape: it.
            order: the ranking of experts, (layers, n), of `--order`; None: not known yet, any stands for it.
        """
        from moeopt import spaces

        k, k_range = self._k
        given: dict[str, Any] = {"groups": _groups(self.groups), "k": k, "scale": self.scale, "total": self.total}
        given["keep"] = _number_or_range("--keep", self.keep)
        given |= {"encoding": self.encoding, "router": self.router}
        if self.order is not None:
            given["order"] = [[*range(shape.experts)]] * shape.layers if order is None else order
        options = {name: value for name, value in given.items() if value is not None}
        searched: dict[str, Any] = {"k": k_range, "groups": _groups(self.active_groups)}
        searched["skip"] = False if self.skip is None else (0.0, self.skip)
        plan = None if self.around is None else read_plan(self.around, shape.layers)
        if self.kind == "active":
            return spaces.ActiveSpace(shape, around=plan, **searched)
        inner: Space
        if self.kind == "merge":
            assert plan is not None
            inner = spaces.MergeSpace(shape, around=plan, **options)
        else:
            inner = (spaces.PruneSpace if self.kind == "prune" else spaces.EEPSpace)(shape, **options)
        return spaces.ActiveSpace(inner, **searched) if self.searched else inner


def order_of(space: Space) -> NDArray[np.int64] | None:
    """The ranking, (layers, n), of a space whose counts alone are searched; None of another."""
    from moeopt.spaces import ActiveSpace, PruneSpace
    from moeopt.spaces.prune import whole_order

    inner = space.inner if isinstance(space, ActiveSpace) else space
    if not isinstance(inner, PruneSpace) or inner.order is None:
        return None
    return whole_order(inner.order, inner.groups, inner.shape.experts)


def _number_or_range(option: str, text: str | None) -> int | tuple[int, int] | None:
    """An option's number, or its range as 2-6.

    >>> _number_or_range("--keep", "4"), _number_or_range("--keep", "2-6")
    (4, (2, 6))
    """
    match = None if text is None else re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text)
    if text is not None and match is None:
        raise SpaceError(f"{option} must be a number of at least 1, or a range as 1-2 to search, got {text!r}")
    if match is None:
        return None
    low, high = match.groups()
    return int(low) if high is None else (int(low), int(high))


def _groups(text: str | None, option: str = "--groups") -> int | list[tuple[int, int]] | None:
    """A number of groups, or inclusive layer ranges; not yet held against a model.

    >>> _groups("0-7,8-31")
    [(0, 7), (8, 31)]
    """
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise SpaceError(f"{option} must be a number of groups or layer ranges such as 0-7,8-31, got {text!r}")
    ends = [part.split("-") for part in text.split(",")]
    return [(int(end[0]), int(end[-1])) for end in ends]
