"""SQuAD v1.1 (Rajpurkar et al. 2016, arXiv 1606.05250): questions whose answer is a span of a passage.

    {"id": "5733be284776f41900661182", "title": "University_of_Notre_Dame",
     "context": "Architecturally, the school has a Catholic character. Atop the Main Building's gold dome is ...",
     "question": "To whom did the Virgin Mary allegedly appear in 1858 in Lourdes France?",
     "answers": {"text": ["Saint Bernadette Soubirous"], "answer_start": [515]}}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `squadv2`, which has the prompt for SQuAD 2.0 only; up to
a line break):

    Title: University_of_Notre_Dame

    Background: Architecturally, the school has a Catholic character. Atop the Main Building's gold dome is ...

    Question: To whom did the Virgin Mary allegedly appear in 1858 in Lourdes France?

    Answer: Saint Bernadette Soubirous

and with `template="eep"` (the prompt of EEP, arXiv 2407.00945, there in a chat, and on SQuAD 2.0):

    Architecturally, the school has a Catholic character. Atop the Main Building's gold dome is ...
    According to the above passage, answer the following question. If it is impossible to answer according to the
    passage, answer `impossible to answer`:
    Question: To whom did the Virgin Mary allegedly appear in 1858 in Lourdes France?
    Answer: Saint Bernadette Soubirous

(its second and third line are one). Reported are F1 and exact match by the official rules, the best over the accepted
answers; with "eep" first `contains`, which is what EEP reports: whether an accepted answer occurs in the first sentence
or clause of the text. The loss is that of the first accepted answer.

Rows of SQuAD 2.0 ("rajpurkar/squad_v2") are read, too; where there is no answer, "unanswerable" (harness) or
"impossible to answer" (eep) is the one accepted. The official script of SQuAD 2.0 would want an empty text there.
"""

from __future__ import annotations

import re

from moeopt.errors import TaskError
from moeopt.tasks.answers import References, exact_match, f1, normalised
from moeopt.tasks.base import Example
from moeopt.tasks.rows import Row
from moeopt.tasks.written import Template, WrittenBenchmark

_IMPOSSIBLE = (
    "According to the above passage, answer the following question. If it is impossible to answer according to the "
    "passage, answer `impossible to answer`:"
)


def harness(row: Row) -> Example:
    title, question = row.text("title"), row.text("question")
    prompt = f"Title: {title}\n\nBackground: {row.text('context')}\n\nQuestion: {question}\n\nAnswer:"
    return _example(row, prompt, "unanswerable")


def eep(row: Row) -> Example:
    prompt = f"{row.text('context')}\n{_IMPOSSIBLE}\nQuestion: {row.text('question')}\nAnswer:"
    return _example(row, prompt, "impossible to answer")


def contains(text: str, references: References) -> float:
    """EEP's rule: an accepted answer occurs in the text up to its first line break, full stop or comma."""
    said = text.split("\n")[0].lower().split("answer is")[-1]
    said = normalised(re.split(r"[.,]", said)[0])
    return float(any(normalised(parts[0]) in said for parts in references))


JUDGES = {"f1": f1, "exact_match": exact_match}
TEMPLATES = {
    "harness": Template(harness, JUDGES, ("\n",), 50),
    "eep": Template(eep, {"contains": contains, **JUDGES}, ("\n",), 50),
}


squad_task = WrittenBenchmark("squad", hub="rajpurkar/squad", templates=TEMPLATES, labels=("answers",))


def _example(row: Row, prompt: str, impossible: str) -> Example:
    answers = row["answers"]
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TaskError(f"{row.where}: 'answers' must be {{'text': [...], 'answer_start': [...]}}, got {answers!r}")
    options = tuple(dict.fromkeys(f" {text}" for text in texts if text.strip())) or (f" {impossible}",)
    return Example(str(row.values.get("id", row.where)), prompt, options, 0, group=row.text("context"))
