"""The demo model's skills as tasks."""

from __future__ import annotations

from moeopt.demo.skills import SKILLS, rows
from moeopt.errors import TaskError, nearest
from moeopt.tasks import MultipleChoiceTask, TextTask
from moeopt.tasks.base import SPLITS, Example, Task


def skill_task(skill: str) -> Task:
    """A task for one skill of the demo model: its search, dev and test examples, none in two of them.

    Raises:
        TaskError: when there is no such skill.
    """
    if skill not in SKILLS:
        raise TaskError(f"unknown demo skill {skill!r}{nearest(skill, list(SKILLS))} (there are {', '.join(SKILLS)})")
    if skill == "text":
        return TextTask("demo:text", *map(_documents, SPLITS))
    return MultipleChoiceTask(f"demo:{skill}", *(_questions(skill, split) for split in SPLITS))


def _documents(split: str) -> list[str]:
    return [document for document in rows("text", split) if isinstance(document, str)]


def _questions(skill: str, split: str) -> list[Example]:
    table = [row for row in rows(skill, split) if isinstance(row, dict)]
    return [Example(row["id"], row["prompt"], tuple(row["options"]), row["answer"]) for row in table]
