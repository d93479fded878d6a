"""What studies recorded of tasks that were moeopt's own before they were those of lm-evaluation-harness: still scored.

Losses, choices and accuracies are as they were; of the metrics that were published besides, none is left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moeopt.tasks import answers
from moeopt.tasks.answers import Judge, References
from moeopt.tasks.base import Example
from moeopt.tasks.multiple_choice import MultipleChoiceTask

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


@dataclass(frozen=True, kw_only=True)
class FormerExample(Example):
    """An example whose options all end in `rest`, which alone is scored, or of which several are `right`."""

    rest: str = ""
    right: tuple[int, ...] = ()


class FormerTask(MultipleChoiceTask):
    """Multiple choice of such examples."""

    def parts(self, example: Example) -> tuple[Example, ...]:
        if not isinstance(example, FormerExample) or not example.rest:
            return (example,)
        names = [option.removesuffix(example.rest) for option in example.options]
        return tuple(Example(example.id, example.prompt + name, (example.rest,), 0) for name in names)

    def right(self, example: Example) -> tuple[int, ...]:
        return (isinstance(example, FormerExample) and example.right) or (example.answer,)


class FormerRecordTask(FormerTask):
    """ReCoRD, whose accuracy was called EM."""

    metric = "em"


def _drop(place: int, listed: bool) -> Judge:
    """DROP's official exact match (0) or F1 (1), of the text as one span, or `listed`: cut where the answer is."""

    def judge(text: str, references: References) -> float:
        from lm_eval.tasks.drop.utils import get_metrics

        def spans(wanted: Sequence[str]) -> Sequence[str]:
            return text.split(", ") if listed and len(wanted) > 1 else (text,)

        return max(float(get_metrics(spans(wanted), wanted)[place]) for wanted in references)

    return judge


def _flexible(text: str, references: References) -> float:
    numbers = _FLEXIBLE.findall(text)
    return _same_number(numbers[-1] if numbers else None, references)


def _strict(text: str, references: References) -> float:
    match = _STRICT.search(text)
    return _same_number(match[1] if match else None, references)


def _same_number(number: str | None, references: References) -> float:
    return float(number is not None and any(_digits(number) == _digits(parts[0]) for parts in references))


def _digits(number: str) -> str:
    return re.sub(r"\.$", "", number.replace(",", "").replace("$", ""))


def _math(text: str, references: References) -> float:
    from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed

    boxed, first, last = last_boxed_only_string(text), text.find("$"), text.rfind("$")
    said = remove_boxed(boxed) if boxed else text[first + 1 : last] if first < last else text
    return float(any(is_equiv(said, parts[0]) for parts in references))


JUDGES: dict[str, Judge] = {
    "drop.f1": _drop(1, False),
    "drop.exact_match": _drop(0, False),
    "drop.f1_list": _drop(1, True),
    "drop.exact_match_list": _drop(0, True),
    "gsm8k.flexible_extract": _flexible,
    "gsm8k.strict_match": _strict,
    "math.exact_match": _math,
    "squad.contains": answers.contains,
}
KINDS: dict[str, type[FormerTask]] = {
    **dict.fromkeys(("cb", "mmlu", "multirc", "winogrande"), FormerTask),
    "record": FormerRecordTask,
}
FIELDS = ("rest", "right")
"""What such an example has beside those of `Example`; the others that there were are left out."""
EXAMPLES = ("answer", "blank", "query", "question")
