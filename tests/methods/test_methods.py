"""One-shot methods: each rule against the obvious way to compute it, and what every method promises."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from scipy.optimize import nnls
from tiny_families import tiny_model

from moeopt import methods
from moeopt.errors import MethodError
from moeopt.evaluation import Evaluator
from moeopt.methods import clustering, kept_sets, naee, output_fit, token_grams
from moeopt.methods.names import BUDGETED, PROGRESSIVE
from moeopt.methods.statistics import MeanOutputs, Norms, Routing, Spread
from moeopt.models import moe_layers, patched
from moeopt.plan import LayerPlan, Plan
from moeopt.tasks import Example, MultipleChoiceTask, TextTask

TEXT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 4
WINDOW, SEQUENCES = 20, 10


@pytest.fixture(scope="module")
def text():
    return TextTask("text", search=[TEXT[i * 7 :][: 53 + i % 3] + str(i) for i in range(6)], window=WINDOW)


@pytest.fixture
def model(make_mixtral):
    return make_mixtral(seed=3)


@pytest.fixture
def calibration(model, tiny_tokenizer, text):
    return methods.Calibration(model, tiny_tokenizer, text, limit=SEQUENCES, batch_tokens=70)


def sequences(text, tokenizer, limit=SEQUENCES):
    return [request.ids for request in text.requests("search", tokenizer, limit=limit)]


def entering(model, ids, plan=None):
    """What enters every MoE block for one sequence, [(tokens, hidden)], from an ordinary forward."""
    layers, states = moe_layers(model), []
    handles = [x.block.register_forward_pre_hook(lambda _m, args: states.append(args[0][0].clone())) for x in layers]
    with torch.no_grad():
        if plan is None:
            model(torch.tensor([ids]))
        else:
            with patched(model, plan):
                model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return states


def block_output(model, layer, hidden, part=None):
    """(tokens, hidden) of one MoE block alone, as one layer of a plan or as it is."""
    with torch.no_grad():
        if part is None:
            output = layer.block(hidden[None])
        else:
            layers = [LayerPlan(x.n, x.k, kept=tuple(range(x.n))) for x in moe_layers(model)]
            layers[layer.index] = part
            with patched(model, Plan(tuple(layers))):
                output = layer.block(hidden[None])
    return (output[0] if isinstance(output, tuple) else output)[0]


def expert(layer, j, h):
    """f_j of one token."""
    with torch.no_grad():
        return layer.experts(h[None], torch.tensor([[j]]), torch.ones(1, 1))[0].double()


@pytest.fixture
def tokens(model, text, tiny_tokenizer):
    """For every layer and token: p (n,), the picked experts with their g, the logits, and f of every expert."""
    by_layer = [[] for _ in moe_layers(model)]
    for ids in sequences(text, tiny_tokenizer):
        for layer, hidden in zip(moe_layers(model), entering(model, ids)):
            for h in hidden:
                logits = (layer.router.weight.detach().double() @ h.double()).numpy()
                p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
                picked = sorted(range(8), key=lambda j: -p[j])[:2]
                g = {j: p[j] / sum(p[i] for i in picked) for j in picked}
                by_layer[layer.index].append((p, g, logits, [expert(layer, j, h).numpy() for j in range(8)]))
    return by_layer


def test_statistics(calibration, tokens):
    made = [{"r": Routing(8), "n": Norms(8), "m": MeanOutputs(8)} for _ in tokens]
    calibration.run(lambda acts: [s.add(acts) for s in made[acts.layer.index].values()])
    for got, acts in zip(made, tokens):
        expected = {name: np.zeros(8) for name in ("visits", "gates", "probabilities", "norms", "gated")}
        for p, g, _, f in acts:
            expected["probabilities"] += p
            for j, gate in g.items():
                expected["visits"][j] += 1
                expected["gates"][j] += gate
                expected["norms"][j] += np.linalg.norm(f[j])
                expected["gated"][j] += gate * np.linalg.norm(f[j])
        for name in ("visits", "gates", "probabilities"):
            np.testing.assert_allclose(getattr(got["r"], name), expected[name], rtol=1e-4)
        np.testing.assert_allclose(got["n"].norms, expected["norms"], rtol=1e-4)
        np.testing.assert_allclose(got["n"].gated, expected["gated"], rtol=1e-4)
        np.testing.assert_allclose(got["r"].logits, sum(np.outer(x[2], x[2]) for x in acts), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(got["m"].means, np.mean([x[3] for x in acts], axis=0), rtol=1e-3, atol=1e-6)
        assert got["r"].tokens == len(acts)


RULES = {
    "frequency": lambda acts, j: sum(j in g for _, g, _, _ in acts),
    "soft_activation": lambda acts, j: sum(g.get(j, 0.0) for _, g, _, _ in acts),
    "soft_activation_all": lambda acts, j: sum(p[j] for p, _, _, _ in acts),
    "ean": lambda acts, j: sum(np.linalg.norm(f[j]) for _, g, _, f in acts if j in g),
    "ean_mean": lambda acts, j: mean([np.linalg.norm(f[j]) for _, g, _, f in acts if j in g]),
    "reap": lambda acts, j: mean([g[j] * np.linalg.norm(f[j]) for _, g, _, f in acts if j in g]),
    "msan": lambda acts, j: mean([np.linalg.norm(f[j]) ** 2 for _, g, _, f in acts if j in g]),
}


def mean(values):
    return sum(values) / len(values) if values else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_rankings(calibration, tokens, name):
    plan = methods.plan(name, calibration, keep=3)
    for part, acts in zip(plan.layers, tokens):
        scores = [RULES[name](acts, j) for j in range(8)]
        assert set(part.kept) == set(sorted(range(8), key=lambda j: -scores[j])[:3])


def test_easy_ep_weighs_tokens_by_how_much_the_layer_turns_them(family, build_family, tiny_tokenizer, text):
    """In every family, against what goes into the norm before the block, noted as the model runs."""
    model = build_family(family, corrected=True, vocabulary=len(tiny_tokenizer))
    layers = moe_layers(model)
    calibration = methods.Calibration(model, tiny_tokenizer, text, limit=3, batch_tokens=1)
    before: list[torch.Tensor] = []
    decoders = [model.get_submodule(layer.name.rpartition(".")[0]) for layer in layers]
    handles = [
        decoder.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: before.append(args[0]))
        for decoder in decoders
    ]
    scores = [np.zeros(layer.n) for layer in layers]

    def observe(acts):
        x = before[-1].reshape(-1, before[-1].shape[-1])
        for token, (gates, index) in enumerate(zip(acts.gates, acts.index)):
            outputs = {j: expert(acts.layer, j, acts.hidden[token]) for j in index.tolist()}
            y = sum(float(g) * outputs[j] for g, j in zip(gates, index.tolist()))
            turned = max(0.0, 1 - float(torch.cosine_similarity(x[token], x[token] + y, dim=0)))
            for g, j in zip(gates.tolist(), index.tolist()):
                scores[acts.layer.index][j] += g * float(outputs[j].norm()) * turned

    calibration.run(observe)
    for handle in handles:
        handle.remove()
    plan = methods.plan("easy_ep", calibration, keep=3, k=2)
    for part, score in zip(plan.layers, scores):
        assert set(part.kept) == set(np.argsort(-score, kind="stable")[:3].tolist())


def noted(model, text, tokenizer, **options):
    """For every layer: f of the tokens routed to each expert, [(visits, hidden)], and the sum of their g, (n,)."""
    layers = moe_layers(model)
    by_layer = [([[] for _ in range(layer.n)], np.zeros(layer.n)) for layer in layers]

    def observe(acts):
        outputs, gates = by_layer[acts.layer.index]
        for h, weights, index in zip(acts.hidden, acts.gates.tolist(), acts.index.tolist()):
            for g, j in zip(weights, index):
                outputs[j].append(expert(acts.layer, j, h).numpy())
                gates[j] += g

    methods.Calibration(model, tokenizer, text, batch_tokens=1, **options).run(observe)
    return by_layer


def check_mone(part, outputs, scores):
    dropped = [j for j in range(part.experts) if j not in part.kept]
    assert set(part.kept) == set(np.argsort(-scores, kind="stable")[: part.kept_experts].tolist())
    assert part.router == "whole"
    means = [np.mean(outputs[j], axis=0) if outputs[j] else np.zeros(part.novices.shape[1]) for j in dropped]
    np.testing.assert_allclose(part.novices, means, rtol=1e-4, atol=1e-5)


def test_mone_keeps_what_varies_and_makes_means_of_the_others(family, build_family, tiny_tokenizer, text):
    model = build_family(family, corrected=True, vocabulary=len(tiny_tokenizer))
    plan = methods.plan("mone", methods.Calibration(model, tiny_tokenizer, text, limit=3, batch_tokens=50), keep=3)
    for part, (outputs, gates) in zip(plan.layers, noted(model, text, tiny_tokenizer, limit=3)):
        scores = np.array([g * np.sqrt(np.var(f, axis=0).sum()) if f else 0.0 for f, g in zip(outputs, gates)])
        check_mone(part, outputs, scores)


def test_layers_that_share_mones_choice_have_constants_of_their_own(model, calibration, tiny_tokenizer, text):
    plan = methods.plan("mone", calibration, keep=3, groups=[(0, 1), (2, 2)])
    by_layer = noted(model, text, tiny_tokenizer, limit=SEQUENCES)
    shared = by_layer[:2]
    scores = np.zeros(8)
    for j in range(8):
        squares = sum(((np.array(f[j]) - np.mean(f[j], axis=0)) ** 2).sum() for f, _ in shared if f[j])
        visits = sum(len(f[j]) for f, _ in shared)
        scores[j] = np.sqrt(squares / max(1, visits)) * sum(gates[j] for _, gates in shared)
    for part, (outputs, _) in zip(plan.layers[:2], shared):
        check_mone(part, outputs, scores)
    assert plan.layers[0].kept == plan.layers[1].kept
    assert plan.layers[0] != plan.layers[1]


def test_an_expert_that_is_never_picked_becomes_zero(model, tiny_tokenizer, text):
    with torch.no_grad():
        moe_layers(model)[1].router.weight[5] = 0.0
        moe_layers(model)[1].router.weight[5] -= 100 * moe_layers(model)[1].router.weight.mean(0)
    calibration = methods.Calibration(model, tiny_tokenizer, text, limit=1)
    (part,) = methods.plan("mone", calibration, keep=2).layers[1:2]
    outputs, _ = noted(model, text, tiny_tokenizer, limit=1)[1]
    dropped = [j for j in range(8) if j not in part.kept]
    never = [place for place, j in enumerate(dropped) if not outputs[j]]
    assert never
    assert not part.novices[never].any()


def test_a_large_mean_takes_nothing_from_a_small_variance(calibration):
    """Outputs of some thousands that differ by some hundredths, in batches of uneven size."""
    layer, rng = calibration.layers[0], np.random.default_rng(0)
    outputs = (5000 + 0.02 * rng.standard_normal((60, layer.hidden))).astype(np.float32)

    class Given:
        def __init__(self, rows):
            self.layer, self.hidden, self.rows = layer, torch.zeros(len(rows), layer.hidden), torch.from_numpy(rows)
            self.picks = torch.full((len(rows), 1), 0.5), torch.full((len(rows), 1), 3)

        def output(self, j, tokens):
            return self.rows[tokens]

    spread = Spread(8)
    for rows in np.split(outputs, [1, 2, 9, 40]):
        spread.add(Given(rows))
    exact = outputs.astype(np.float64)
    np.testing.assert_allclose(spread.means[0][3], exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(spread.squares[0][3], ((exact - exact.mean(0)) ** 2).sum(), rtol=1e-9)
    assert (spread.visits[0][3], spread.gates[3]) == (60, 30)


def test_aimer_is_the_mean_absolute_weight_over_the_root_mean_square(family, build_family, tiny_tokenizer, text):
    model = build_family(family, vocabulary=len(tiny_tokenizer))
    calibration = methods.Calibration(model, tiny_tokenizer, text, limit=1)
    made = methods.plans(["aimer"], calibration, keep=3)["aimer"]
    assert made.layer_tokens == 0
    for layer, part in zip(moe_layers(model), made.plan.layers):
        scores = []
        for j in range(layer.n):
            numbers = [p[j].detach().numpy().ravel() for p in layer.experts.parameters() if p.ndim == 3]
            w = np.concatenate(numbers).astype(np.float64)
            scores.append(np.abs(w).mean() / np.sqrt((w**2).mean()))
        assert set(part.kept) == set(np.argsort(scores, kind="stable")[:3].tolist())


def test_reap_progressive_is_reap_after_the_earlier_layers_are_pruned(calibration):
    plan = methods.plan("reap_progressive", calibration, keep=3)
    full = Plan.identity(len(plan.layers), 8, 2)
    differs = False
    for index, part in enumerate(plan.layers):
        so_far = Plan((*plan.layers[:index], *full.layers[index:]))
        norms = Norms(8)
        calibration.run(lambda acts, i=index, n=norms: n.add(acts) if acts.layer.index == i else None, plan=so_far)
        scores = norms.gated / np.maximum(norms.visits, 1)
        assert set(part.kept) == set(np.argsort(-scores, kind="stable")[:3].tolist())
        differs |= part != methods.plan("reap", calibration, keep=3).layers[index]
    assert differs


def test_gates_are_the_weights_that_the_router_gives(build_family, family, tiny_tokenizer, text):
    """REAP's g: renormalised over the picked experts where the router does that, and only there."""
    model = build_family(family, corrected=True, vocabulary=len(tiny_tokenizer))
    layers, weights = moe_layers(model), []
    calibration = methods.Calibration(model, tiny_tokenizer, text, limit=4, batch_tokens=1)
    handles = [
        layer.router.register_forward_hook(lambda _m, _i, output: weights.append(output[1:])) for layer in layers
    ]
    made = [{"r": Routing(layer.n), "n": Norms(layer.n)} for layer in layers]
    inputs: list[list[torch.Tensor]] = [[] for _ in layers]

    def observe(acts):
        inputs[acts.layer.index].append(acts.hidden)
        for statistic in made[acts.layer.index].values():
            statistic.add(acts)

    calibration.run(observe)
    for handle in handles:
        handle.remove()
    for layer, statistics in zip(layers, made):
        gates, gated = np.zeros(layer.n), np.zeros(layer.n)
        for hidden, (top, index) in zip(inputs[layer.index], weights[layer.index :: len(layers)]):
            for token, h in enumerate(hidden):
                for weight, j in zip(top[token].tolist(), index[token].tolist()):
                    gates[j] += weight
                    gated[j] += weight * float(expert(layer, j, h).norm())
        np.testing.assert_allclose(statistics["r"].gates, gates, rtol=1e-4)
        np.testing.assert_allclose(statistics["n"].gated, gated, rtol=1e-4)


def brute_force(model, inputs, layer, r, k, targets=None):
    """NAEE's enumeration: C(n, r) forwards of the block for every sequence; `BATCH` sequences a calibration batch."""
    errors = {}
    for kept in itertools.combinations(range(layer.n), r):
        errors[kept] = 0.0
        for first in range(0, len(inputs), naee.BATCH):
            hidden = torch.cat(list(inputs[first : first + naee.BATCH]))
            target = (
                block_output(model, layer, hidden)
                if targets is None
                else torch.cat(targets[first : first + naee.BATCH])
            )
            output = block_output(model, layer, hidden, LayerPlan(layer.n, k, kept=kept))
            errors[kept] += float(torch.linalg.norm(target.double() - output.double()))
    return errors


@pytest.mark.parametrize(("r", "k"), [(4, 2), (6, 2), (3, 1)])
def test_naee_equals_brute_force(model, calibration, text, tiny_tokenizer, r, k):
    made = [naee.SetErrors(8, r=r, active=k) for _ in range(3)]
    calibration.run(lambda acts: made[acts.layer.index].add(acts))
    inputs = list(zip(*[entering(model, ids) for ids in sequences(text, tiny_tokenizer)]))
    for layer, got in zip(moe_layers(model), made):
        expected = brute_force(model, inputs[layer.index], layer, r, k)
        np.testing.assert_allclose(got.errors, [expected[kept] for kept in got.sets], rtol=1e-4)
        assert sorted(got.sets, key=lambda kept: got.errors[got.sets.index(kept)]) == sorted(expected, key=expected.get)
        assert got.best == min(expected, key=expected.get)


def test_naee_progressive_equals_brute_force(model, calibration, text, tiny_tokenizer):
    plan = methods.plan("naee_progressive", calibration, keep=4)
    ids = sequences(text, tiny_tokenizer)
    full = list(zip(*[entering(model, sequence) for sequence in ids]))
    parts = [LayerPlan(8, 2, kept=tuple(range(8)))] * 3
    for layer in moe_layers(model):
        targets = [block_output(model, layer, hidden) for hidden in full[layer.index]]
        pruned = [entering(model, sequence, Plan(tuple(parts)))[layer.index] for sequence in ids]
        expected = brute_force(model, pruned, layer, 4, 2, targets)
        best = min(expected, key=expected.get)
        assert plan.layers[layer.index].kept == best
        parts[layer.index] = LayerPlan(8, 2, kept=best)
    assert plan != methods.plan("naee", calibration, keep=4)


@pytest.mark.parametrize("corrected", [False, True])
def test_gram_errors_equal_patched_forwards_in_every_family(family, build_family, tiny_tokenizer, corrected):
    model = build_family(family, vocabulary=300, corrected=corrected)
    small = TextTask("text", search=["".join(chr(40 + i * j % 50) for i in range(90)) for j in (3, 7)], window=30)
    calibration = methods.Calibration(model, tiny_tokenizer, small)
    n, k = calibration.shape.experts, calibration.shape.k
    made = [naee.SetErrors(n, r=4, active=k) for _ in calibration.layers]
    calibration.run(lambda acts: made[acts.layer.index].add(acts))
    whole = [LayerPlan(n, k, kept=tuple(range(n)))] * len(calibration.layers)
    for layer, got in zip(calibration.layers, made):
        for kept in got.sets[::7]:
            outputs = {}
            for name, part in (("full", whole[layer.index]), ("kept", LayerPlan(n, k, kept=kept))):
                parts = [*whole[: layer.index], part, *whole[layer.index + 1 :]]
                caught = outputs[name] = []
                handle = layer.experts.register_forward_hook(lambda _m, _i, o, caught=caught: caught.append(o.clone()))
                with patched(model, Plan(tuple(parts))), torch.no_grad():
                    for batch in calibration.batches:
                        model(batch.ids, attention_mask=batch.mask)
                handle.remove()
            squares = {}
            for batch, a, b in zip(calibration.batches, outputs["full"], outputs["kept"]):
                batches = (batch.numbers // naee.BATCH)[:, None].expand_as(batch.mask)[batch.mask.bool()]
                d = (a - b).reshape(*batch.mask.shape, -1)[batch.mask.bool()].double()
                for number in batches.unique().tolist():
                    squares[number] = squares.get(number, 0.0) + float((d[batches == number] ** 2).sum())
            expected = sum(square**0.5 for square in squares.values())
            assert got.errors[got.sets.index(kept)] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_padding_does_not_count(make_mixtral, tiny_tokenizer, text, dtype):
    model = make_mixtral(seed=3, dtype=dtype)
    together, alone = (
        methods.Calibration(model, tiny_tokenizer, text, limit=SEQUENCES, batch_tokens=size) for size in (200, 1)
    )
    assert any((batch.mask == 0).any() for batch in together.batches)
    assert all((batch.mask == 1).all() for batch in alone.batches)
    kinds = (Routing, Norms, MeanOutputs, partial(naee.SetErrors, r=4, active=2))
    for kind in kinds:
        sums = []
        for calibration in (together, alone):
            made = [kind(8) for _ in range(3)]
            calibration.run(lambda acts, made=made: made[acts.layer.index].add(acts))
            sums.append(made)
        for a, b in zip(*sums):
            exact = dtype == torch.float32  # in bfloat16 a token near a tie may pick another expert
            for name in ("visits", "gated", "probabilities", "means", "errors")[0 if exact else 2 :]:
                if hasattr(a, name):
                    tolerance = 1e-4 if exact else 0.05
                    np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance / 10)


def test_what_is_kept_of_a_token_is_small(calibration):
    made = [token_grams.TokenGrams(8) for _ in range(3)]
    calibration.run(lambda acts: made[acts.layer.index].add(acts))
    for problem in made[0]._problems:
        assert problem.acts.hidden.untyped_storage().nbytes() == problem.acts.routed.untyped_storage().nbytes() == 0


def test_outputs_that_are_not_finite_are_named(make_mixtral, tiny_tokenizer, text):
    model = make_mixtral()
    with torch.no_grad():
        moe_layers(model)[1].experts.down_proj[5] *= torch.inf
    calibration = methods.Calibration(model, tiny_tokenizer, text, limit=4)
    for name in ("naee", "output_fit", "hc_smoe", "naee_progressive"):
        with pytest.raises(MethodError, match=r"layers\.1\..*not finite in torch.float32"):
            methods.plan(name, calibration, keep=4)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["mixtral", "sigmoid", "not renormalised"])
def test_one_expert_more_or_less_errs_as_the_whole_set_does(family, make_mixtral, tiny_tokenizer, text, monkeypatch):
    """What a set toggled by one expert changes, against the set as it is."""
    calibration = methods.Calibration(make_mixtral(), tiny_tokenizer, text, limit=4)
    rule = calibration.rules[0]
    rule = {
        "mixtral": rule,
        "sigmoid": replace(rule, score="sigmoid"),
        "not renormalised": replace(rule, score="softmax", renormalise=False),
    }[family]
    grams = [token_grams.TokenGrams(8) for _ in range(3)]
    calibration.run(lambda acts: grams[acts.layer.index].add(replace(acts, rule=rule)))
    for base in ((0, 2, 3, 6), (1, 5), (4,)):
        others = tuple(e for e in range(8) if e not in base)
        for experts, active in ((base, 1), (others, 1), (base, 2), (others, 2)):
            sets = [tuple(sorted({*base} ^ {e})) for e in experts]
            if len(sets[0]) >= active:
                slow = grams[0].of_sets(sets, active)
                np.testing.assert_allclose(grams[0].toggled(base, experts, active), slow, rtol=1e-5, atol=1e-6)


def test_gram_matrices_are_thinned_to_a_bound_and_it_is_said(calibration, monkeypatch):
    whole, thinned = ([token_grams.TokenGrams(8) for _ in range(3)] for _ in range(2))
    calibration.run(lambda acts: whole[acts.layer.index].add(acts))
    bound = sum(problem.grams.nbytes for problem in whole[0]._problems) // 3
    monkeypatch.setattr(token_grams, "MOST_BYTES", bound)
    with pytest.warns(UserWarning, match="one token in 4"):
        calibration.run(lambda acts: thinned[acts.layer.index].add(acts))
    assert sum(problem.grams.nbytes for problem in thinned[0]._problems) <= bound
    np.testing.assert_array_equal(thinned[0].norms, whole[0].norms)
    sets = kept_sets.kept_sets(8, 4)
    a, b = (grams[0].of_sets(sets, 2) for grams in (whole, thinned))
    assert np.corrcoef(a, b)[0, 1] > 0.8


def test_naee_beyond_enumeration(calibration, monkeypatch):
    exact = [naee.SetErrors(8, r=4, active=2) for _ in range(3)]
    calibration.run(lambda acts: exact[acts.layer.index].add(acts))
    monkeypatch.setattr(naee, "MOST_SETS", 69)
    plan = methods.plan("naee", calibration, keep=4)
    for part, all_sets in zip(plan.layers, exact):
        errors = dict(zip(all_sets.sets, all_sets.errors))
        swapped = [s for s in all_sets.sets if len({*s} & {*part.kept}) == 3]
        assert errors[part.kept] <= min(errors[s] for s in swapped)
        assert errors[part.kept] < np.median(all_sets.errors)


def slow_average_linkage(points, r):
    """Merge the two clusters of least mean pairwise distance until r are left."""
    clusters = [[i] for i in range(len(points))]
    while len(clusters) > r:

        def distance(pair):
            a, b = pair
            return np.mean([np.linalg.norm(points[i] - points[j]) for i in clusters[a] for j in clusters[b]])

        a, b = min(itertools.combinations(range(len(clusters)), 2), key=distance)
        clusters[a] += clusters.pop(b)
    return {frozenset(cluster) for cluster in clusters}


def clusters_of(part):
    return {frozenset(np.flatnonzero(row).tolist()) for row in part.w_rm}


def check_merged(part, acts):
    """W_EM is the frequency-weighted mean of every cluster, W_RM says who belongs to it."""
    visits = np.array([sum(j in g for _, g, _, _ in acts) for j in range(8)])
    for row, members in zip(part.expert_matrix, part.w_rm):
        share = visits * members
        expected = share / share.sum() if share.sum() else members / members.sum()
        np.testing.assert_allclose(row, expected, rtol=1e-5)
    assert (part.w_rm.sum(0) == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("keep", [2, 4, 7])
def test_hc_smoe(calibration, tokens, keep):
    aliased = methods.plan("hc_smoe", calibration, keep=keep)
    summed = methods.plan("hc_smoe_summed", calibration, keep=keep)
    for part, other, acts in zip(aliased.layers, summed.layers, tokens):
        points = np.mean([x[3] for x in acts], axis=0)
        assert clusters_of(part) == slow_average_linkage(points, keep)
        check_merged(part, acts)
        assert (part.router, other.router) == ("alias", "prob")
        assert np.array_equal(part.w_rm, other.w_rm)
        assert np.array_equal(part.w_em, other.w_em)


def test_m_smoe(calibration, tokens):
    plan = methods.plan("m_smoe", calibration, keep=3)
    for part, acts in zip(plan.layers, tokens):
        visits = [sum(j in g for _, g, _, _ in acts) for j in range(8)]
        dominant = sorted(range(8), key=lambda j: -visits[j])[:3]
        columns = np.array([x[2] for x in acts]).T

        def cosine(i, j, columns=columns):
            return columns[i] @ columns[j] / np.linalg.norm(columns[i]) / np.linalg.norm(columns[j])

        groups = {j: {j} for j in dominant}
        for j in set(range(8)) - set(dominant):
            groups[max(dominant, key=lambda i: cosine(i, j))].add(j)
        assert clusters_of(part) == {frozenset(group) for group in groups.values()}
        check_merged(part, acts)


def test_clusters_survive_ties():
    for labels in ([1, 1, 1, 1], [2, 2, 1, 1]):
        for r in (2, 3, 4):
            numbers = clustering.numbered(np.array(labels), r)
            assert sorted(set(numbers.tolist())) == list(range(r))


def test_output_fit_column_is_the_least_squares_solution():
    rng = np.random.default_rng(0)
    outputs, gates = rng.normal(size=(30, 6, 5)), rng.random(30)
    a = sum(g**2 * f @ f.T for g, f in zip(gates, outputs))
    kept, j = (0, 2, 5), 3
    stacked = np.concatenate([g * f[list(kept)].T for g, f in zip(gates, outputs)])
    target = np.concatenate([g * f[j] for g, f in zip(gates, outputs)])
    expected, residual = nnls(stacked, target)
    c, left = output_fit.column(a, kept, j)
    np.testing.assert_allclose(c, expected, atol=1e-8)
    assert left == pytest.approx(residual**2)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_output_fit_is_nearer_to_the_layer_than_naee(family, build_family, tiny_tokenizer, text):
    """Also where the router does not renormalise, so that rows and a one-hot W_RM differ."""
    model = build_family(family, vocabulary=300)
    calibration = methods.Calibration(model, tiny_tokenizer, text, limit=SEQUENCES, batch_tokens=70)
    with torch.no_grad():
        for layer in calibration.layers if family == "qwen2_moe" else ():
            layer.router.weight[3:] *= 0.01
    fitted, pruned = (methods.plan(name, calibration, keep=4) for name in ("output_fit", "naee"))
    inputs = list(zip(*[entering(model, ids) for ids in sequences(text, tiny_tokenizer)]))
    better = 0
    for layer, ours, theirs in zip(calibration.layers, fitted.layers, pruned.layers):

        def error(part, layer=layer):
            differences = [
                block_output(model, layer, h) - block_output(model, layer, h, part) for h in inputs[layer.index]
            ]
            batches = [differences[i : i + naee.BATCH] for i in range(0, len(differences), naee.BATCH)]
            return sum(sum(float((d.double() ** 2).sum()) for d in batch) ** 0.5 for batch in batches)

        assert error(ours) <= error(theirs) * (1 + 1e-5)
        better += error(ours) < error(theirs) * 0.99
    assert better


def test_skipping(model, calibration, text, tiny_tokenizer):
    plan = methods.plan("naee", calibration, keep=4)
    skipping = methods.skipping(plan, calibration)
    ratios = [[] for _ in plan.layers]
    for ids in sequences(text, tiny_tokenizer):
        for layer, hidden in zip(moe_layers(model), entering(model, ids, plan)):
            for h in hidden:
                rows = layer.router.weight.detach().double()[list(plan.layers[layer.index].kept)]
                p = np.sort(torch.softmax(rows @ h.double(), 0).numpy())[::-1]
                ratios[layer.index].append(p[1] / p[0])
    for part, shares in zip(skipping.layers, ratios):
        assert part.skip == pytest.approx(float(np.median(shares)), rel=1e-4)
    assert skipping.with_skip(0) == plan
    quarter = methods.skipping(plan, calibration, quantile=0.25)
    assert all(a.skip < b.skip for a, b in zip(quarter.layers, skipping.layers))
    with patched(model, skipping) as state, torch.no_grad():
        for ids in sequences(text, tiny_tokenizer):
            model(torch.tensor([ids]))
    assert state.active[0] == pytest.approx(1.5, abs=0.02)  # later layers see what skipping in earlier ones changes
    assert all(1.3 < active < 1.7 for active in state.active)


def test_random_is_uniform_and_seeded(calibration):
    drawn = [methods.plan("random", calibration, keep=4, seed=seed) for seed in range(60)]
    assert drawn[0] == methods.plan("random", calibration, keep=4, seed=0)
    counts = np.bincount([e for plan in drawn for part in plan.layers for e in part.kept], minlength=8)
    assert counts.min() > 50
    assert counts.max() < 130
    assert drawn[0].layers[0] != drawn[0].layers[1] or drawn[1].layers[0] != drawn[1].layers[1]


@pytest.mark.parametrize("name", methods.METHODS)
class TestEveryMethod:
    @pytest.mark.slow
    def test_its_plan_is_of_the_size_asked_for(self, model, tiny_tokenizer, text, calibration, name):
        for keep, k in ((6, None), (3, 1), (8, 2)):
            plan = methods.plan(name, calibration, keep=keep, k=k)
            assert len(plan.layers) == 3
            assert all((p.k, p.experts) == (k or 2, 8) for p in plan.layers)
            counts = [p.kept_experts for p in plan.layers]
            assert sum(counts) == 3 * keep if name in BUDGETED else counts == [keep] * 3
            assert {p.router for p in plan.layers} <= {methods.ROUTERS[name], "rows"}
            loss = Evaluator(model, tiny_tokenizer, text, limit=2).evaluate(plan).loss
            assert np.isfinite(loss)

    @pytest.mark.slow
    def test_it_is_a_function_of_the_tokens(self, model, tiny_tokenizer, text, name):
        plans = [
            methods.plan(name, methods.Calibration(model, tiny_tokenizer, text, limit=12, batch_tokens=size), keep=4)
            for size in (40, 1024)
        ]
        if name in BUDGETED:  # what is random of it is drawn batch by batch, and tells a close call
            assert [sum(layer.kept_experts for layer in plan.layers) for plan in plans] == [12, 12]
            return
        for a, b in zip(*(plan.layers for plan in plans)):
            np.testing.assert_allclose(a.expert_matrix, b.expert_matrix, atol=1e-5)
            np.testing.assert_allclose(a.router_matrix, b.router_matrix, atol=1e-5)

    @pytest.mark.slow
    def test_it_works_offloaded_and_leaves_no_trace(self, make_mixtral, tiny_tokenizer, text, name):
        expected = methods.plan(name, methods.Calibration(make_mixtral(), tiny_tokenizer, text, limit=6), keep=4)
        model = cpu_offload(make_mixtral(), execution_device="cpu")
        before = {n: len(m._forward_hooks) for n, m in model.named_modules()}
        plan = methods.plan(name, methods.Calibration(model, tiny_tokenizer, text, limit=6), keep=4)
        assert plan == expected
        assert before == {n: len(m._forward_hooks) for n, m in model.named_modules()}
        assert all(p.is_meta for p in moe_layers(model)[0].experts.parameters())

    @pytest.mark.slow
    def test_families(self, family, build_family, tiny_tokenizer, text, name):
        small = TextTask("text", search=["".join(chr(40 + i * j % 50) for i in range(90)) for j in (3, 7)], window=30)
        model = build_family(family, vocabulary=300)
        calibration = methods.Calibration(model, tiny_tokenizer, small)
        plan = methods.plan(name, calibration, keep=4)
        evaluator = Evaluator(model, tiny_tokenizer, small)
        assert np.isfinite(evaluator.evaluate(plan).loss)


def test_factors_of_experts_count_as_theirs(tiny_tokenizer, text):
    """Gemma 4: picks times outputs are what the experts give, whichever way they are run."""
    calibration = methods.Calibration(tiny_model("gemma4_text"), tiny_tokenizer, text, limit=2)

    def check(acts):
        gates, index = acts.picks
        outputs = acts.outputs[index, torch.arange(len(index))[:, None]]
        torch.testing.assert_close((gates[..., None] * outputs).sum(1), acts.routed, rtol=1e-4, atol=1e-5)

    for every in (False, True):
        calibration.run(check, all_outputs=every)


def test_every_name_is_there():
    assert list(methods.METHODS) == list(methods.ROUTERS)
    for name in methods.__all__:
        assert getattr(methods, name) is not None


def without_novices(part):
    return part if part.novices is None else replace(part, router="rows", novices=None)


def alike(part, other):
    """Equal, but for the last bits of novices: what runs all experts of a batch rounds otherwise than some of them."""
    if part.novices is None or other.novices is None:
        return part == other
    np.testing.assert_allclose(part.novices, other.novices, rtol=1e-4, atol=1e-6)
    return replace(part, novices=other.novices) == other


@pytest.mark.slow
def test_methods_share_a_pass(calibration):
    together = methods.plans(methods.METHODS, calibration, keep=4)
    assert list(together) == list(methods.METHODS)
    for name, made in together.items():
        alone = methods.plans([name], calibration, keep=4)[name]
        assert all(map(alike, alone.plan.layers, made.plan.layers)), name
        assert alone.layer_tokens == made.layer_tokens
    forward = calibration.tokens * 3
    costs = {name: made.layer_tokens / forward for name, made in together.items()}
    assert (costs["random"], costs["frequency"], costs["reap"], costs["naee"]) == (0, 1, 2, 4)
    assert costs["naee_progressive"] == 6


@pytest.mark.slow
def test_groups_share_a_choice(calibration, tokens):
    groups = [(0, 1), (2, 2)]
    names = [name for name in methods.METHODS if name not in PROGRESSIVE]
    for name, made in methods.plans(names, calibration, keep=3, groups=groups).items():
        first, second = map(without_novices, made.plan.layers[:2])
        assert first == second, name
        alone = methods.plan(name, calibration, keep=3)
        # What judges all layers together (loss_aware) may add up in another way.
        assert name == "random" or methods.METHODS[name].alone or alike(made.plan.layers[2], alone.layers[2])
    both = tokens[0] + tokens[1]
    scores = [RULES["reap"](both, j) for j in range(8)]
    kept = methods.plan("reap", calibration, keep=3, groups=groups).layers[0].kept
    assert set(kept) == set(sorted(range(8), key=lambda j: -scores[j])[:3])
    with pytest.raises(MethodError, match="layers cannot share a choice, got 2 groups"):
        methods.plan("naee_progressive", calibration, keep=3, groups=groups)
    with pytest.raises(MethodError, match="must be layer ranges that cover layers 0-2 once"):
        methods.plan("naee", calibration, keep=3, groups=[(0, 1)])


def test_calibration_takes_the_right_answers(model, tiny_tokenizer):
    rows = [Example(str(i), f"{i} plus {i} is", (f" {2 * i}", f" {2 * i + 1}"), i % 2) for i in range(6)]
    task = MultipleChoiceTask("sums", search=rows)
    calibration = methods.Calibration(model, tiny_tokenizer, task, limit=4)
    chosen = task.examples("search")[:4]
    expected = {tuple(tiny_tokenizer(e.prompt + e.options[e.answer])["input_ids"]) for e in chosen}
    got = {tuple(ids[mask.bool()].tolist()) for b in calibration.batches for ids, mask in zip(b.ids, b.mask)}
    assert got == expected
    assert calibration.sequences == 4


def test_bad_input(calibration):
    with pytest.raises(MethodError, match="unknown method 'freqency'; did you mean 'frequency'"):
        methods.plan("freqency", calibration, keep=4)
    for keep in (0, 9, 2.5, True):
        with pytest.raises(MethodError, match=f"keep must be an integer between 1 and the 8 experts.*{keep!r}"):
            methods.plan("naee", calibration, keep=keep)
    with pytest.raises(MethodError, match="k must be an integer between 1 and the 1 experts kept, got 2"):
        methods.plan("naee", calibration, keep=1)
    with pytest.raises(MethodError, match="names must be a list of methods"):
        methods.plans("naee", calibration, keep=4)
    plan = Plan.identity(3, 8, 2)
    with pytest.raises(MethodError, match="give no plan, or no all_outputs"):
        calibration.run(lambda acts: None, plan=plan, all_outputs=True)
    with pytest.raises(MethodError, match="quantile must be between 0 and 1, got 2"):
        methods.skipping(plan, calibration, quantile=2)
    with pytest.raises(MethodError, match="nothing to skip"):
        methods.skipping(plan.with_k(1), calibration)
