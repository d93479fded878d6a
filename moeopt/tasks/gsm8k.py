r"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): word problems of grade school, with worked solutions.

    {"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. ...",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold ... = <<48+24=72>>72 clips ...\n#### 72"}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `gsm8k`, without its five examples; up to "Question:"):

    Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. ...
    Answer: Natalia sold 48/2 = <<48/2=24>>24 clips in May.
    Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.
    #### 72

and with `template="eep"` (the prompt of EEP, arXiv 2407.00945, there in a chat: four worked examples, then)

    Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. ...
    Let's think step by step
    Answer:
    Natalia sold 48/2 = 24 clips in May.
    Natalia sold 48+24 = 72 clips altogether in April and May.
    The answer is 72

Reported is `flexible_extract`: the last number of the text is the right one. `strict_match` wants it behind "####",
which a model writes only after it saw examples. Both are the harness's: numbers are compared as texts, without
thousands separators, dollar signs and a final full stop.

The loss is that of the whole reference solution, rationale and answer: a number alone says little of a model that
would first work it out.
"""

from __future__ import annotations

import re

from moeopt.errors import TaskError
from moeopt.tasks.answers import References
from moeopt.tasks.base import Example
from moeopt.tasks.gsm8k_examples import EEP_EXAMPLES
from moeopt.tasks.rows import Data, Row, load
from moeopt.tasks.written import Rows, Template, WrittenBenchmark

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_ANNOTATION = re.compile(r"<<.*?>>")


def harness(row: Row) -> Example:
    solution, result = _solved(row)
    prompt = f"Question: {row.text('question')}\nAnswer:"
    return Example(
        str(row.values.get("id", row.where)), prompt, (f" {solution}",), 0, row.text("question"), ((result,),)
    )


def eep(row: Row) -> Example:
    solution, result = _solved(row)
    rationale = _ANNOTATION.sub("", solution).rpartition("####")[0].rstrip()
    examples = "".join(f"{_asked(question)}\n{answered}\n" for question, answered in EEP_EXAMPLES)
    prompt = examples + _asked(row.text("question"))
    option = f"\n{rationale}\nThe answer is {result}"
    return Example(str(row.values.get("id", row.where)), prompt, (option,), 0, row.text("question"), ((result,),))


def strict_match(text: str, references: References) -> float:
    """The first number behind "####" is right."""
    match = _STRICT.search(text)
    return _right(match[1] if match else None, references)


def flexible_extract(text: str, references: References) -> float:
    """The last number of the text is right."""
    found = _FLEXIBLE.findall(text)
    return _right(found[-1] if found else None, references)


TEMPLATES = {
    "harness": Template(
        harness, {"flexible_extract": flexible_extract, "strict_match": strict_match}, ("Question:",), 256
    ),
    "eep": Template(eep, {"flexible_extract": flexible_extract}, ("\n\n", "Question:"), 150),
}


def rows_of(data: Data, config: str | None, template: str) -> Rows:
    """Those of the configuration "main" of any "gsm8k" of the hub, unless another is asked for."""
    return load(data, "main" if config is None and str(data).endswith("gsm8k") else config)


gsm8k_task = WrittenBenchmark(
    "gsm8k",
    hub="openai/gsm8k",
    templates=TEMPLATES,
    labels=("answer",),
    rows=rows_of,
)


def _asked(question: str) -> str:
    return f"Question: {question}\nLet's think step by step\nAnswer:"


def _solved(row: Row) -> tuple[str, str]:
    """The worked solution, and the number that it ends in."""
    solution = row.text("answer")
    match = _STRICT.search(solution)
    if match is None:
        raise TaskError(f"{row.where}: 'answer' must end in '#### ' and a number, got {solution[-60:]!r}")
    return solution, _clean(match[1])


def _right(found: str | None, references: References) -> float:
    return float(found is not None and any(_clean(found) == _clean(parts[0]) for parts in references))


def _clean(number: str) -> str:
    return re.sub(r"\.$", "", number.replace(",", "").replace("$", ""))
