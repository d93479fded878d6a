"""The full model's scores in a study: made once, counted once, told from guessing, shown beside what was found."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna_dashboard import get_note
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import moeopt
from moeopt.cli import main
from moeopt.errors import StorageError, StudyError
from moeopt.evaluation import Evaluation, paired_bootstrap
from moeopt.evaluation.prompts import decoded
from moeopt.models import patched
from moeopt.plan import Plan
from moeopt.samplers import get
from moeopt.study import load_study, recipe, reference
from moeopt.study.former_tasks import FormerExample, FormerTask
from moeopt.study.storage import attributes
from moeopt.tasks import Example, MixtureTask, MultipleChoiceTask, Request, TextTask
from moeopt.tasks.generation import GenerationTask
from moeopt.trials import genome

optuna.logging.set_verbosity(optuna.logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore:the full model", "ignore:task 'mixture'")

LAYERS, EXPERTS = 2, 4
QUESTIONS = [Example(str(i), f"is {i * 7 % 40} odd?", (" n", " y"), i % 2) for i in range(24)]
TASK = MultipleChoiceTask("questions", search=QUESTIONS)
TEXT = TextTask("text", search=[f"{i} lines of {i * i} words, and so on" * 2 for i in range(8)], window=60)
WRITTEN = GenerationTask("written", search=[Example(str(i), f"{i}:", (f" {i}",), 0) for i in range(8)])
MIXED = MixtureTask({"questions": (TASK, 2.0), "text": (TEXT, 1.0)})


@pytest.fixture(scope="module")
def model(make_mixtral: Any) -> Any:
    return make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16)


@pytest.fixture
def make(model: Any, tiny_tokenizer: Any) -> Callable[..., moeopt.Objective]:
    def make(task: Any = TASK, space: Any = None, **options: Any) -> moeopt.Objective:
        space = space or moeopt.PruneSpace.of(model, keep=2)
        return moeopt.Objective(model, tiny_tokenizer, task, space, batch_tokens=200, **options)

    return make


def plain(objective: moeopt.Objective, storage: Any = None) -> optuna.Study:
    sampler = get("random", objective.space, seed=0)
    return optuna.create_study(study_name="s", storage=storage, sampler=sampler, load_if_exists=True)


def counted(objective: moeopt.Objective) -> list[Any]:
    """The plans that an objective evaluates from now on."""
    race, plans = objective.evaluator.race, []

    def counting(plan: Any = None, earlier: Any = None) -> Any:
        plans.append(plan)
        return race(plan, earlier)

    objective.evaluator.race = counting  # type: ignore[method-assign]
    return plans


def costs(study: optuna.Study) -> list[int]:
    return [trial.user_attrs["layer_tokens"] for trial in study.trials]


# Made once ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "made"),
    [
        (TASK, "by Optuna"),
        (TASK, "by moeopt"),
        (TASK, "by moeopt in a file"),
        (TEXT, "by Optuna"),
        (MIXED, "by moeopt"),
        (WRITTEN, "by Optuna"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_full_model_is_scored_before_the_first_trial(make: Any, task: Any, made: str, tmp_path: Path) -> None:
    objective = make(task)
    plans = counted(objective)
    storage = f"sqlite:///{tmp_path}/study.db" if made.endswith("file") else None
    options = {"objective": objective, "storage": storage, "sampler": "random"}
    study = plain(objective) if made == "by Optuna" else moeopt.create_study("s", **options)
    assert reference.read(study) is None
    study.optimize(objective, n_trials=3)
    assert len(study.trials) == 3
    assert plans[0] is None
    assert None not in plans[1:]
    held, alone = reference.read(study), make(task).evaluator.evaluate()
    assert held is not None
    np.testing.assert_array_equal(held.scores, alone.scores)
    assert (held.loss, held.accuracy, held.metrics) == (alone.loss, alone.accuracy, alone.metrics)
    assert (held.tokens, held.layer_tokens, held.examples) == (alone.tokens, alone.layer_tokens, len(alone.losses))
    assert study.user_attrs["full_model"]["loss"] == alone.loss
    spent = [trial.user_attrs["spent"] for trial in study.trials]
    assert spent == list(alone.layer_tokens + np.cumsum(costs(study)))
    study.optimize(objective, n_trials=1)
    assert plans.count(None) == 1


@pytest.mark.parametrize("score", ["metric", "likelihood"])
def test_generated_answers_are_scored_as_trials_are(make: Any, score: Any) -> None:
    objective = make(WRITTEN, score=score)
    held = objective.reference(plain(objective))
    assert held.metrics.keys() == ({"exact_match", "f1"} if score == "metric" else {"greedy_match"})
    assert (held.chance, held.score) == (None, score)


@pytest.mark.parametrize("score", ["kl", "acceptance"])
def test_where_losses_are_distances_from_the_full_model_it_is_at_none_and_not_run(make: Any, score: Any) -> None:
    objective = make(score=score)
    plans = counted(objective)
    study = plain(objective)
    study.optimize(objective, n_trials=2)
    held = objective.reference(study)
    assert None not in plans
    assert (held.loss, held.accuracy, held.layer_tokens, held.warnings, held.chance) == (0, 1, 0, (), None)
    run = make(score=score).evaluator.evaluate()
    np.testing.assert_array_equal(held.scores, run.scores)
    assert held.metrics == run.metrics
    assert held.active == run.active
    assert "by definition" in str(held)


def test_who_goes_on_with_a_study_does_not_score_the_full_model_again(make: Any, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    first, second = make(), make()
    moeopt.optimize(moeopt.create_study("s", objective=first, storage=url, sampler="random"), first, n_trials=2)
    before = load_study("s", url).user_attrs["full_model"]
    plans = counted(second)
    resumed = moeopt.create_study("s", objective=second, storage=url, sampler="random", load_if_exists=True)
    moeopt.optimize(resumed, second, n_trials=4)
    assert len(plans) == 2
    assert None not in plans
    assert load_study("s", url).user_attrs["full_model"] == before
    assert resumed.trials[3].user_attrs["spent"] == before["layer_tokens"] + sum(costs(resumed))


@pytest.mark.slow
def test_interrupted_while_the_full_model_is_scored_no_trial_is_lost(make: Any, tmp_path: Path) -> None:
    studies = []
    for name, interrupted in (("whole", False), ("interrupted", True)):
        url = f"sqlite:///{tmp_path}/{name}.db"
        objective = make()
        study = moeopt.create_study("s", objective=objective, storage=url, sampler="random")
        if interrupted:
            full_model = objective.evaluator.full_model
            objective.evaluator.full_model = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                study.optimize(objective, n_trials=4)
            assert reference.read(study) is None
            objective.evaluator.full_model = full_model
            study = moeopt.create_study("s", objective=objective, storage=url, sampler="random", load_if_exists=True)
        moeopt.optimize(study, objective, n_trials=4)
        done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
        keys = ("layer_tokens", "spent", "accuracy")
        studies.append([(trial.value, *(trial.user_attrs[key] for key in keys)) for trial in done])
    assert len(studies[0]) == 4
    assert studies[0] == studies[1]


def test_what_trials_cost_does_not_depend_on_it(make: Any) -> None:
    outcomes = []
    for options in ({}, {"reference": False}):
        objective = make(rungs=2, **options)
        study = moeopt.create_study(objective=objective, storage=None, sampler="local", seed=0)
        study.optimize(objective, n_trials=6)
        outcomes.append([(t.value, t.user_attrs["layer_tokens"]) for t in study.trials])
        assert (reference.read(study) is None) == bool(options)
        if options:
            assert study.trials[-1].user_attrs["spent"] == sum(costs(study))
            before = costs(study)
            objective.reference(study)  # asked for later, it is made
            study.optimize(objective, n_trials=1)
            assert costs(study)[:-1] == before
    assert outcomes[0] == outcomes[1]


def test_workers_that_begin_at_once_leave_one(
    make: Any, make_mixtral: Any, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    moeopt.create_study("s", objective=make(), storage=url, sampler="random")
    barrier, studies = threading.Barrier(2), []

    def work(model: Any) -> None:
        space = moeopt.PruneSpace.of(model, keep=2)
        objective = moeopt.Objective(model, tiny_tokenizer, TASK, space, batch_tokens=200)
        study = load_study("s", url)
        study.sampler = get("random", space, seed=0)
        barrier.wait()
        moeopt.optimize(study, objective, n_trials=6)
        studies.append(study)

    both = [make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16) for _ in range(2)]
    workers = [threading.Thread(target=work, args=(model,)) for model in both]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(studies) == 2
    study = load_study("s", url)
    held = reference.read(study)
    assert held is not None
    assert held.loss == make().evaluator.evaluate().loss
    assert len(study.trials) == 6
    for trial, cost in zip(study.trials, costs(study)):  # of trials that end together neither counts the other
        assert cost <= trial.user_attrs["spent"] - held.layer_tokens <= sum(costs(study))


def test_threads_score_the_full_model_once(make: Any) -> None:
    objective = make()
    plans = counted(objective)
    study = plain(objective)
    study.optimize(objective, n_trials=6, n_jobs=3)
    assert plans.count(None) == 1


def test_of_other_examples_or_another_weight_it_is_made_anew(make: Any, model: Any) -> None:
    space = moeopt.ActiveSpace.of(model, k=(1, 2))
    study = plain(make(space=space))
    references = [make(space=space, **o).reference(study) for o in ({}, {"limit": 8}, {"active_weight": 0.5})]
    assert [held.examples for held in references] == [24, 8, 24]
    assert len({held.of for held in references}) == 2
    assert [held.penalty for held in references] == [0, 0, 1.0]
    assert make(space=space, active_weight=0.5).reference(study).facts == references[2].facts


def test_a_plan_in_force_is_not_the_full_model(make: Any, model: Any) -> None:
    objective = make()
    alone = objective.evaluator.evaluate().loss
    with patched(model, Plan.one_hot([[0, 1]] * LAYERS, experts=EXPERTS, k=2)):
        assert objective.evaluator.evaluate().loss != alone
        assert objective.reference(plain(objective)).loss == alone


def test_a_full_model_without_a_finite_loss_is_said_and_the_search_goes_on(
    make_mixtral: Any, tiny_tokenizer: Any
) -> None:
    model = make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16)
    model.model.layers[1].mlp.experts.down_proj.data[3] = math.nan
    space = moeopt.PruneSpace.of(model, keep=2)
    objective = moeopt.Objective(model, tiny_tokenizer, TASK, space)
    study = plain(objective)
    moeopt.enqueue(study, space, Plan.one_hot([[0, 1]] * LAYERS, experts=EXPERTS, k=2))
    with pytest.warns(UserWarning, match=r"full model gives no reference: .*layer 1"):
        study.optimize(objective, n_trials=1)
    assert study.trials[0].state.name == "COMPLETE"
    assert reference.read(study) is None


def test_switched_off_workers_leave_it_out_too(make: Any) -> None:
    study = moeopt.create_study(objective=make(reference=False), storage="sqlite:///:memory:")
    assert recipe.arguments(recipe.read(study))["reference"] is False
    study = moeopt.create_study(objective=make(), storage="sqlite:///:memory:")
    assert "reference" not in recipe.arguments(recipe.read(study))


# Beside what was found ----------------------------------------------------------------------------------------------


def test_the_difference_is_paired_and_only_with_the_same_examples(make: Any) -> None:
    objective = make()
    study = plain(objective)
    study.optimize(objective, n_trials=2)
    held, best = objective.reference(study), study.best_trial
    ours = Evaluation(*genome.read_scores(best), 0, 0, 0.0)  # type: ignore[misc]
    gap = held.difference(best)
    assert gap == paired_bootstrap(ours, make().evaluator.evaluate())
    assert gap.mean == pytest.approx(best.value - held.loss, abs=1e-6)
    assert make(limit=8).reference(study).difference(best) is None
    assert held.difference(optuna.trial.create_trial(state=optuna.trial.TrialState.COMPLETE, value=1.0)) is None


# Guessing -----------------------------------------------------------------------------------------------------------


@st.composite
def choices(draw: st.DrawFn) -> list[Example]:
    """Questions of two to five options, each different."""
    counts = draw(st.lists(st.integers(2, 5), min_size=1, max_size=12))
    return [Example(str(i), f"q{i}", tuple(f" {j}" for j in range(n)), i % n) for i, n in enumerate(counts)]


@settings(max_examples=25, deadline=None)
@given(choices())
def test_chance_is_the_share_of_right_options(tiny_tokenizer: Any, examples: list[Example]) -> None:
    task = MultipleChoiceTask("m", search=examples)
    requests = task.requests("search", tiny_tokenizer)
    expected = [1 / len(example.options) for example in task.examples("search")]
    np.testing.assert_allclose(task.chance("search", requests), expected)
    few = max(1, len(examples) // 2)
    chance = task.chance("search", task.requests("search", tiny_tokenizer, limit=few))
    np.testing.assert_allclose(chance, expected[:few])


def test_chance_of_other_tasks(tiny_tokenizer: Any, harness_tasks: Path) -> None:
    gold = [FormerExample(str(i), f"p{i}", (" A", " B", " C", " a"), 0, right=(0, 3)) for i in range(3)]

    def chance(task: Any, split: str = "search", **limits: Any) -> Any:
        return task.chance(split, task.requests(split, tiny_tokenizer, **limits))

    assert chance(FormerTask("record", search=gold)).tolist() == [0.5] * 3
    assert np.isnan(chance(TEXT)).all()
    assert np.isnan(chance(WRITTEN)).all()
    mixture = chance(MIXED)
    assert set(mixture[~np.isnan(mixture)]) == {0.5}
    assert len(mixture) == len({request.example for request in MIXED.requests("search", tiny_tokenizer)})
    assert 0 < np.isnan(mixture).sum() < len(mixture)
    nested = MixtureTask({"inner": (MIXED, 1.0), "more": (TASK, 1.0)})
    assert np.isnan(chance(nested, limit=9)).sum() < 9
    for name, expected in (("sums", 0.5), ("sums_two_prompts", 0.5), ("sums_word", math.nan)):
        task = moeopt.tasks.get(f"lm_eval:{name}", include_path=harness_tasks)
        np.testing.assert_equal(chance(task, "test", limit=5), [expected] * 5)


class Answering:
    """An evaluator's face: so many of each task's examples right."""

    split = "search"

    def __init__(self, task: Any, requests: Any) -> None:
        self.task, self.requests = task, requests


def doubts(task: Any, tokenizer: Any, correct: Any, requests: Any = None) -> list[str]:
    requests = requests or task.requests("search", tokenizer)
    correct = np.asarray(correct, np.float32)
    evaluation = Evaluation(correct, np.ones_like(correct), correct, 0, 0, 0.0)
    return reference.doubts(Answering(task, requests), evaluation, task.chance("search", requests))  # type: ignore[arg-type]


@pytest.mark.parametrize(("options", "n"), [*itertools.product([2, 3, 4], [5, 12, 24, 60])])
def test_guessing_is_told_at_the_level_that_is_stated(tiny_tokenizer: Any, options: int, n: int) -> None:
    """The least number right that is taken for more than guessing is that of the exact test, or the one beside it."""
    examples = [Example(str(i), f"q{i}", tuple(f" {j}" for j in range(options)), 0) for i in range(n)]
    task = MultipleChoiceTask("m", search=examples)
    tail = [
        sum(math.comb(n, k) * (options - 1) ** (n - k) for k in range(right, n + 1)) / options**n
        for right in range(n + 2)
    ]
    exact = next(right for right, p in enumerate(tail) if p <= 0.05)
    requests = task.requests("search", tiny_tokenizer)
    said = [bool(doubts(task, tiny_tokenizer, [1] * right + [0] * (n - right), requests)) for right in range(n + 1)]
    least = said.index(False)
    assert abs(least - exact) <= 1
    assert tail[least] < 0.06
    assert said == [True] * least + [False] * (n + 1 - least)


def test_what_is_said_of_a_guessing_model_names_numbers_and_what_to_look_at(tiny_tokenizer: Any) -> None:
    (text,) = doubts(TASK, tiny_tokenizer, [1, 0] * 12)
    for part in ("50.0% of 24 examples", "no better than guessing, 50.0%", "delimiter", "chat template"):
        assert part in text
    (text,) = doubts(TASK, tiny_tokenizer, [1] * 14 + [0] * 10)
    assert "not surely better than guessing" in text
    assert "more examples" in text
    assert doubts(TASK, tiny_tokenizer, [1] * 20 + [0] * 4) == []
    (text,) = doubts(WRITTEN, tiny_tokenizer, [0] * 8)
    assert "none of 8 examples right" in text
    assert doubts(WRITTEN, tiny_tokenizer, [1] + [0] * 7) == []
    assert doubts(TEXT, tiny_tokenizer, [0.01] * 16) == []
    assert doubts(TEXT, tiny_tokenizer, [0.0] * 16) != []


def test_tasks_of_a_mixture_are_told_apart(tiny_tokenizer: Any) -> None:
    requests = MIXED.requests("search", tiny_tokenizer)
    places = MIXED.places(requests)
    correct = np.ones(len({request.example for request in requests}))
    assert doubts(MIXED, tiny_tokenizer, correct) == []
    correct[places["questions"][0]] = 0
    (text,) = doubts(MIXED, tiny_tokenizer, correct)
    assert "accuracy of questions, 0.0%" in text


def test_a_warning_in_python_shows_the_first_prompt(make: Any) -> None:
    wrong = MultipleChoiceTask("wrong", search=[Example(str(i), f"{i} is\n", ("a", "b"), i % 2) for i in range(20)])
    objective = make(wrong)
    with pytest.warns(UserWarning, match="than guessing") as caught:
        plain(objective).optimize(objective, n_trials=1)
    prompt, scored = objective.evaluator.first_prompt
    assert prompt.startswith("<s>")
    assert "is\n" in prompt + scored
    message = str(caught[0].message)
    assert reference.first_prompt(objective.evaluator) in message
    assert "\\n" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = plain(objective)
        objective.reference(study)  # who asks reads `warnings`, and no one is told twice
        study.optimize(objective, n_trials=1)


# The first prompt ---------------------------------------------------------------------------------------------------


def metaspace() -> PreTrainedTokenizerFast:
    """As sentencepiece's: a piece that begins a word holds its space, and alone is decoded without."""
    letters = ["<s>", "▁", *"abcdefgh", *(f"▁{c}" for c in "abcdefgh")]
    backend = Tokenizer(
        models.Unigram([(piece, -float(len(letters) - i)) for i, piece in enumerate(letters)], unk_id=0)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@settings(max_examples=60, deadline=None)
@given(
    st.text("abcdefgh é\n😀", min_size=1, max_size=12), st.text("abcdefgh é😀", min_size=1, max_size=6), st.booleans()
)
def test_the_prompt_is_cut_from_the_text_of_all_tokens(
    tiny_tokenizer: Any, prompt: str, option: str, bos: bool
) -> None:
    for tokenizer in (tiny_tokenizer, metaspace()):
        head = tokenizer(prompt, add_special_tokens=False).input_ids
        ids = (
            *([tokenizer.bos_token_id] if bos else []),
            *head,
            *tokenizer(option, add_special_tokens=False).input_ids,
        )
        at = len(head) + bos
        before, behind = decoded(tokenizer, Request(0, 0, ids, at))
        whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert before + behind == whole
        assert before == tokenizer.decode(ids[:at], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if bos:
            assert before.startswith("<s>")


def test_a_border_within_a_character_falls_before_it(tiny_tokenizer: Any) -> None:
    ids = tuple(tiny_tokenizer("a😀", add_special_tokens=False).input_ids)
    assert decoded(tiny_tokenizer, Request(0, 0, ids, 3)) == ("a", "😀")


def test_a_long_prompt_is_cut_in_the_middle_and_nothing_in_it_moves_a_cursor(make: Any) -> None:
    examples = [Example(str(i), f"begin\x1b[2J{'so ' * 100}{i}\tend:", (" no", " yes"), 0) for i in range(2)]
    text = reference.first_prompt(make(MultipleChoiceTask("long", search=examples)).evaluator)
    assert text.startswith('"<s>begin\\x1b[2Jso so')
    assert text.endswith('\\tend:" + " no"')
    assert text.isprintable()
    examples = [Example(str(i), f"{'so ' * 160}{i} end:", (" no", " yes"), 0) for i in range(2)]
    assert "..." in reference.first_prompt(make(MultipleChoiceTask("long", search=examples)).evaluator)


# Where it is shown --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(model: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and rows of one's own."""
    folder = tmp_path_factory.mktemp("reference")
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{i} and 1 make", "options": [str(i + 1), str(i + 2)], "answer": i % 2} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def searched(place: Path, url: str, *more: str, trials: int = 2) -> list[str]:
    goal = ["--task", "multiple_choice", "--data", str(place / "rows.jsonl"), "--limit", "12", "--keep", "2"]
    stop = ["--sampler", "random", "--trials", str(trials), "--study", "s", "--storage", url]
    return ["search", str(place / "model"), *goal, *stop, *more]


@pytest.mark.slow
def test_search_show_and_note_have_the_full_model_beside_the_best(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    assert main(searched(place, url)) == 0
    out, err = capsys.readouterr()
    study = load_study("s", url)
    held = reference.read(study)
    assert held is not None
    gap = held.difference(study.best_trial)
    assert gap is not None
    numbers = f"loss {held.loss:.4f}, accuracy {100 * held.accuracy:.1f}% of 12 examples (chance 50.0%)"
    assert f"full model: {numbers}, {held.layer_tokens:,} layer-tokens\n" in err
    assert re.search(r'first prompt, then what is scored: "<s>\d+ and 1 make" \+ " \d+"\n', err)
    assert err.index("first prompt") < err.index("trial 2/2")
    assert held.warnings
    assert all(f"Warning: {warning}" in err for warning in held.warnings)
    assert err.count("than guessing") == 1
    line = f"Full model: {numbers}. Best - full: loss {gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
    assert line in out.splitlines()

    assert main(searched(place, url, trials=3)) == 0  # the same reference, shown again
    assert f"full model: {numbers}" in capsys.readouterr().err
    assert load_study("s", url).user_attrs["full_model"] == study.user_attrs["full_model"]

    assert main(["show", "s", "--storage", url]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"full model +{re.escape(numbers)}", shown)
    assert re.search(rf"full model +{held.loss:.4f} +{100 * held.accuracy:.1f}%", shown)
    assert "than guessing" in shown
    assert main(["show", "s", "--storage", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["full_model"] == held.facts
    assert main(["show", "--storage", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["full_model"] == held.facts

    assert main(["dashboard", url, "--once"]) == 0
    note = get_note(load_study("s", url))
    assert f"| full model | `{numbers}` |" in note
    assert "than guessing" in note


def test_search_without_it(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    assert main(searched(place, url, "--no-reference")) == 0
    out, err = capsys.readouterr()
    assert "ull model" not in out + err
    assert "first prompt" in err
    assert main(["show", "s", "--storage", url]) == 0
    assert re.search(r"full model +not scored", capsys.readouterr().out)
    assert main(searched(place, url)) == 0  # later it is made
    assert "Full model: loss" in capsys.readouterr().out


# Of others ----------------------------------------------------------------------------------------------------------


def test_one_that_moeopt_did_not_write_is_one_error(make: Any) -> None:
    objective = make()
    study = plain(objective)
    study.set_user_attr("full_model", {"loss": 0.1})
    with pytest.raises(StudyError, match=r"study 's': its attribute 'full_model'\.of must be text"):
        study.optimize(objective, n_trials=1)


@pytest.mark.parametrize("damage", [{"z": "x"}, {"shape": [3]}, {"v": 2}, {"chunks": 9}, None, 3, "x"])
def test_damaged_scores_are_one_error(make: Any, damage: Any) -> None:
    objective = make()
    study = plain(objective)
    objective.reference(study)
    head = attributes.study_attributes(study)[reference.SCORES]
    damaged = {**head, **damage} if isinstance(damage, dict) else damage
    attributes.write_study(study, {reference.SCORES: damaged})
    with pytest.raises(StorageError, match="moeopt:full_model"):
        reference.read(study)


def test_scores_of_something_else_are_left_out(make: Any) -> None:
    objective = make()
    study = plain(objective)
    study.optimize(objective, n_trials=1)
    assert objective.reference(study).difference(study.trials[0]) is not None
    head = attributes.study_attributes(study)[reference.SCORES]
    attributes.write_study(study, {reference.SCORES: {**head, "of": "another"}})
    assert objective.reference(study).difference(study.trials[0]) is None
