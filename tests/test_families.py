"""docs/families.md: it names every MoE type of the installed transformers, and what it says of them is so."""

from __future__ import annotations

import re

import pytest
from families import PAGE, STEPS, page, run, tried
from tiny_families import moe_types

ROWS = dict(re.findall(r"^\| (\S+) \| \w+ \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def passed(row: str) -> dict[str, bool]:
    return {step: cell.strip() == "yes" for step, cell in zip(STEPS, row.split("|"))}


def test_the_page_names_every_moe_type_that_transformers_has() -> None:
    assert not set(moe_types()) - set(ROWS), "run python -m benchmarks.families --write"


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_vl_moe", "jetmoe", "doge"])
def test_a_row_says_what_the_steps_give(model_type: str) -> None:
    for step, reason in tried(model_type, ("attach", "identity", "load", "stock")).items():
        assert (reason is None) == passed(ROWS[model_type])[step], reason


@pytest.mark.slow
def test_rows_of_every_fourth_type_say_what_the_steps_give() -> None:
    """All of them take minutes: `python -m benchmarks.families` writes the page anew."""
    results = run(dict(sorted(moe_types().items())[::4]), 2)
    given = {model_type: {step: why is None for step, why in row.items()} for model_type, row in results.items()}
    assert given == {model_type: passed(ROWS[model_type]) for model_type in results}
    assert "ERROR" not in page(results)
