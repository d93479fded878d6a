"""What is scored, and what is continued: the tokens of prompt and option, whatever the tokenizer."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_of import chatting
from tokenizer_kinds import ENDS, KINDS, LOSSLESS, REAL, real, small

from moeopt.errors import TaskError
from moeopt.evaluation import Evaluator
from moeopt.tasks import Example, GenerationTask, MultipleChoiceTask, TextTask, get

PIECES = [
    "hello", " hello", "wor", "ld", " world", "word", "Answer", ":", " ", "\n", "\n\n", "  ", "\t", "2+2=", "4", " 10",
    "yes", " yes", "No", "'s", '"', "(", ")", ".", " [INST]", "[/INST]", "ü", "你好", "é", "🙂", "def", "_", "x",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
BORDERS = [
    ("Answer:", " yes"), ("Answer: ", "yes"), ("hello wor", "ld"), ("hello wor", "d"), ("2+2=", "4"),
    ("Answer:\n\n", "yes"), ("Answer:\n", " yes"), ("it", "'s"), ("x\n ", "\nyes"),
]  # fmt: skip


def requests_of(tokenizer: Any, prompt: str, options: tuple[str, ...], **how: Any) -> list[Any]:
    return MultipleChoiceTask("t", test=[Example("a", prompt, options, 0)]).requests("test", tokenizer, **how)


@functools.cache
def harness(tokenizer: Any) -> Any:
    """lm-evaluation-harness, which says what it would run."""
    from lm_eval.models.huggingface import HFLM

    class Encoder(HFLM):
        def __init__(self) -> None:
            super(HFLM, self).__init__()
            self.tokenizer, self.backend = tokenizer, "causal"
            self.add_bos_token = self.custom_prefix_token_id = self.enable_thinking = None

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            return [(context, continuation) for _, context, continuation in requests]

    return Encoder()


def of_harness(tokenizer: Any, prompt: str, option: str) -> tuple[list[int], int] | None:
    """The harness's own request, where that is of prompt and option."""
    from lm_eval.api.instance import Instance

    ((context, scored),) = harness(tokenizer).loglikelihood(
        [Instance("loglikelihood", {}, (prompt, option), 0)], disable_tqdm=True
    )
    ids = [*context, *scored]
    plain = tokenizer.decode(tokenizer(prompt + option, add_special_tokens=False)["input_ids"])
    right = tokenizer.decode(ids, skip_special_tokens=True) == plain and tokenizer.eos_token_id not in ids
    return (ids, len(context)) if right and context and scored else None


def scored_from(tokenizer: Any, prompt: str, option: str, start: int) -> int:
    """Where the scored tokens begin, from the characters that each token is made of."""
    spans = tokenizer(prompt + option, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    stripped = len(prompt.rstrip())
    if stripped + start == 0 or any(a < stripped < b for a, b in spans):
        stripped = len(prompt)
    return start + sum(b <= stripped for _, b in spans)


def check(tokenizer: Any, prompt: str, option: str) -> None:
    plain = tokenizer(prompt + option, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in plain:  # which may stand for characters of prompt and option together
        return
    adds_bos = tokenizer(prompt + option)["input_ids"][:1] == [tokenizer.bos_token_id] != plain[:1]
    ids = [tokenizer.bos_token_id] * adds_bos + plain
    expected = scored_from(tokenizer, prompt, option, int(adds_bos))
    if expected == len(ids):  # of a tokenizer that knows no white space
        with pytest.raises(TaskError, match="has no tokens"):
            requests_of(tokenizer, prompt, (option, option + "!"))
        return
    (request, _) = requests_of(tokenizer, prompt, (option, option + "!"))
    if expected > 0:
        assert (list(request.ids), request.scored_from) == (ids, expected)
        assert of_harness(tokenizer, prompt, option) in (None, (ids, expected))
    elif asked := tokenizer(prompt, add_special_tokens=False)["input_ids"]:  # one token is the prompt and more
        assert tokenizer.decode(request.ids) == tokenizer.decode(plain)
        assert list(request.ids[: request.scored_from]) == asked
    else:
        before = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        assert (list(request.ids), request.scored_from) == ([before, *plain], 1)


@pytest.mark.slow
@pytest.mark.parametrize("around", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_option_are_one_text_for_every_kind_of_tokenizer(kind, around):
    tokenizer = small(kind, around)
    for border in BORDERS:
        check(tokenizer, *border)

    @settings(deadline=None, max_examples=25)
    @given(TEXTS, TEXTS)
    def any_texts(prompt, option):
        check(tokenizer, prompt, option)

    any_texts()


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_requests_are_the_harness_s_on_the_vocabularies_of_mixtral_deepseek_and_qwen(name):
    tokenizer = real(name)
    if not name.endswith("</s>"):
        assert sum(of_harness(tokenizer, *border) is not None for border in BORDERS) > len(BORDERS) // 2
    for border in BORDERS:
        check(tokenizer, *border)

    @settings(deadline=None, max_examples=60)
    @given(TEXTS | st.text(max_size=8), TEXTS | st.text(min_size=1, max_size=5))
    def any_texts(prompt, option):
        check(tokenizer, prompt, option)

    any_texts()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_what_is_scored_and_continued_decodes_to_the_text(kind):
    for around in ENDS:
        tokenizer = small(kind, around)

        bos = "<s>" if "<s>" in around else ""
        space = " " if "prefix space" in kind and not bos else ""
        for prompt, option in BORDERS:
            for written in ("", "<s>"):  # a prompt may be written with it
                task = GenerationTask("t", test=[Example("a", written + prompt, (option,), 0)], max_new_tokens=4)
                (request,), (asked,) = task.requests("test", tokenizer), task.prompts("test", tokenizer)
                begin = (bos or written) + (space if not written else "")
                assert tokenizer.decode(request.ids).replace("<s> ", "<s>") == begin + prompt + option
                assert tokenizer.decode(asked.ids).replace("<s> ", "<s>") == begin + prompt
                assert 2 not in request.ids + asked.ids


@pytest.mark.parametrize("around", ENDS)
def test_a_begin_token_that_prompts_are_written_with_stands_once(around):
    tokenizer = small("byte level", around)
    rows = [Example(str(i), f"<s>[INST] {i} + 4 [/INST]", (" yes", " no"), i % 2) for i in range(9)]
    task = MultipleChoiceTask("t", rows[:6], (), rows[6:]).prompted(shots=2)
    for request in task.requests("test", tokenizer):
        assert request.ids.count(1) == 1
        assert request.ids[0] == 1
        assert 2 not in request.ids
        asked = task.examples("test")[request.example]
        shots = "\n\n".join(e.prompt + e.options[e.answer] for e in task._prompting.shots)
        text = f"{shots}\n\n{asked.prompt}{asked.options[request.option]}"
        assert tokenizer.decode(request.ids) == "<s>" + text.replace("<s>", "")
    (window,) = TextTask("t", search=["<s>" + "hello world " * 8]).requests("search", tokenizer)
    assert window.ids.count(1) == 1
    (window,) = TextTask("t", search=["hello world " * 8]).requests("search", tokenizer)
    assert (window.ids[0] == 1) == ("<s>" in around)
    assert window.scored_from == 1
    assert 2 not in window.ids


@pytest.mark.parametrize("kind", KINDS[:-2])
def test_a_prompt_that_is_cut_ends_where_the_option_begins(kind):
    tokenizer = small(kind, "<s></s>")
    for prompt, option in BORDERS:
        long = "the wonderful world " * 9 + prompt
        (whole, _) = requests_of(tokenizer, long, (option, option + "!"))
        with pytest.warns(UserWarning, match="cut at their beginning"):
            (cut, longer) = requests_of(tokenizer, long, (option, option + "!"), max_length=12)
        assert max(len(cut.ids), len(longer.ids)) == 12
        assert cut.ids[0] == whole.ids[0] == 1
        assert cut.ids[1:] == whole.ids[len(whole.ids) - len(cut.ids) + 1 :]
        assert cut.ids[cut.scored_from :] == whole.ids[whole.scored_from :]


@pytest.mark.parametrize("around", ENDS)
def test_a_chat_has_the_special_tokens_that_its_template_writes(around):
    tokenizer = chatting(
        small("sentencepiece", around),
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST] "
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
    )
    task = MultipleChoiceTask("t", test=[Example("a", "is ice cold?", ("yes", "no"), 0)]).prompted(chat=True)
    for request, option in zip(task.requests("test", tokenizer), ("yes", "no")):
        assert tokenizer.decode(request.ids).replace("<s> ", "<s>") == f"<s>[INST] is ice cold? [/INST] {option}"
        assert tokenizer.decode(request.ids[request.scored_from :]) == option


@pytest.mark.parametrize("around", ["<s>", "<s></s>"])
def test_a_task_of_the_harness_is_scored_as_one_text(around, harness_tasks):
    tokenizer = small("sentencepiece", around)
    task = get("lm_eval:sums", include_path=harness_tasks)
    requests = task.requests("test", tokenizer)
    for request in requests:
        asked = task.examples("test")[request.example]
        text = asked.prompt + asked.options[request.option]
        assert tokenizer.decode(request.ids).replace("<s> ", "<s>") == "<s>" + text
        theirs = of_harness(tokenizer, asked.prompt, asked.options[request.option])
        assert theirs in (None, (list(request.ids), request.scored_from))
    assert len(requests) == 80


def test_options_with_prompts_of_their_own_are_scored_as_each_alone(make_mixtral):
    tokenizer, model = small("sentencepiece"), make_mixtral(layers=2, experts=4, vocab_size=512)
    asked = [("hello wor", ("ld", "d, hello", "k")), ("2+2=", ("4", "42 or 5")), ("Answer: ", ("yes", "no no"))]
    task = MultipleChoiceTask("t", test=[Example(prompt, prompt, options, 0) for prompt, options in asked])
    requests = task.requests("test", tokenizer)
    assert len({r.ids[: r.scored_from] for r in requests}) > len(asked)
    totals = []
    for request in requests:
        ids = torch.tensor(request.ids)
        with torch.inference_mode():
            scores = model(ids[None]).logits[0].log_softmax(1)
        first = request.scored_from
        totals.append(float(scores[first - 1 : -1].gather(1, ids[first:, None]).sum()))
    expected = task.reduce("test", requests, np.array(totals), np.zeros(len(totals), np.int64))
    evaluation = Evaluator(model, tokenizer, task, split="test").evaluate()
    np.testing.assert_allclose(evaluation.losses, expected.losses, rtol=1e-4)
