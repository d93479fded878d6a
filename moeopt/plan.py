"""Plans: what a pruned and merged Mixture-of-Experts model *is*, layer by layer, apart from any model or optimiser.

A Mixtral layer has n experts E_1..E_n and a router g, and activates k of them per token:

    p = softmax(g(x)),   T = top-k(p),   y = sum over i in T of (p_i / sum_T p) E_i(x).

A `LayerPlan` keeps r <= n experts by two matrices (EEP, arXiv 2407.00945, section 3.2):

* ``w_em`` (r, n), expert merging: every weight tensor of new expert i is ``sum_j w_em[i, j] * (that tensor of E_j)``;
* ``w_rm`` (r, n), router mapping: ``p' = w_rm @ p``, before top-k and renormalisation.

Dynamic skipping (NAEE, arXiv 2402.14800, section 3.3) also leaves out, token by token, experts of little weight.

Arrays here are numpy float32; nothing in this module needs torch, except reading EEP's own `.pth` files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt import __version__
from moeopt.errors import PlanError
from moeopt.files import MALFORMED, write_atomically
from moeopt.showing import line, shown

Router = Literal["rows", "prob", "logit", "alias"]
Negative = Literal["clamp", "eep"]
Matrix = NDArray[np.float32]

MOST_EXPERTS = 4096
"""Of a layer. With more than any model has, the matrices of a file that lies would fill the memory."""
FORMAT = "moeopt-plan"
FORMAT_VERSION = 2
"""Of files that hold an alias or skip; others are written as version 1."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that a search space depends on.

    Args:
        layers: number of MoE layers.
        experts: n, experts of each layer.
        k: experts activated per token.
    """

    layers: int
    experts: int
    k: int

    def __post_init__(self) -> None:
        _integer("layers", self.layers, low=1)
        _integer("experts", self.experts, low=1, high=MOST_EXPERTS)
        _integer("k", self.k, low=1, high=self.experts, what=f"k must be between 1 and the {self.experts} experts")


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What one MoE layer becomes.

    Exactly one of `kept` and `w_em` is given; a `w_em` whose rows are distinct unit vectors is stored as `kept`.

    Args:
        experts: n, the layer's number of experts in the full model.
        k: experts activated per token in the planned layer, 1 <= k <= r (with ``router="alias"``, 1 <= k <= n).
        kept: indices of the r experts kept, distinct, in the order of the new experts (a pruning).
        w_em: (r, n) float32, the expert merging matrix.
        w_rm: (r, n) float32, the router mapping. None means the one-hot rows of `kept`.
        router: where `w_rm` acts. ``"rows"``: it is one-hot and selects rows of the router's weight, so that the
            softmax runs over the r selected logits (a stock checkpoint expresses it). ``"prob"``: on the probabilities,
            after softmax and before top-k, as in the EEP paper. ``"logit"``: on the router's weight, before softmax.
            ``"alias"``: after top-k; the router picks k of the n experts as ever, and new expert i, where w_rm[i, j] is
            1, answers for expert j (HC-SMoE, arXiv 2410.08589). Every column then has one 1.
        negative: what happens to negative entries of ``w_rm @ p`` under ``router="prob"``. ``"clamp"`` sets them to 0
            (a token whose whole top-k is 0 gets a zero MoE output); ``"eep"`` keeps them, as EEP's code does.
        skip: beta of dynamic skipping, between 0 (no skipping) and 1: of the k experts of a token those whose weight is
            less than beta times the largest are left out, and the weights of the others renormalised.

    Raises:
        PlanError: naming the value that does not fit and the shape or range that would.
    """

    experts: int
    k: int
    kept: tuple[int, ...] | None = None
    w_em: Matrix | None = None
    w_rm: Matrix | None = None
    router: Router = "rows"
    negative: Negative = "clamp"
    skip: float = 0.0

    def __post_init__(self) -> None:
        n = _integer("experts", self.experts, low=1, high=MOST_EXPERTS)
        if (self.kept is None) == (self.w_em is None):
            raise PlanError("a layer plan needs exactly one of kept (expert indices) and w_em (an (r, n) matrix)")
        if self.router not in get_args(Router):
            raise PlanError(f"router must be one of {', '.join(get_args(Router))}, got {self.router!r}")
        if self.negative not in get_args(Negative):
            raise PlanError(f"negative must be one of {', '.join(get_args(Negative))}, got {self.negative!r}")
        if isinstance(self.skip, bool) or not isinstance(self.skip, Real) or not 0 <= self.skip <= 1:
            raise PlanError(f"skip must be a number between 0 and 1, got {self.skip!r}")
        if self.w_em is not None:
            w_em = _matrix("w_em", self.w_em, n)
            rows = _one_hot_rows(w_em)
            if rows is not None and len(set(rows)) == len(rows):
                object.__setattr__(self, "w_em", None)
                object.__setattr__(self, "kept", rows)
            else:
                object.__setattr__(self, "w_em", w_em)
        if self.kept is not None:
            kept = tuple(_integer("an entry of kept", e, low=0, high=n - 1) for e in self.kept)
            if not kept or len(set(kept)) != len(kept):
                raise PlanError(f"kept must name at least one expert, and each only once, got {list(kept)}")
            object.__setattr__(self, "kept", kept)
        r = self.kept_experts
        if self.w_rm is not None:
            w_rm = _matrix("w_rm", self.w_rm, n, rows=r)
            if self.router == "rows" and _one_hot_rows(w_rm) is None:
                raise PlanError('router="rows" needs a one-hot w_rm; a dense one needs router="prob" or "logit"')
            if self.router == "alias" and _one_hot_rows(w_rm.T) is None:
                raise PlanError(
                    'router="alias" needs a w_rm whose columns have one 1 each: who answers for that expert'
                )
            redundant = self.router == "rows" and _one_hot_rows(w_rm) == self.kept
            object.__setattr__(self, "w_rm", None if redundant else w_rm)
        elif self.kept is None:
            raise PlanError(
                "a merged layer needs w_rm, the (r, n) router mapping: with merged experts it is not implied"
            )
        elif self.router == "alias":
            raise PlanError('router="alias" needs w_rm: which of the experts kept answers for each of the others')
        elif self.router != "rows":
            object.__setattr__(self, "w_rm", _frozen(one_hot(self.kept, n)))
        if self.router == "alias":
            _integer("k", self.k, low=1, high=n, what=f"k must be between 1 and the {n} experts that the router ranks")
        else:
            _integer("k", self.k, low=1, high=r, what=f"k must be between 1 and the {r} experts kept")
        object.__setattr__(self, "skip", float(np.float32(self.skip)) if self.k > 1 else 0.0)

    @property
    def kept_experts(self) -> int:
        """r, the number of experts the planned layer has."""
        return len(self.kept) if self.kept is not None else int(cast(Matrix, self.w_em).shape[0])

    @property
    def expert_matrix(self) -> Matrix:
        """W_EM as an (r, n) float32 matrix, whichever way it is stored."""
        return one_hot(self.kept, self.experts) if self.kept is not None else cast(Matrix, self.w_em)

    @property
    def router_matrix(self) -> Matrix:
        """W_RM as an (r, n) float32 matrix, whichever way it is stored."""
        return self.w_rm if self.w_rm is not None else self.expert_matrix

    @property
    def router_rows(self) -> tuple[int, ...] | None:
        """The router rows that `w_rm` selects before top-k when it is one-hot, else None."""
        if self.router == "alias":
            return None
        return self.kept if self.w_rm is None else _one_hot_rows(self.w_rm)

    @property
    def aliases(self) -> tuple[int, ...] | None:
        """For ``router="alias"``, the new expert that answers for each of the n experts; else None."""
        return _one_hot_rows(cast(Matrix, self.w_rm).T) if self.router == "alias" else None

    @property
    def is_identity(self) -> bool:
        """Whether the layer keeps all n experts, in order, router untouched, none skipped (k may still differ)."""
        everything = tuple(range(self.experts))
        return self.kept == everything and self.router_rows == everything and not self.skip

    def _key(self, *, ordered: bool) -> bytes:
        matrix = np.concatenate([self.expert_matrix, self.router_matrix], axis=1) + np.float32(0.0)  # -0.0 becomes 0.0
        if not ordered:
            matrix = matrix[np.lexsort(matrix.T[::-1])]
        head = f"{self.experts},{self.k},{self.router},{self.negative if self.router == 'prob' else ''}"
        head += f",{self.skip!r};" if self.skip else ";"
        return head.encode() + np.ascontiguousarray(matrix, dtype="<f4").tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerPlan) and self._key(ordered=True) == other._key(ordered=True)

    def __hash__(self) -> int:
        return hash(self._key(ordered=True))


@dataclass(frozen=True)
class Plan:
    """One `LayerPlan` for every MoE layer of a model, first layer first.

    Plans compare equal and hash by their matrices. Two plans whose experts merely stand in another order are not equal,
    but share a `fingerprint`.
    """

    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise PlanError("a plan needs at least one layer")
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, LayerPlan):
                raise PlanError(f"layer {i} of a plan must be a LayerPlan, got {type(layer).__name__}")

    @classmethod
    def identity(cls, n_layers: int, experts: int, k: int) -> Plan:
        """The plan that keeps every expert of every layer."""
        layer = LayerPlan(experts=experts, k=k, kept=tuple(range(experts)))
        return cls((layer,) * _integer("n_layers", n_layers, low=1))

    @classmethod
    def one_hot(
        cls,
        kept: Sequence[Iterable[int]],
        *,
        experts: int,
        k: int,
        router: Router = "rows",
        negative: Negative = "clamp",
    ) -> Plan:
        """A pruning: for each layer, the indices of the experts it keeps.

        >>> Plan.one_hot([[0, 2], [1, 3]], experts=4, k=2).layers[1].kept
        (1, 3)
        """
        return cls(tuple(LayerPlan(experts, k, kept=tuple(rows), router=router, negative=negative) for rows in kept))

    @property
    def fingerprint(self) -> str:
        """32 hex digits that name what the plan computes: equal for plans whose experts are merely reordered."""
        digest = hashlib.sha256()
        for layer in self.layers:
            digest.update(layer._key(ordered=False))
        return digest.hexdigest()[:32]

    def prefixes(self) -> list[bytes]:
        """Digests of the first 0, 1, ..., L layers: equal where two plans compute the same bits up to there."""
        digest = hashlib.sha256()
        found = [digest.digest()]
        for layer in self.layers:
            digest.update(layer._key(ordered=True))
            found.append(digest.digest())
        return found

    @property
    def is_one_hot(self) -> bool:
        """Whether every layer is a plain pruning: kept experts with their own router rows, none skipped."""
        return all(x.kept is not None and x.router_rows == x.kept and not x.skip for x in self.layers)

    def first_difference(self, other: Plan) -> int | None:
        """Index of the first layer in which `other` differs, or None when the plans are equal.

        Raises:
            PlanError: when the plans have different numbers of layers.
        """
        if len(self.layers) != len(other.layers):
            raise PlanError(
                f"plans of {len(self.layers)} and {len(other.layers)} layers cannot be compared layer by layer"
            )
        return next((i for i, (a, b) in enumerate(zip(self.layers, other.layers)) if a != b), None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as one safetensors file with JSON metadata; a file of that name is replaced whole."""
        from safetensors.numpy import save

        records, tensors = [], {}
        for i, layer in enumerate(self.layers):
            kept = list(layer.kept) if layer.kept is not None else None
            records.append(
                {
                    "experts": layer.experts,
                    "k": layer.k,
                    "kept": kept,
                    "router": layer.router,
                    "negative": layer.negative,
                    **({"skip": layer.skip} if layer.skip else {}),
                }
            )
            for name in ("w_em", "w_rm"):
                matrix = getattr(layer, name)
                if matrix is not None:
                    tensors[f"layers.{i}.{name}"] = np.ascontiguousarray(matrix)
        version = FORMAT_VERSION if any(x.skip or x.router == "alias" for x in self.layers) else 1
        metadata = {"format": FORMAT, "version": str(version), "moeopt": __version__, "layers": json.dumps(records)}
        write_atomically(Path(path), save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by `save`.

        Raises:
            PlanError: when the file is missing, is not a plan, or is written by a newer moeopt.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise PlanError(f"no plan file at {str(path)!r}")
        try:
            with safe_open(str(path), framework="np") as file:
                metadata = file.metadata() or {}
                names = set(file.keys())
                tensors = {
                    name: file.get_tensor(name) for name in names if re.fullmatch(r"layers\.\d+\.w_(em|rm)", name)
                }
        except (SafetensorError, OSError, *MALFORMED) as error:
            reason = line(str(error), 500)
            raise PlanError(
                f"{str(path)!r} is not a plan: it cannot be read as a safetensors file ({reason})"
            ) from None
        if metadata.get("format") != FORMAT:
            raise PlanError(f"{str(path)!r} is a safetensors file, but not a moeopt plan")
        if metadata.get("version") not in {str(version) for version in range(1, FORMAT_VERSION + 1)}:
            by = f"was written by moeopt {shown(metadata['moeopt'])}, it " if "moeopt" in metadata else ""
            raise PlanError(
                f"{str(path)!r} {by}has plan format version {shown(metadata.get('version'))}; this is moeopt "
                f"{__version__}, which reads 1 to {FORMAT_VERSION}"
            )
        try:
            records = json.loads(metadata["layers"])
            layers = tuple(
                LayerPlan(
                    experts=record["experts"],
                    k=record["k"],
                    kept=None if record["kept"] is None else tuple(record["kept"]),
                    w_em=tensors.pop(f"layers.{i}.w_em", None),
                    w_rm=tensors.pop(f"layers.{i}.w_rm", None),
                    router=record["router"],
                    negative=record["negative"],
                    skip=record.get("skip", 0.0),
                )
                for i, record in enumerate(records)
            )
            plan = cls(layers)
            placed = sum((p.w_em is not None) + (p.w_rm is not None) for p in layers)
        except PlanError as error:
            raise PlanError(f"{str(path)!r}: {line(str(error), 500)}") from None
        except MALFORMED as error:
            raise PlanError(f"{str(path)!r} has malformed plan metadata: {shown(error)}") from None
        if tensors or placed != len(names):
            unplaced = shown(sorted(tensors or names), 500)
            raise PlanError(f"{str(path)!r} holds tensors that its metadata does not place: {unplaced}")
        return plan

    @classmethod
    def from_eep(cls, path: str | os.PathLike[str], n_layers: int, *, k: int | None = None) -> Plan:
        """Read a solution file released with EEP (arXiv 2407.00945), a `.pth` dictionary of (r, n) tensors.

        `layers.N` and `layers.[a-b]` (both ends included) hold W_EM, `transfer.N` and `transfer.[a-b]` hold W_RM;
        `others` and `others_transfer` serve the layers that no such key names. The mapping acts on probabilities and
        keeps negative weights exactly as EEP's code does.

        Args:
            path: the `.pth` file, read with `weights_only=True`.
            n_layers: MoE layers of the model the solution is for (32 for Mixtral 8x7B).
            k: experts activated per token; by default 2, or r where r is smaller.

        Raises:
            PlanError: when the file cannot be read, a key cannot be placed, or a layer has no matrix.
        """
        return cls(tuple(_eep_layers(_read_pth(path), str(path), _integer("n_layers", n_layers, low=1), k)))

    def with_k(self, k: int) -> Plan:
        """The same plan with k experts activated per token in every layer."""
        return Plan(tuple(replace(layer, k=k) for layer in self.layers))

    def with_skip(self, skip: float | Sequence[float]) -> Plan:
        """The same plan with dynamic skipping: one beta for all layers, or one for each.

        Raises:
            PlanError: when there are not as many as layers, or one is out of [0, 1].
        """
        betas = [float(skip)] * len(self.layers) if isinstance(skip, Real) else list(cast(Sequence[float], skip))
        if len(betas) != len(self.layers):
            raise PlanError(
                f"skip must be one number or one for each of the {len(self.layers)} layers, got {len(betas)}"
            )
        return Plan(tuple(replace(layer, skip=float(beta)) for layer, beta in zip(self.layers, betas)))


def one_hot(indices: Iterable[int], n: int) -> Matrix:
    """(r, n) float32 matrix whose row i is the unit vector of `indices[i]`."""
    columns = list(indices)
    matrix = np.zeros((len(columns), n), dtype=np.float32)
    matrix[np.arange(len(columns)), columns] = 1
    return matrix


def _integer(name: str, value: Any, *, low: int, high: int | None = None, what: str | None = None) -> int:
    try:
        number = int(value)
        exact = number == value and not isinstance(value, (bool, str))
    except (TypeError, ValueError, OverflowError):
        exact = False
        number = low - 1
    if not exact or number < low or (high is not None and number > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise PlanError(f"{what or f'{name} must be an integer {limits}'}, got {value!r}")
    return number


def _frozen(matrix: Matrix) -> Matrix:
    matrix.flags.writeable = False
    return matrix


def _matrix(name: str, value: ArrayLike, n: int, *, rows: int | None = None) -> Matrix:
    matrix = np.array(value, dtype=np.float32)
    expected = f"({rows if rows is not None else 'r'}, {n})"
    if matrix.ndim != 2 or matrix.shape[1] != n or (rows is not None and matrix.shape[0] != rows):
        raise PlanError(f"{name} must have shape {expected}, got {matrix.shape}")
    if not 1 <= matrix.shape[0] <= n:
        raise PlanError(f"{name} must have between 1 and {n} rows (r <= n), got {matrix.shape[0]}")
    if not np.isfinite(matrix).all():
        raise PlanError(f"{name} must be finite, got {matrix[~np.isfinite(matrix)][0]}")
    return _frozen(matrix)


def _one_hot_rows(matrix: Matrix) -> tuple[int, ...] | None:
    if ((matrix == 0) | (matrix == 1)).all() and (matrix.sum(axis=1) == 1).all():
        return tuple(int(i) for i in matrix.argmax(axis=1))
    return None


def _read_pth(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    if not Path(path).is_file():
        raise PlanError(f"no EEP solution file at {str(path)!r}")
    import torch

    try:
        data = io.BytesIO(Path(path).read_bytes())
        if zipfile.is_zipfile(data) and any(part.compress_type for part in zipfile.ZipFile(data).infolist()):
            raise ValueError("it is compressed, as torch never writes one")
        data.seek(0)
        content = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlanError(f"{str(path)!r} cannot be read as a weights-only .pth file: {line(reason, 500)}") from None
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise PlanError(f"{str(path)!r} must hold a dictionary of tensors, got {type(content).__name__}")
    found = {}
    for name, tensor in content.items():
        shape = tuple(tensor.shape)
        if len(shape) != 2 or max(shape) > MOST_EXPERTS or tensor.is_complex():
            raise PlanError(
                f"{str(path)!r}: {shown(name)} must be an (r, n) matrix of real numbers, got shape {shown(shape)} of "
                f"{tensor.dtype}"
            )
        try:
            found[str(name)] = tensor.detach().float().numpy()
        except (TypeError, RuntimeError) as error:  # sparse, quantised, without data
            raise PlanError(f"{str(path)!r}: {shown(name)} is no ordinary tensor: {line(str(error))}") from None
    return found


def _eep_layers(content: Mapping[str, Any], path: str, n_layers: int, k: int | None) -> list[LayerPlan]:
    placed: dict[str, dict[int, str]] = {"layers": {}, "transfer": {}}
    defaults = {"layers": "others", "transfer": "others_transfer"}
    strangers = []
    for key in content:
        if key in defaults.values():
            continue
        match = re.fullmatch(r"(layers|transfer)\.(?:(\d{1,9})|\[(\d{1,9})-(\d{1,9})\])", key)
        first, last = (int(match[2] or match[3]), int(match[2] or match[4])) if match else (0, -1)
        if match is None or not first <= last < n_layers:
            strangers.append(key)
            continue
        for i in range(first, last + 1):
            if i in placed[match[1]]:
                raise PlanError(f"{path!r} gives layer {i} two matrices: {placed[match[1]][i]!r} and {key!r}")
            placed[match[1]][i] = key
    if strangers:
        named = line(", ".join(strangers[:9]), 500)
        raise PlanError(f"{path!r} has keys that name no layer of a {n_layers}-layer model: {named}")
    layers = []
    for i in range(n_layers):
        keys = {kind: placed[kind].get(i, default) for kind, default in defaults.items()}
        missing = [key for key in keys.values() if key not in content]
        if missing:
            raise PlanError(f"{path!r} has no matrix for layer {i}: neither its own key nor {' or '.join(missing)!r}")
        w_em, w_rm = content[keys["layers"]], content[keys["transfer"]]
        active = min(2, w_em.shape[0]) if k is None else k
        try:
            layers.append(LayerPlan(w_em.shape[1], active, w_em=w_em, w_rm=w_rm, router="prob", negative="eep"))
        except PlanError as error:
            where = f"{path!r}, layer {i} ({keys['layers']!r}, {keys['transfer']!r})"
            raise PlanError(f"{where}: {line(str(error), 500)}") from None
    return layers
