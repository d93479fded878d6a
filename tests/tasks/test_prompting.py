"""Shots and chat templates: the exact prompt, its tokens, and that nothing shown is scored."""

from __future__ import annotations

import json
import warnings

import pytest
from rows_of import CHATML, chatting, write

from moeopt import tasks
from moeopt.errors import TaskError
from moeopt.tasks import SPLITS, Example, MultipleChoiceTask
from moeopt.tasks.splits import content_hash

PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
DROPS_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
MIXTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}(no thought)\n{% endif %}{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def question(i: int, group: str | None = None) -> Example:
    return Example(str(i), f"q{i}:", (" no", " maybe"), i % 2, group)


def make(search: int = 12, test: int = 4) -> MultipleChoiceTask:
    return MultipleChoiceTask("t", map(question, range(search)), (), map(question, range(100, 100 + test)))


def shots_of(task: tasks.Task, prompted: tasks.Task) -> list[Example]:
    left = set(prompted.examples("search"))
    return [example for example in task.examples("search") if example not in left]


def test_shots_stand_before_every_prompt(tiny_tokenizer):
    task = make()
    prompted = task.prompted(shots=2)
    first, second = shots_of(task, prompted)
    shown = f"<s>{first.prompt}{first.options[first.answer]}\n\n{second.prompt}{second.options[second.answer]}\n\n"
    for split in ("search", "test"):
        examples = prompted.examples(split)
        requests = prompted.requests(split, tiny_tokenizer)
        assert len(requests) == 2 * len(examples)
        for request in requests:
            example = examples[request.example]
            assert tiny_tokenizer.decode(request.ids[: request.scored_from]) == shown + example.prompt
            assert tiny_tokenizer.decode(request.ids[request.scored_from :]) == example.options[request.option]
    other = task.prompted(shots=2, separator="|").requests("test", tiny_tokenizer, limit=1)[0]
    assert tiny_tokenizer.decode(other.ids).count("|") == 2


def test_shots_are_nested_and_leave_the_first_examples_where_they_are():
    task = make()
    more, fewer = task.prompted(shots=5), task.prompted(shots=2)
    assert shots_of(task, more)[-2:] == shots_of(task, fewer)
    assert task.examples("search")[:7] == more.examples("search")
    assert task.examples("test") == more.examples("test")
    reversed_file = MultipleChoiceTask("t", map(question, reversed(range(12))))
    assert shots_of(reversed_file, reversed_file.prompted(shots=5)) == shots_of(task, more)


def test_nothing_shown_is_scored_nor_anything_of_its_group():
    search = [question(i, f"g{i // 3}") for i in range(30)] + [question(4, "g1")]
    task = MultipleChoiceTask("t", search, (), [question(100, "g10"), question(101, "g11")])
    prompted = task.prompted(shots=4)
    left = {e.group for split in prompted.splits for e in prompted.examples(split)}
    shown = prompted._prompting.shots
    assert len(shown) == 4 == len({e.group for e in shown})
    assert not left & {e.group for e in shown}
    assert len(prompted.examples("search")) == 31 - 4 * 3
    hashes = {content_hash(e) for split in prompted.splits for e in prompted.examples(split)}
    assert not hashes & {content_hash(e) for e in shown}


@pytest.mark.parametrize(("examples", "shots", "most"), [(3, 3, 2), (3, 9, 2), (1, 1, 0)])
def test_too_few_examples(examples, shots, most):
    with pytest.raises(TaskError, match=f"cannot show {shots} shots.* {examples} examples give at most {most}"):
        make(examples).prompted(shots=shots)
    assert make(3).prompted(shots=2).examples("search")


@pytest.mark.filterwarnings("ignore:.*lost shots")
def test_too_long_loses_whole_shots_first_and_then_the_question(tiny_tokenizer):
    task = make().prompted(shots=3)
    shots = [shot.prompt + shot.options[shot.answer] for shot in task._prompting.shots]
    example = task.examples("test")[0]

    def prompt(length):
        request = task.requests("test", tiny_tokenizer, limit=1, max_length=length)[0]
        assert len(request.ids) + len(" maybe") - len(" no") <= length
        return tiny_tokenizer.decode(request.ids[: request.scored_from])

    full = "<s>" + "\n\n".join([*shots, example.prompt])
    needed = 1 + len("\n\n".join([*shots, example.prompt])) + len(" maybe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prompt(needed) == full
    for left in (2, 1, 0):
        with pytest.warns(UserWarning, match="1 of 1 prompts lost shots, the first ones, to fit"):
            assert prompt(needed - 1) == "<s>" + "\n\n".join([*shots[3 - left :], example.prompt])
        needed -= len(shots[2 - left]) + 2
    with pytest.warns(UserWarning, match="1 of 1 prompts were cut at their beginning"):
        assert prompt(needed - 2) == "<s>" + example.prompt[2:]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chat_tokens_are_those_of_the_whole_conversation(tiny_tokenizer, system):
    tokenizer = chatting(tiny_tokenizer)
    task = make().prompted(shots=2, chat=True, system=system)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for shot in task._prompting.shots:
        messages += [
            {"role": "user", "content": shot.prompt},
            {"role": "assistant", "content": shot.options[shot.answer].strip()},
        ]
    for request in task.requests("test", tokenizer):
        example = task.examples("test")[request.example]
        asked = [*messages, {"role": "user", "content": example.prompt}]
        reply = example.options[request.option].strip()
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": reply}], return_dict=False)
        assert list(request.ids[: request.scored_from]) == prompt
        assert list(request.ids) == whole[: len(request.ids)]
        assert whole[len(request.ids) :] == [tokenizer.eos_token_id]
        assert tokenizer.decode(request.ids[request.scored_from :]) == reply
        assert request.ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "prompt", "scored"),
    [
        (MIXTRAL, "<s> [INST] q100: [/INST]", " maybe"),
        (THINKING, "[user]q100:</s>[assistant](no thought)\n", "maybe"),
        (PLAIN, "<s>[user]q100:</s>[assistant]", "maybe"),
    ],
)
def test_what_a_template_puts_before_the_reply(tiny_tokenizer, template, prompt, scored):
    tokenizer = chatting(tiny_tokenizer, template)
    task = make(test=1).prompted(chat=True)
    request = task.requests("test", tokenizer)[1]
    assert tokenizer.decode(request.ids[: request.scored_from]) == prompt
    assert tokenizer.decode(request.ids[request.scored_from :]) == scored


@pytest.mark.filterwarnings("ignore:.*lost shots")
def test_too_long_chat_keeps_its_template(tiny_tokenizer):
    tokenizer = chatting(tiny_tokenizer)
    text = "abcdefghijklmnopqrstuvwxyz"
    task = MultipleChoiceTask("t", [question(1), question(2)], (), [Example("1", text, (" no", " yes"), 0)])
    task = task.prompted(shots=1, chat=True, system="S")
    whole = "<s>[system]S</s>[user]" + text + "</s>[assistant]"
    length = len(tokenizer(whole, add_special_tokens=False)["input_ids"]) + 3
    with pytest.warns(UserWarning, match="lost shots"):
        (request, _) = task.requests("test", tokenizer, max_length=length)
    assert tokenizer.decode(request.ids) == whole + "no"
    for fewer in (1, 7, 25):
        with pytest.warns(UserWarning, match="were cut at their beginning"):
            (_, request) = task.requests("test", tokenizer, max_length=length - fewer)
        assert tokenizer.decode(request.ids) == whole.replace(text, text[fewer:]) + "yes"
        assert len(request.ids) == length - fewer
    with pytest.raises(TaskError, match="example '1' has 3 tokens, which leaves no room"):
        task.requests("test", tokenizer, max_length=length - 26)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "task 't': the tokenizer has no chat template"),
        (NO_SYSTEM, "refuses system and user messages: System role not supported"),
        (DROPS_SYSTEM, "leaves the system message out"),
        ("{% broken", "chat template refuses"),
    ],
)
def test_tokenizer_that_cannot_chat(tiny_tokenizer, template, message):
    tokenizer = chatting(tiny_tokenizer, template)
    task = make().prompted(chat=True, system="Be brief.")
    for use in (lambda: task.check(tokenizer), lambda: task.requests("search", tokenizer)):
        with pytest.raises(TaskError, match=message):
            use()
    make().check(tokenizer)


def test_white_space_is_no_reply(tiny_tokenizer):
    task = MultipleChoiceTask("t", [Example("1", "q", (" ", "a"), 0)]).prompted(chat=True)
    with pytest.raises(TaskError, match="option ' ' is white space"):
        task.requests("search", chatting(tiny_tokenizer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": -1}, "shots must be an integer of at least 0, got -1"),
        ({"shots": True}, "shots must be an integer"),
        ({"shots": "5"}, "shots must be an integer of at least 0, got '5'"),
        ({"chat": "True"}, "chat must be true or false, got 'True'"),
        ({"system": "x"}, "a system message needs chat=True"),
        ({"chat": True, "system": " "}, "system must be a text, got ' '"),
        ({"separator": "\n"}, "a separator stands between shots"),
        ({"shots": 1, "chat": True, "separator": "\n"}, "a separator stands between shots"),
        ({"shots": 1, "separator": 3}, "separator must be a text, got 3"),
    ],
)
def test_bad_options_are_named_before_data_are_read(options, message):
    with pytest.raises(TaskError, match=message):
        tasks.get("multiple_choice", "nowhere.jsonl", **options)


def test_options_of_every_task(tmp_path):
    rows = [{"prompt": f"p{i}:", "options": [" a", " b"], "answer": i % 2} for i in range(60)]
    path = write(tmp_path / "b.jsonl", rows)
    plain = tasks.get("multiple_choice", path)
    task = tasks.get("multiple_choice", path, shots=3, chat=True, system="Be brief.")
    assert len(task.examples("search")) == len(plain.examples("search")) - 3
    facts = {key: value for key, value in task.describe()["prompting"].items() if key != "shown"}
    assert facts == {"shots": 3, "chat": True, "system": "Be brief."}
    assert "prompting" not in plain.describe()
    with pytest.raises(TaskError, match=r"no option 'shot'; did you mean 'shots'.*shots, chat, system, separator"):
        tasks.get("multiple_choice", path, shot=3)
    for option in ({"shots": 3}, {"chat": True}):
        with pytest.raises(TaskError, match="task 'text' has no option"):
            tasks.get("text", path, **option)
        with pytest.raises(TaskError, match="has no prompts of its own"):
            tasks.TextTask("mine", search=["a" * 50]).prompted(**option)
    with pytest.raises(TaskError, match="has shots or chat already"):
        task.prompted(shots=1)


def test_fingerprints_and_descriptions_differ_by_what_is_shown():
    task = make(40)
    options = [{"shots": 1}, {"shots": 2}, {"shots": 2, "separator": "\n"}, {"shots": 2, "chat": True}]
    options += [{"chat": True}, {"chat": True, "system": "x"}]
    made = [task, *(task.prompted(**how) for how in options)]
    for split in (*task.splits, None):
        assert len({prompted.fingerprint(split) for prompted in made}) == len(made)
    assert len({json.dumps(prompted.describe()) for prompted in made}) == len(made)
    assert task.prompted().fingerprint() == task.fingerprint()
    assert set(task.splits) <= set(SPLITS)
