"""docs/families.md: it names every MoE type of the installed transformers, and what it says of them is so."""

from __future__ import annotations

import re

import pytest
from families import PAGE, STEPS, page, run, tried
from tiny_families import moe_types

ROWS = dict(re.findall(r"^\| (\S+) \| \w+ \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def passed(row: str) -> list[bool]:
    return [cell.strip() == "yes" for cell in row.split("|")]


def test_the_page_names_every_moe_type_that_transformers_has() -> None:
    assert not set(moe_types()) - set(ROWS), "run python -m benchmarks.families --write"


@pytest.mark.parametrize("model_type", ["mixtral", "jetmoe"])
def test_a_row_says_what_the_steps_give(model_type: str) -> None:
    assert [reason is None for reason in tried(model_type).values()] == passed(ROWS[model_type])


@pytest.mark.slow
def test_every_row_says_what_the_steps_give() -> None:
    results = run(moe_types(), 2)
    wrong = {
        model_type: [step for step, said in zip(STEPS, passed(ROWS[model_type])) if (row[step] is None) != said]
        for model_type, row in results.items()
    }
    assert not {model_type: steps for model_type, steps in wrong.items() if steps}
    assert page(results).count("ERROR") == 0
