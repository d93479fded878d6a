"""The record that a study keeps of its latest selection (`moeopt.results.selection`): its form, checked where it is
read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moeopt.showing import line, shown
from moeopt.trials.description import COUNT, FLAG, NUMBER, TEXT, Maybe, check, check_depth, check_format, reading

if TYPE_CHECKING:
    import optuna

SELECTION = "selection"
"""User attribute of a study: `Selection.record` of its latest selection."""
FULL, WINNER, SEARCH_BEST = "full", "winner", "search_best"
INTERVAL = {"mean": NUMBER, "low": NUMBER, "high": NUMBER}
SPLIT = {"count": COUNT, "of": TEXT}
HEALTH = {"plan": TEXT, "of": TEXT, "told": TEXT, "verdict": TEXT}
RECORD = {
    "metric": TEXT, "settings": {"stock_only": FLAG}, "examples": {TEXT: SPLIT},
    "candidates": {
        "trial": [COUNT], "search_loss": [NUMBER], "dev_loss": [Maybe(NUMBER)],
        "bytes": Maybe([Maybe(NUMBER)]),
    },
    WINNER: COUNT, SEARCH_BEST: COUNT, "plans": {TEXT: TEXT},
    "scores": {split: {TEXT: {TEXT: NUMBER}} for split in ("search", "dev", "test")},
    "test_minus": {TEXT: {TEXT: INTERVAL}}, "verdict": TEXT, "sentences": [TEXT], "warnings": [TEXT], "looks": COUNT,
    "good": Maybe(FLAG), "health": Maybe(HEALTH),
}  # fmt: skip
"""Form of `Selection.record`, as far as it is read again."""


def recorded(study: optuna.Study) -> dict[str, Any] | None:
    """`Selection.record` of the study's latest selection; None where there was none.

    Raises:
        StudyError: when a newer moeopt wrote it, or it is of another form.
    """
    with reading(study.study_name):
        record = study.user_attrs.get(SELECTION)
    if record is None:
        return None
    where = f"study {shown(study.study_name)}: its attribute {SELECTION!r}"
    check(record, {}, where)
    check_format(record, where, record.get("moeopt"))
    check_depth(record, where)
    check(record, {WINNER: COUNT}, where)
    return dict(record)


def check_record(record: Mapping[str, Any], where: str = SELECTION) -> None:
    """Raise StudyError, naming the place, unless a record is of the form that `Selection.record` has."""
    check(record, RECORD, where)
    check(record["examples"].get("test"), SPLIT, f"{where}.examples.test")
    scores = f"dev_{record['metric']}"
    check(record["candidates"].get(scores), [Maybe(NUMBER)], f"{where}.candidates.{line(scores, 40)}")


def check_scores(record: Mapping[str, Any], where: str = SELECTION) -> None:
    """`check_record`, and that it has the loss and the metric of the winner and the full model on every split."""
    check_record(record, where)
    for name in ("loss", record["metric"]):
        for split, by_plan in record["scores"].items():
            for plan in (FULL, WINNER):
                value = by_plan.get(plan, {}).get(name)
                check(value, NUMBER, f"{where}.scores.{line(split, 40)}.{plan}.{line(name, 40)}")
        check(record["test_minus"].get(FULL, {}).get(name), INTERVAL, f"{where}.test_minus.{FULL}.{line(name, 40)}")
