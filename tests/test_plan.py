from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save_file

from moeopt.errors import PlanError
from moeopt.files import write_atomically
from moeopt.plan import DownProjections, LayerPlan, ModelShape, Plan, one_hot

entries = st.floats(-2, 2, width=32)


@st.composite
def layer_plans(draw: st.DrawFn, n: int | None = None) -> LayerPlan:
    n = n or draw(st.integers(1, 6))
    r = draw(st.integers(1, n))
    k = draw(st.integers(1, r))
    router = draw(st.sampled_from(["rows", "prob", "logit"]))
    negative = draw(st.sampled_from(["clamp", "eep"]))
    kept = tuple(draw(st.permutations(range(n)))[:r])
    w_rm = draw(hnp.arrays(np.float32, (r, n), elements=entries)) if router != "rows" else None
    if draw(st.booleans()):
        rows = [draw(st.integers(0, n - 1)) for _ in range(r)]
        w_em = draw(hnp.arrays(np.float32, (r, n), elements=entries))
        return LayerPlan(
            n, k, w_em=w_em, w_rm=one_hot(rows, n) if w_rm is None else w_rm, router=router, negative=negative
        )
    return LayerPlan(n, k, kept=kept, w_rm=w_rm, router=router, negative=negative)


plans = st.lists(layer_plans(), min_size=1, max_size=4).map(lambda layers: Plan(tuple(layers)))


@settings(max_examples=60, deadline=None)
@given(plan=plans)
def test_save_and_load(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    assert loaded.fingerprint == plan.fingerprint
    assert loaded.first_difference(plan) is None
    for a, b in zip(loaded.layers, plan.layers):
        assert (a.k, a.router, a.negative, a.kept) == (b.k, b.router, b.negative, b.kept)
        assert np.array_equal(a.expert_matrix, b.expert_matrix)
        assert np.array_equal(a.router_matrix, b.router_matrix)


@settings(max_examples=60, deadline=None)
@given(layer=layer_plans(), seed=st.integers(0, 1000))
def test_fingerprint_ignores_the_order_of_experts(layer: LayerPlan, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(layer.kept_experts)
    other = LayerPlan(
        layer.experts, layer.k, w_em=layer.expert_matrix[order], w_rm=layer.router_matrix[order],
        router=layer.router, negative=layer.negative,
    )  # fmt: skip
    assert Plan((other,)).fingerprint == Plan((layer,)).fingerprint
    same_order = np.array_equal(other.expert_matrix, layer.expert_matrix) and np.array_equal(
        other.router_matrix, layer.router_matrix
    )
    assert (other == layer) == same_order


def test_what_the_fingerprint_tells_apart() -> None:
    def fingerprint(**change: Any) -> str:
        arguments = {
            "experts": 4,
            "k": 1,
            "w_em": np.full((2, 4), 0.25),
            "w_rm": np.full((2, 4), 0.5),
            "router": "prob",
        }
        return Plan((LayerPlan(**(arguments | change)),)).fingerprint

    different = [
        fingerprint(), fingerprint(k=2), fingerprint(router="logit"), fingerprint(negative="eep"),
        fingerprint(w_em=np.full((2, 4), 0.5)), fingerprint(w_rm=np.full((2, 4), -0.5)), 
        fingerprint(w_em=np.full((3, 4), 0.25), w_rm=np.full((3, 4), 0.5)),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert fingerprint(w_em=-np.zeros((2, 4))) == fingerprint(w_em=np.zeros((2, 4)))
    assert all(len(f) == 32 and set(f) <= set("0123456789abcdef") for f in different)


def test_one_hot_matrices_are_kept_lists() -> None:
    dense = LayerPlan(4, 1, w_em=np.eye(4)[[2, 0]], w_rm=np.eye(4)[[2, 0]])
    assert dense == LayerPlan(4, 1, kept=(2, 0))
    assert (dense.kept, dense.w_em, dense.w_rm, dense.router_rows) == ((2, 0), None, None, (2, 0))
    twice = LayerPlan(4, 1, w_em=np.eye(4)[[1, 1]], w_rm=np.eye(4)[[1, 2]])
    assert twice.kept is None
    assert twice.router_rows == (1, 2)
    assert LayerPlan(4, 1, kept=(1, 3), router="prob").router_rows == (1, 3)


def test_identity_and_one_hot() -> None:
    identity = Plan.identity(3, experts=4, k=2)
    assert identity.is_one_hot
    assert all(layer.is_identity for layer in identity.layers)
    pruned = Plan.one_hot([[0, 1, 2, 3], [3, 1], [0, 1, 2, 3]], experts=4, k=2)
    assert pruned.layers[1].kept == (3, 1)
    assert not pruned.layers[1].is_identity
    assert identity.first_difference(pruned) == 1
    assert pruned.with_k(1).layers[0].k == 1
    assert pruned.with_k(1).first_difference(pruned) == 0
    merged = Plan((LayerPlan(4, 1, w_em=np.full((2, 4), 0.25), w_rm=np.eye(4)[:2]),))
    assert not merged.is_one_hot
    with pytest.raises(PlanError, match="plans of 3 and 1 layers"):
        identity.first_difference(merged)


def test_plans_are_frozen() -> None:
    given = np.full((2, 4), 0.25, dtype=np.float32)
    layer = LayerPlan(4, 1, w_em=given, w_rm=given, router="prob")
    given[:] = 9
    assert layer.w_em is not None
    assert layer.w_em[0, 0] == 0.25
    with pytest.raises(ValueError, match="read-only"):
        layer.w_em[0, 0] = 1.0
    with pytest.raises(AttributeError):
        layer.k = 2  # type: ignore[misc]


W = np.full((2, 4), 0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 1}, "exactly one of kept"),
        ({"k": 1, "kept": (0, 1), "w_em": W}, "exactly one of kept"),
        ({"k": 3, "kept": (0, 1)}, "k must be between 1 and the 2 experts kept, got 3"),
        ({"k": 0, "kept": (0, 1)}, "k must be between 1 and the 2 experts kept, got 0"),
        ({"k": 1.5, "kept": (0, 1)}, "k must be between 1 and the 2 experts kept, got 1.5"),
        ({"k": 1, "kept": (0, 4)}, "an entry of kept must be an integer between 0 and 3, got 4"),
        ({"k": 1, "kept": (-1,)}, "an entry of kept must be an integer between 0 and 3, got -1"),
        ({"k": 1, "kept": ()}, "at least one expert, and each only once"),
        ({"k": 1, "kept": (1, 1)}, r"each only once, got \[1, 1\]"),
        (
            {"k": 1, "kept": (0,), "router": "logits"},
            "router must be one of rows, prob, logit, alias, whole, got 'logits'",
        ),
        ({"k": 1, "kept": (0,), "negative": "drop"}, "negative must be one of clamp, eep, got 'drop'"),
        ({"k": 1, "w_em": np.ones((2, 3)), "w_rm": W}, r"w_em must have shape \(r, 4\), got \(2, 3\)"),
        ({"k": 1, "w_em": np.ones(4), "w_rm": W}, r"w_em must have shape \(r, 4\), got \(4,\)"),
        ({"k": 1, "w_em": np.ones((5, 4)), "w_rm": W}, r"between 1 and 4 rows \(r <= n\), got 5"),
        ({"k": 1, "w_em": np.ones((0, 4)), "w_rm": W}, r"between 1 and 4 rows \(r <= n\), got 0"),
        ({"k": 1, "w_em": W * np.nan, "w_rm": W}, "w_em must be finite, got nan"),
        ({"k": 1, "w_em": W, "w_rm": W * np.inf, "router": "prob"}, "w_rm must be finite, got inf"),
        (
            {"k": 1, "w_em": W, "w_rm": np.ones((3, 4)), "router": "prob"},
            r"w_rm must have shape \(2, 4\), got \(3, 4\)",
        ),
        ({"k": 1, "w_em": W}, r"a merged layer needs w_rm, the \(r, n\) router mapping"),
        ({"k": 1, "w_em": W, "w_rm": W}, 'router="rows" needs a one-hot w_rm'),
        ({"k": 1, "kept": (0, 1), "router": "whole"}, 'router="whole" needs novices'),
        ({"k": 1, "kept": (0, 1), "novices": np.ones((2, 3))}, 'novices need router="whole"'),
        (
            {"k": 1, "kept": (0, 1), "router": "whole", "novices": np.ones((3, 3))},
            r"novices must have shape \(2, hidden\), a row for each expert that is not kept, got \(3, 3\)",
        ),
        ({"k": 1, "kept": (0, 1), "router": "whole", "novices": np.ones((2, 0))}, r"\(2, hidden\).*got \(2, 0\)"),
        ({"k": 1, "kept": (0, 1), "router": "whole", "novices": np.full((2, 3), np.nan)}, "novices must be finite"),
        (
            {"k": 5, "kept": (0, 1), "router": "whole", "novices": np.ones((2, 3))},
            "1 and the 4 experts that the router",
        ),
        ({"k": 1, "w_em": W, "w_rm": W, "router": "whole", "novices": np.ones((2, 3))}, "not of a merging"),
        ({"k": 1, "kept": (0, 1), "w_rm": W, "router": "whole", "novices": np.ones((2, 3))}, "takes no w_rm"),
        ({"k": 2, "kept": (0, 1), "skip": 1.5}, "skip must be a number between 0 and 1, got 1.5"),
        ({"k": 2, "kept": (0, 1), "skip": float("nan")}, "skip must be a number between 0 and 1, got nan"),
        ({"k": 2, "kept": (0, 1), "router": "alias"}, "which of the experts kept answers"),
        ({"k": 2, "kept": (0, 1), "router": "alias", "w_rm": np.eye(2, 4)}, "columns have one 1 each"),
        ({"k": 5, "kept": (0, 1), "router": "alias", "w_rm": np.tile(np.eye(2), 2)}, "k must be between 1 and"),
        ({"k": 1, "kept": (0,), "experts": 0}, "experts must be an integer between 1 and 4096, got 0"),
    ],
)
def test_bad_layers(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        LayerPlan(**({"experts": 4} | arguments))
    assert isinstance(caught.value, ValueError)


def test_skipping_and_aliases(tmp_path: Path) -> None:
    plain = Plan.one_hot([[0, 1, 2]] * 2, experts=4, k=2)
    skipping = plain.with_skip([0.25, 0.5])
    w_rm = np.eye(3, 4, dtype=np.float32)
    w_rm[1, 3] = 1
    aliased = Plan((LayerPlan(4, 2, kept=(0, 1, 2), w_rm=w_rm, router="alias"),) * 2)
    for plan in (plain, skipping, aliased):
        plan.save(tmp_path / "plan")
        assert Plan.load(tmp_path / "plan") == plan
    assert len({plan.fingerprint for plan in (plain, skipping, aliased, plain.with_skip(0.5))}) == 4
    assert skipping.with_skip(0) == plain
    assert not skipping.is_one_hot
    assert plain.with_k(1).with_skip(0.5) == plain.with_k(1)
    assert (aliased.layers[0].aliases, aliased.layers[0].router_rows) == ((0, 1, 2, 1), None)


def test_bad_plans_and_shapes() -> None:
    with pytest.raises(PlanError, match="one for each of the 2 layers, got 3"):
        Plan.identity(2, 4, 2).with_skip([0.1, 0.2, 0.3])
    with pytest.raises(PlanError, match="at least one layer"):
        Plan(())
    with pytest.raises(PlanError, match="layer 1 of a plan must be a LayerPlan, got str"):
        Plan((LayerPlan(4, 1, kept=(0,)), "layer"))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="k must be between 1 and the 8 experts, got 9"):
        ModelShape(layers=2, experts=8, k=9)
    with pytest.raises(PlanError, match="layers must be an integer at least 1, got 0"):
        ModelShape(layers=0, experts=8, k=2)


HEAD = {"format": "moeopt-plan", "version": "1"}
RECORD = '[{"experts": 4, "k": %d, "kept": [0, 1], "router": "rows", "negative": "clamp"}]'


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": np.zeros(2)}, None, "not a moeopt plan"),
        ({}, HEAD | {"version": "4"}, r"plan format version '4'; this is moeopt .*, which reads 1 to 3"),
        ({}, HEAD | {"layers": "[{}]"}, "malformed plan metadata"),
        ({}, HEAD | {"layers": RECORD % 3}, "k must be between 1 and the 2 experts kept"),
        ({"layers.7.w_em": np.ones((2, 4), np.float32)}, HEAD | {"layers": RECORD % 1}, "metadata does not place"),
    ],
)
def test_bad_files(tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None, message: str) -> None:
    save_file(tensors, tmp_path / "plan", metadata=metadata)
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "plan")


def test_what_is_no_file_of_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no plan file at"):
        Plan.load(tmp_path / "missing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(PlanError, match="cannot be read as a safetensors file"):
        Plan.load(tmp_path / "text")


def test_saving_replaces_a_file_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.safetensors"
    old = Plan.identity(2, experts=4, k=2)
    old.save(path)

    def full(source: object, target: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            old.with_k(1).save(path)
    assert Plan.load(path) == old
    assert [file.name for file in tmp_path.iterdir()] == ["plan.safetensors"]
    old.with_k(1).save(path)
    assert Plan.load(path) == old.with_k(1)
    before = os.umask(0o077)
    try:
        write_atomically(tmp_path / "private", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


def eep_file(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def matrix(seed: int, r: int = 4) -> torch.Tensor:
    return torch.randn(r, 8, generator=torch.Generator().manual_seed(seed))


SINGLE = {f"{kind}.{i}": matrix(10 * j + i) for j, kind in enumerate(("layers", "transfer")) for i in range(3)}
RANGES = {
    "layers.[0-1]": matrix(0), "transfer.[0-1]": matrix(1), "layers.3": matrix(2), "transfer.[2-3]": matrix(3),
    "others": matrix(4), "others_transfer": matrix(5).to(torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "k", "seeds"),
    [(SINGLE, None, [(0, 10), (1, 11), (2, 12)]), (RANGES, 1, [(0, 1), (0, 1), (4, 3), (2, 3), (4, 5), (4, 5)])],
)
def test_eep_files_place_their_matrices(
    tmp_path: Path, content: dict[str, Any], k: int | None, seeds: list[tuple[int, int]]
) -> None:
    plan = Plan.from_eep(eep_file(tmp_path / "a.pth", content), n_layers=len(seeds), k=k)
    for layer, (w_em, w_rm) in zip(plan.layers, seeds):
        assert np.array_equal(layer.expert_matrix, matrix(w_em).numpy())
        expected = matrix(w_rm).to(torch.bfloat16) if w_rm == 5 else matrix(w_rm)
        assert np.array_equal(layer.router_matrix, expected.float().numpy())
        assert (layer.router, layer.negative, layer.experts, layer.k) == ("prob", "eep", 8, k or 2)


def test_eep_prunings_keep_their_routing(tmp_path: Path) -> None:
    rows = torch.eye(8)[[5, 2]]
    plan = Plan.from_eep(eep_file(tmp_path / "a.pth", {"others": rows, "others_transfer": rows}), n_layers=2)
    assert plan.is_one_hot
    assert plan.layers[0].kept == (5, 2)
    assert (plan.layers[0].router, plan.layers[0].negative) == ("prob", "eep")
    single = Plan.from_eep(eep_file(tmp_path / "b.pth", {"others": rows[:1], "others_transfer": rows[:1]}), n_layers=1)
    assert single.layers[0].k == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.32": matrix(0)}, "keys that name no layer of a 32-layer model: layers.32"),
        ({"layer.3": matrix(0), "layers.[5-40]": matrix(0)}, r"name no layer .*: layer.3, layers.\[5-40\]"),
        ({"layers.[9-3]": matrix(0)}, r"name no layer .*layers.\[9-3\]"),
        (
            {"layers.[0-3]": matrix(0), "layers.2": matrix(0)},
            r"gives layer 2 two matrices: 'layers.\[0-3\]' and 'layers.2'",
        ),
        ({"others": None}, "no matrix for layer 0: neither its own key nor 'others'"),
        ({"others_transfer": None}, "nor 'others_transfer'"),
        ({"others": torch.zeros(8)}, r"'others' must be an \(r, n\) matrix of real numbers, got shape \(8,\)"),
        (
            {"others_transfer": matrix(1, r=3)},
            r"layer 0 \('others', 'others_transfer'\): w_rm must have shape \(4, 8\)",
        ),
        ({"others": matrix(0) * float("nan")}, "w_em must be finite"),
    ],
)
def test_bad_eep_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = {"others": matrix(0), "others_transfer": matrix(1)} | change
    path = eep_file(tmp_path / "a.pth", {key: value for key, value in content.items() if value is not None})
    with pytest.raises(PlanError, match=message):
        Plan.from_eep(path, n_layers=32)


def test_what_is_no_eep_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="must hold a dictionary of tensors, got list"):
        Plan.from_eep(eep_file(tmp_path / "list.pth", [matrix(0)]), n_layers=2)
    with pytest.raises(PlanError, match="no EEP solution file at"):
        Plan.from_eep(tmp_path / "missing.pth", n_layers=2)


def with_novices(kept: tuple[int, ...] = (2, 0), k: int = 3, **options: Any) -> LayerPlan:
    novices = np.random.default_rng(0).standard_normal((5 - len(kept), 6)).astype(np.float32)
    return LayerPlan(5, k, kept=kept, **{"router": "whole", "novices": novices, **options})


def test_novices_and_the_whole_router() -> None:
    layer = with_novices()
    assert (layer.kept_experts, layer.router_rows, layer.aliases, layer.w_rm) == (2, None, None, None)
    assert layer.places == (1, 2, 0, 3, 4)
    assert np.array_equal(layer.router_matrix, one_hot((2, 0), 5))
    assert (layer.is_identity, layer.makes_experts, Plan((layer,)).is_one_hot) == (False, False, False)
    assert layer.novices is not None
    with pytest.raises(ValueError, match="read-only"):
        layer.novices[0, 0] = 1.0
    assert Plan((layer,)).nbytes == Plan((LayerPlan(5, 2, kept=(2, 0)),)).nbytes + layer.novices.nbytes
    assert Plan((layer,)).with_k(5).with_skip(0.5).layers[0] == with_novices(k=5, skip=0.5)


def test_novices_of_no_expert_are_none() -> None:
    everything = LayerPlan(4, 2, kept=(0, 1, 2, 3), router="whole", novices=np.zeros((0, 6), np.float32))
    assert everything == LayerPlan(4, 2, kept=(0, 1, 2, 3))
    assert (everything.router, everything.novices, everything.is_identity) == ("rows", None, True)


def test_novices_tell_plans_apart_whatever_the_order_of_experts() -> None:
    layer, zeros = with_novices(), np.zeros((3, 6), np.float32)
    assert Plan((with_novices((0, 2)),)).fingerprint == Plan((layer,)).fingerprint
    assert with_novices((0, 2)) != layer
    different = [layer, LayerPlan(5, 2, kept=(2, 0)), with_novices(novices=zeros), with_novices(k=2)]
    assert len({Plan((layer,)).fingerprint for layer in different}) == len(different)
    assert len({hash(layer) for layer in different}) == len(different)
    assert with_novices(novices=-zeros) == with_novices(novices=zeros)


def test_novices_in_files(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    half = np.array(with_novices().novices, dtype=np.float16).astype(np.float32)
    for novices, size in ((with_novices().novices, 4), (half, 2)):
        plan = Plan((with_novices(novices=novices), LayerPlan(5, 2, kept=(1, 2))))
        plan.save(path)
        assert Plan.load(path) == plan
        with safe_open(path, framework="np") as file:
            assert (file.metadata()["version"], file.get_tensor("layers.0.novices").dtype.itemsize) == ("3", size)
    for plan, version in ((Plan((LayerPlan(5, 2, kept=(1, 2)),)), "1"), (Plan.identity(1, 5, 2).with_skip(0.5), "2")):
        plan.save(path)
        with safe_open(path, framework="np") as file:
            assert file.metadata()["version"] == version


def test_fingerprints_of_studies_that_are_stored_stay_the_same() -> None:
    w = np.arange(8, dtype=np.float32).reshape(2, 4) / 8
    aliases = np.array([[1, 0, 1, 0], [0, 1, 0, 1]], np.float32)
    down = DownProjections(whole=np.arange(12, dtype=np.float32).reshape(2, 3, 2))
    layers = {
        "a5fe59308ead30f8b076aac82a5c3d52": LayerPlan(4, 2, kept=(2, 0)),
        "f0e99a9246d51985fb80d07c13285ab0": LayerPlan(4, 2, kept=(2, 0), skip=0.5),
        "de38ed024805175f867c1bcd8c9dded6": LayerPlan(4, 1, w_em=w, w_rm=w, router="prob", negative="eep"),
        "d8d4c36cc36b7209db4b7b5e5dcbaf64": LayerPlan(4, 2, kept=(1, 3), w_rm=aliases, router="alias"),
        "002855f00089ef2a7b9ed47d81283a7d": LayerPlan(4, 1, kept=(1, 3), down=down),
    }
    assert [Plan((layer,)).fingerprint for layer in layers.values()] == list(layers)
