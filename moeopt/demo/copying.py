"""The shipped model and its skills as files, such as a user would have of a model and tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from moeopt.demo.skills import MODEL, SKILLS, rows
from moeopt.exporting.folders import check_folder
from moeopt.exporting.writing import appearing
from moeopt.tasks.base import SPLITS

ROWS = 300
"""Of each split of a skill; all documents of text."""


def copy(folder: str | Path) -> list[str]:
    """Write the shipped checkpoint, and what the demo's skills ask of it, to a new or empty folder.

    ``FOLDER/model`` is the checkpoint, ``FOLDER/SKILL.jsonl`` the rows of each skill (task ``multiple_choice``), and
    ``FOLDER/text`` a file for each document of the skill ``text`` (task ``text``). None of them was trained on.

    Returns:
        A line on each of these: where it is and what it holds.

    Raises:
        ExportError: when the folder is not empty, or cannot be written to.
    """
    out = Path(folder)
    check_folder(out)
    lines = [f"{out / 'model'}: the shipped Mixtral of 6 layers and 8 experts"]
    with appearing(out) as place:
        shutil.copytree(MODEL, place / "model")
        for skill in SKILLS:
            examples = [row for split in SPLITS for row in rows(skill, split, None if skill == "text" else ROWS)]
            if skill == "text":
                (place / skill).mkdir()
                for number, document in enumerate(examples):
                    (place / skill / f"{number:03d}.txt").write_text(document, encoding="utf-8")
                lines.append(f"{out / skill}/: {len(examples)} documents for --task text")
            else:
                table = "".join(json.dumps(row) + "\n" for row in examples)
                (place / f"{skill}.jsonl").write_text(table, encoding="utf-8")
                lines.append(f"{out / skill}.jsonl: {len(examples):,} rows for --task multiple_choice")
    return lines
