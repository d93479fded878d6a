r"""MATH (Hendrycks et al. 2021, arXiv 2103.03874): competition problems with worked solutions, in seven subjects.

    {"problem": "Let \\[f(x) = ...\\] Find $a+b$ if the piecewise function is continuous.", "level": "Level 5",
     "type": "Algebra", "solution": "For the piecewise function to be continuous, ... So $a+b=-3+3=\\boxed{0}$."}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `hendrycks_math`; up to "Problem:"):

    Problem: Let \[f(x) = ...\] Find $a+b$ if the piecewise function is continuous.
    Answer: 0

and with `template="minerva"` (Lewkowycz et al. 2022, arXiv 2206.14858; the harness's `minerva_math`, without its four
examples):

    Problem:
    Let \[f(x) = ...\] Find $a+b$ if the piecewise function is continuous.

    Solution: For the piecewise function to be continuous, ... So $a+b=-3+3=\boxed{0}$.

Reported is exact match after the paper's normalisation (spacing, units, degrees, \dfrac, 1/2 and \frac12 and 0.5, ...)
of what the text says the answer is: its last \boxed{...}; without one, what lies between its first and its last dollar
sign; without two, all of it. The loss is that of what is shown above: the answer, with "minerva" the whole solution.
EEP has no prompt for MATH.
"""

from __future__ import annotations

import re
from pathlib import Path

from moeopt.errors import TaskError
from moeopt.tasks.answers import References
from moeopt.tasks.base import Example
from moeopt.tasks.rows import Data, Row, is_missing_file, load
from moeopt.tasks.written import Rows, Template, WrittenBenchmark

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def harness(row: Row) -> Example:
    answer = _boxed_in(row)
    return Example(
        _id(row), f"Problem: {row.text('problem')}\nAnswer:", (f" {answer}",), 0, row.text("problem"), ((answer,),)
    )


def minerva(row: Row) -> Example:
    prompt, solution = f"Problem:\n{row.text('problem')}\n\nSolution:", row.text("solution")
    return Example(_id(row), prompt, (f" {solution}",), 0, row.text("problem"), ((_boxed_in(row),),))


def exact_match(text: str, references: References) -> float:
    """Whether the text's answer is the right one, once both are normalised."""
    found = normalised(extracted(text))
    return float(any(found == normalised(parts[0]) for parts in references))


def extracted(text: str) -> str:
    """What a text says the answer is."""
    found = last_boxed(text)
    if found is not None:
        return found
    first, last = text.find("$"), text.rfind("$")
    return text[first + 1 : last] if first < last else text


def last_boxed(text: str) -> str | None:
    r"""What is in the last \boxed{...} (or \fbox{...}), or follows the last "\boxed " up to a dollar sign."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    body = text[start:].partition("box")[2].removeprefix("ed")
    if body.startswith(" "):
        return body.partition("$")[0].strip()
    depth = 0
    for i, character in enumerate(body):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return body[1:i] if i else None
    return None


_REMOVED = ("\n", "\\!")
_REPLACED = (
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_BARE_SQRT = re.compile(r"\\sqrt(?!\{)(.)")
_BARE_FRAC = re.compile(r"\\frac([^{])(.)")
_SLASH = re.compile(r"(-?\d+)/(-?\d+)")


def normalised(answer: str) -> str:
    r"""An answer as the paper's `is_equiv` compares it.

    Without spaces, \left and \right, degrees, percent and dollar signs, and what follows "\text{ " (a unit); "x = 5" is
    5, .5 is 0.5 and 1/2 is \frac{1}{2}.
    """
    for old in _REMOVED:
        answer = answer.replace(old, "")
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    answer = answer.partition("\\text{ ")[0].replace("\\%", "")
    answer = answer.replace(" .", " 0.").replace("{.", "{0.")
    answer = f"0{answer}" if answer.startswith(".") else answer
    name, equals, value = answer.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        answer = value
    answer = _BARE_SQRT.sub(r"\\sqrt{\1}", answer).replace(" ", "")
    answer = _BARE_FRAC.sub(lambda m: f"\\frac{{{m[1]}}}" + (m[2] if m[2] == "{" else f"{{{m[2]}}}"), answer)
    if answer == "0.5":
        return "\\frac{1}{2}"
    slash = _SLASH.fullmatch(answer)
    return f"\\frac{{{int(slash[1])}}}{{{int(slash[2])}}}" if slash else answer


JUDGES = {"exact_match": exact_match}
TEMPLATES = {
    "harness": Template(harness, JUDGES, ("Problem:",), 256),
    "minerva": Template(minerva, JUDGES, ("Problem:",), 256),
}


def rows_of(data: Data, config: str | None, template: str) -> Rows:
    """Those of a subject of the hub data set, such as "algebra"; with None, of all seven of any "hendrycks_math"."""
    local = Path(data).exists() or is_missing_file(data)
    all_subjects = config is None and not local and str(data).endswith("hendrycks_math")
    own: Rows = {}
    for subject in SUBJECTS if all_subjects else (config,):
        for split, rows in load(data, subject).items():
            where = f"{subject}: " if all_subjects else ""
            own.setdefault(split, []).extend(Row(where + row.where, row.values) for row in rows)
    return own


math_task = WrittenBenchmark(
    "math",
    hub="EleutherAI/hendrycks_math",
    templates=TEMPLATES,
    labels=("solution",),
    rows=rows_of,
)


def _id(row: Row) -> str:
    return str(row.values.get("unique_id", row.where))


def _boxed_in(row: Row) -> str:
    answer = last_boxed(row.text("solution"))
    if not answer:
        raise TaskError(f"{row.where}: 'solution' has no \\boxed{{answer}}")
    return answer
