from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moeopt.demo import DEFAULT_SKILL, MODEL, SKILLS, rows
from moeopt.demo.skills import SPLITS, TEXT

FLOORS = {"add": 0.45, "sort": 0.9, "caesar": 0.9, "dates": 0.36, "roman": 0.75}
GENERATED = [skill for skill in SKILLS if skill != "text"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Iterator[PreTrainedModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(MODEL)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("skill", GENERATED)
def test_no_question_is_in_two_splits(skill: str) -> None:
    asked = [{row["prompt"] for row in rows(skill, split, 250)} for split in SPLITS]
    assert all(len(questions) == 250 for questions in asked)
    assert len(set.union(*asked)) == sum(map(len, asked))


def test_no_paragraph_of_held_out_text_was_trained_on() -> None:
    train = " ".join("\n".join(rows("text", "train")).split())
    for split in SPLITS[1:]:
        parts = [" ".join(part.split()) for text in rows("text", split) for part in text.split("\n\n")]
        parts = [part for part in parts if len(part) > 60]
        assert sum(map(len, parts)) > 5000
        assert not [part for part in parts if part in train]


@pytest.mark.parametrize("skill", GENERATED)
@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_multiple_choice_and_reproducible(skill: str, split: str) -> None:
    table = rows(skill, split, 100)
    assert table == rows(skill, split, 150)[:100]
    assert len({row["id"] for row in table}) == 100
    for row in table:
        assert len(set(row["options"])) == 4
        assert 0 <= row["answer"] < 4
    counts = [sum(row["answer"] == place for row in table) for place in range(4)]
    assert min(counts) >= 10, "the right answer's place must not give it away"


@pytest.mark.parametrize(
    ("skill", "check"),
    [
        ("add", lambda asked, answer: eval(asked) == int(answer)),
        ("sort", lambda asked, answer: "".join(sorted(asked)) == answer),
        ("caesar", lambda asked, answer: _decipher(answer, int(asked.split(">")[1])) == asked.split(">")[0]),
        ("roman", lambda asked, answer: int(asked) == _value(answer)),
    ],
)
def test_right_answers_are_right_and_wrong_ones_wrong(skill: str, check: object) -> None:
    for row in rows(skill, "test", 100):
        asked = row["prompt"].removeprefix(f"{skill} ").removesuffix("=")
        assert [check(asked, option) for option in row["options"]].index(True) == row["answer"]  # type: ignore[operator]
        assert sum(check(asked, option) for option in row["options"]) == 1  # type: ignore[operator]


def test_dates_known_answers() -> None:
    answers = {row["prompt"]: row["options"][row["answer"]] for s in SPLITS for row in rows("dates", s, 400)}
    lengths = {"Jan": 31, "Feb": 28, "Mar": 31, "Apr": 30, "May": 31, "Jun": 30}
    lengths |= {"Jul": 31, "Aug": 31, "Sep": 30, "Oct": 31, "Nov": 30, "Dec": 31}
    days = {month: sum(list(lengths.values())[:place]) for place, month in enumerate(lengths)}
    for prompt, answer in answers.items():
        start, step = prompt.removeprefix("dates ").removesuffix("=").split("+")
        day, month = start.split()
        then, later = answer.split()
        assert (days[month] + int(day) + int(step) - days[later] - int(then)) % 365 == 0


def test_bad_requests_name_the_value() -> None:
    with pytest.raises(ValueError, match="'juggle'"):
        rows("juggle", "train")
    with pytest.raises(ValueError, match="'validation'"):
        rows("add", "validation")
    with pytest.raises(ValueError, match="-1"):
        rows("add", "train", -1)


def test_the_checkpoint_is_a_small_stock_mixtral_that_transformers_4_and_5_read_alike(model: PreTrainedModel) -> None:
    assert sum(path.stat().st_size for path in MODEL.glob("*.safetensors")) <= 8_000_000
    assert TEXT.stat().st_size <= 300_000
    assert DEFAULT_SKILL in SKILLS
    written = json.loads((MODEL / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10_000.0
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert json.loads((MODEL / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    width = model.config.head_dim
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, 10_000.0 ** (-torch.arange(0, width, 2) / width))
    assert type(model).__name__ == "MixtralForCausalLM"
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (8, 2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    if not any(special in text for special in tokenizer.all_special_tokens):
        assert len(ids) == len(text.encode())


def test_special_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    config = model.config
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == config.vocab_size == 259
    batch = tokenizer(["a", "bcd"], padding=True)
    assert batch.input_ids[0].count(0) == 2
    assert batch.attention_mask[0].count(0) == 2


@pytest.mark.slow
@pytest.mark.parametrize("skill", GENERATED)
def test_model_has_the_skill(skill: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    table = rows(skill, "dev", 200)
    chosen = _choices(model, tokenizer, table)
    right = sum(choice == row["answer"] for choice, row in zip(chosen, table, strict=True))
    assert right / len(table) >= FLOORS[skill], "chance is 0.25 +- 0.03"


def test_model_reads_unseen_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = torch.tensor(tokenizer("".join(rows("text", "test"))).input_ids[: 16 * 256]).view(16, 256)
    with torch.no_grad():
        nats_per_byte = model(input_ids=ids, labels=ids).loss.item()
    assert nats_per_byte < 1.8, "a uniform guess costs 5.56, single-byte frequencies about 3.1"


def _choices(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: list[dict[str, Any]]) -> list[int]:
    """Of every row the option with the lowest mean negative log-likelihood per token."""
    texts = [row["prompt"] + option for row in table for option in row["options"]]
    asked = torch.tensor([len(row["prompt"]) for row in table for _ in row["options"]])
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        logp = model(**batch).logits[:, :-1].log_softmax(-1)
    nll = -logp.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    place = torch.arange(1, batch.input_ids.shape[1])
    scored = (place >= asked[:, None]) & batch.attention_mask[:, 1:].bool()
    return ((nll * scored).sum(-1) / scored.sum(-1)).view(-1, 4).argmin(-1).tolist()


def _decipher(text: str, shift: int) -> str:
    return "".join(chr((ord(letter) - 97 - shift) % 26 + 97) for letter in text)


def _value(numeral: str) -> int:
    worth = [dict(zip("IVXLCDM", (1, 5, 10, 50, 100, 500, 1000), strict=True))[letter] for letter in numeral]
    return sum(-a if a < b else a for a, b in zip(worth, [*worth[1:], 0], strict=True))
