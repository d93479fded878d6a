"""Generated answers: against one sequence at a time without a cache, under plans, and as what is searched for."""

from __future__ import annotations

import copy

import numpy as np
import optuna
import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM, GenerationConfig

import moeopt
from moeopt.demo.skills import MODEL, rows
from moeopt.errors import NonFiniteLossError, OutOfMemoryError, TaskError
from moeopt.evaluation import Evaluator
from moeopt.models import patched
from moeopt.plan import Plan
from moeopt.tasks import Example, GenerationTask, MultipleChoiceTask

KEPT = [[0, 1, 2, 3], [4, 5, 6, 7], [2, 3, 4, 5], [7, 5, 3, 1], [0, 2, 4, 6], [1, 2, 3, 4]]
PLAN = Plan.one_hot(KEPT, experts=8, k=2)


def skill(name: str, examples: int = 40, **options: object) -> GenerationTask:
    def split(part: str) -> list[Example]:
        table = rows(name, part, examples)
        return [Example(row["id"], row["prompt"], (row["options"][row["answer"]],), 0) for row in table]

    return GenerationTask(f"demo:{name}", *map(split, ("search", "dev", "test")), **{"stop": "\n"} | options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def demo():
    return moeopt.load(MODEL)


@pytest.fixture
def letters() -> GenerationTask:
    examples = [Example(str(i), "abc de" * (1 + i % 3) + str(i), (" x",), 0) for i in range(8)]
    return GenerationTask("letters", examples, stop=["e", "ab"], max_new_tokens=12)


def slowly(model, tokenizer, task: GenerationTask, split: str, ends: set[int]) -> list[str]:
    """The whole sequence again for every token, one example at a time, and the whole text looked through."""
    texts = []
    for prompt in task.prompts(split, tokenizer):
        ids: list[int] = []
        text = ""
        while len(ids) < prompt.max_new_tokens:
            with torch.no_grad():
                token = int(model(torch.tensor([[*prompt.ids, *ids]])).logits[0, -1].argmax())
            if token in ends:
                break
            ids.append(token)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if stops := [text.index(stop) for stop in prompt.stop if stop in text]:
                text = text[: min(stops)]
                break
        texts.append(text)
    return texts


def test_batches_equal_one_sequence_at_a_time_without_cache(make_mixtral, tiny_tokenizer, letters):
    model = make_mixtral(layers=2, experts=4)
    batched = Evaluator(model, tiny_tokenizer, letters).generate()
    assert list(batched.texts) == slowly(model, tiny_tokenizer, letters, "search", {257})
    alone = Evaluator(model, tiny_tokenizer, letters, batch_tokens=1).generate()
    assert alone.texts == batched.texts
    assert alone.tokens == batched.tokens
    assert batched.layer_tokens == 2 * batched.tokens


@pytest.mark.parametrize("family", ["gpt_oss", "minimax", "deepseek_v3"], indirect=True)
def test_families_with_other_caches(build_family, family, tiny_tokenizer, letters):
    """Sliding windows, linear attention (whose rows are never dropped), latent attention."""
    model = build_family(family, vocabulary=300)
    written = Evaluator(model, tiny_tokenizer, letters).generate()
    assert list(written.texts) == slowly(model, tiny_tokenizer, letters, "search", {2, 257})


def test_where_padding_changes_answers_there_is_none(build_family, tiny_tokenizer, letters):
    """MiniMax's linear attention decodes otherwise behind padding, in transformers as it is."""
    config = build_family("minimax", vocabulary=300).config
    config.layer_types = ["linear_attention", "full_attention"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    written = Evaluator(model, tiny_tokenizer, letters).generate()
    assert list(written.texts) == slowly(model, tiny_tokenizer, letters, "search", {2, 257})


def test_answers_of_different_lengths_end_on_their_own(demo):
    model, tokenizer = demo
    task = skill("roman", 16, max_new_tokens=18)
    written = Evaluator(model, tokenizer, task, split="test").generate()
    assert list(written.texts) == slowly(model, tokenizer, task, "test", {tokenizer.eos_token_id})
    assert len(set(map(len, written.texts))) > 2


def test_teacher_forcing_says_what_is_generated(demo):
    evaluator = Evaluator(*demo, skill("dates"), split="test")
    likelihood, generation = evaluator.evaluate(PLAN), evaluator.generate(PLAN)
    starts = [t.startswith(e.options[0]) for t, e in zip(generation.texts, evaluator.task.examples("test"))]
    np.testing.assert_array_equal(likelihood.correct, starts)
    assert likelihood.metrics == {"greedy_match": pytest.approx(np.mean(starts))}


def test_a_stop_text_may_span_tokens_and_is_cut_off(demo):
    model, tokenizer = demo
    whole = Evaluator(model, tokenizer, skill("caesar", 12), split="test").generate()
    stop = [text[2:5] for text in whole.texts]
    assert len(tokenizer(stop[0], add_special_tokens=False)["input_ids"]) == 3
    cut = Evaluator(model, tokenizer, skill("caesar", 12, stop=stop), split="test").generate()
    for before, after in zip(whole.texts, cut.texts, strict=True):
        assert after == before[: min(before.index(s) for s in stop if s in before)]
    saved = [len(a) - len(b) - 3 for a, b in zip(whole.texts, cut.texts)]  # what follows the stop text
    assert cut.tokens == whole.tokens - sum(saved)


def test_special_tokens_are_stop_texts_too(make_mixtral, tiny_tokenizer):
    """Such as the end of a turn in a chat, which decoding leaves out."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    turns = [f"<|turn {i}|>" for i in range(42)]
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    model = make_mixtral(layers=2, experts=4)
    examples = [Example(str(i), "abc de" * (1 + i % 3) + str(i), (" x",), 0) for i in range(8)]
    task = GenerationTask("turns", examples, stop=turns, max_new_tokens=12)
    written = Evaluator(model, tokenizer, task).generate()
    assert list(written.texts) == slowly(model, tokenizer, task, "search", set(range(257, 300)))
    going_on = Evaluator(model, tokenizer, GenerationTask("on", examples, max_new_tokens=12)).generate()
    assert written.tokens < going_on.tokens


def test_a_checkpoint_s_generation_config_is_overridden_and_back_afterwards(
    make_mixtral, tiny_tokenizer, letters, recwarn
):
    model = make_mixtral(layers=2, experts=4)
    greedy = Evaluator(model, tiny_tokenizer, letters).generate()
    shipped = GenerationConfig(
        do_sample=True, temperature=9.0, top_k=2, repetition_penalty=3.0, no_repeat_ngram_size=1, num_beams=3,
        min_new_tokens=9, max_length=21, suppress_tokens=[1, 2, 3], eos_token_id=257,
    )  # fmt: skip
    model.generation_config = shipped
    model.train()
    assert Evaluator(model, tiny_tokenizer, letters).generate().texts == greedy.texts
    assert model.generation_config is shipped
    assert model.training
    assert not recwarn


def test_end_tokens_of_the_generation_config_count(make_mixtral, tiny_tokenizer, letters):
    model = make_mixtral(layers=2, experts=4)
    plain = Evaluator(model, tiny_tokenizer, letters).generate()
    first = tiny_tokenizer(plain.texts[0][3], add_special_tokens=False)["input_ids"][0]
    model.generation_config.eos_token_id = [257, first]
    ended = Evaluator(model, tiny_tokenizer, letters).generate()
    assert list(ended.texts) == slowly(model, tiny_tokenizer, letters, "search", {257, first})
    assert ended.tokens < plain.tokens


@pytest.mark.slow
def test_plans_nest_and_leave_the_model_as_it_was(demo):
    evaluator = Evaluator(*demo, skill("roman", 10), split="test")
    full, pruned = evaluator.generate(), evaluator.generate(PLAN)
    assert full.texts != pruned.texts
    with patched(demo[0], PLAN):
        assert evaluator.generate().texts == pruned.texts
        assert evaluator.generate(Plan.identity(6, 8, 2)).texts == full.texts
    assert evaluator.generate().texts == full.texts
    assert pruned.active == 2


def test_offloaded_weights(make_mixtral, tiny_tokenizer, letters, recwarn):
    plan = Plan.one_hot([[0, 1, 2], [3, 1, 2]], experts=4, k=2)
    expected = Evaluator(make_mixtral(layers=2, experts=4), tiny_tokenizer, letters).generate(plan)
    away = cpu_offload(make_mixtral(layers=2, experts=4), execution_device=torch.device("cpu"))
    assert Evaluator(away, tiny_tokenizer, letters).generate(plan).texts == expected.texts
    assert not recwarn


@pytest.mark.slow
def test_text_under_a_plan_is_that_of_the_exported_checkpoint(demo, tmp_path):
    model, tokenizer = demo
    task = skill("roman", 30)
    written = Evaluator(model, tokenizer, task, split="test").generate(PLAN)
    small = AutoModelForCausalLM.from_pretrained(moeopt.export(PLAN, tmp_path / "small", model=MODEL))
    assert small.config.num_local_experts == 4
    again = Evaluator(small, tokenizer, task, split="test").generate()
    assert again.texts == written.texts
    np.testing.assert_array_equal(again.metrics["exact_match"], written.metrics["exact_match"])


def test_running_out_of_memory_halves_the_batch(make_mixtral, tiny_tokenizer, letters):
    model = make_mixtral(layers=2, experts=4)
    expected = Evaluator(model, tiny_tokenizer, letters).generate()
    forward, seen = model.forward, []

    def short_of_memory(most: int):
        def run(*args, **kwargs):
            seen.append(len(kwargs["input_ids"]))
            if seen[-1] > most:
                raise torch.OutOfMemoryError("out of memory")
            return forward(*args, **kwargs)

        return run

    model.forward = short_of_memory(4)
    with pytest.warns(UserWarning, match="going on with .* tokens a batch to generate"):
        assert Evaluator(model, tiny_tokenizer, letters).generate().texts == expected.texts
    assert seen[-1] <= 4
    model.forward = short_of_memory(0)
    with pytest.warns(UserWarning, match="going on with"), pytest.raises(OutOfMemoryError, match="not even a single"):
        Evaluator(model, tiny_tokenizer, letters).generate()


def test_logits_that_are_no_numbers_are_refused(make_mixtral, tiny_tokenizer, letters):
    model = make_mixtral(layers=2, experts=4)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteLossError, match="not numbers"):
        Evaluator(model, tiny_tokenizer, letters).generate()


def test_other_tasks_are_not_generated_for(tiny_model, tiny_tokenizer):
    task = MultipleChoiceTask("t", [Example("1", "p", ("a", "b"), 0)])
    with pytest.raises(TaskError, match="task 't' is not answered by generating"):
        Evaluator(tiny_model, tiny_tokenizer, task).generate()


def test_the_reported_metric_as_loss(demo):
    evaluator = Evaluator(*demo, skill("dates"), split="test", score="metric", rungs=[10, 25, 40])
    whole = evaluator.generate(PLAN)
    stages = list(evaluator.race(PLAN))
    assert [len(stage.losses) for stage in stages] == [10, 25, 40]
    last = stages[-1]
    np.testing.assert_array_equal(last.correct, whole.metrics["exact_match"])
    np.testing.assert_array_equal(last.losses, 1 - whole.metrics["exact_match"])
    assert last.metrics == pytest.approx(whole.means)
    assert set(last.metrics) == {"exact_match", "f1"}
    assert last.metrics["f1"] > last.metrics["exact_match"]
    assert (last.tokens, last.layer_tokens) == (whole.tokens, whole.layer_tokens)
    assert last.active == 2
    for covered in (stages[0], stages[1], last):
        again = list(evaluator.race(PLAN, covered))[-1]
        np.testing.assert_array_equal(again.scores, last.scores)
        assert again.tokens == last.tokens - covered.tokens
    likely = Evaluator(*demo, skill("dates"), split="test")
    assert likely.fingerprint != evaluator.fingerprint
    other = Evaluator(*demo, skill("dates", max_new_tokens=9), split="test", score="metric", rungs=[10, 25, 40])
    assert other.fingerprint != evaluator.fingerprint


@pytest.mark.slow
def test_the_reported_metric_is_searched_raced_and_resumed(demo, tmp_path):
    model, tokenizer = demo
    space, task = moeopt.EEPSpace.of(model, keep=6), skill("caesar", 12, max_new_tokens=12)

    def run(url: str | None, *trials: int) -> optuna.Study:
        for n in trials:
            objective = moeopt.Objective(model, tokenizer, task, space, rungs=3, score="metric")
            study = moeopt.create_study(
                "s", objective=objective, storage=url, sampler="local", pruner="racing", seed=0, load_if_exists=True
            )
            moeopt.optimize(study, objective, n_trials=n)
        return study

    whole = run(None, 5)
    resumed = run(f"sqlite:///{tmp_path}/s.db", 3, 5)
    assert [(t.state, t.values) for t in resumed.trials] == [(t.state, t.values) for t in whole.trials]
    best = whole.best_trial
    assert best.value == pytest.approx(1 - best.user_attrs["accuracy"])
    assert sorted(best.intermediate_values) == [3, 6, 12]
    judged = Evaluator(model, tokenizer, task).generate(space.plan(best))
    assert best.value == pytest.approx(1 - judged.means["exact_match"])
    assert best.user_attrs["layer_tokens"] == judged.layer_tokens
