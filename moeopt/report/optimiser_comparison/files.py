"""A comparison as files: optimisers.csv, studies.csv, comparison.json and the page."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from moeopt.errors import ExportError
from moeopt.files import csv_text, write_atomically
from moeopt.report.optimiser_comparison.page import page
from moeopt.report.optimiser_comparison.record import record
from moeopt.results.optimiser_comparison import Comparison

PAGE = "index.html"


def save(c: Comparison, folder: str | Path) -> Path | None:
    """Write optimisers.csv, studies.csv, comparison.json and, where plotly is installed, index.html, the page.

    Returns:
        Where the page is; None without plotly.

    Raises:
        ExportError: when the folder cannot be written.
    """
    folder, numbers = Path(folder), record(c)
    texts = {f"{name}.csv": csv_text(numbers[name], numbers[name][0]) for name in ("optimisers", "studies")}
    texts["comparison.json"] = json.dumps(numbers, indent=2) + "\n"
    if find_spec("plotly") is not None:
        texts[PAGE] = page(c)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomically(folder / name, text.encode("utf-8", "replace"))
    except OSError as error:
        raise ExportError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from None
    return folder / PAGE if PAGE in texts else None
