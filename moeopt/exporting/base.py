"""The full model as others may name it: its id on the hub, its licence, and its own model card."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from yaml import YAMLError  # type: ignore[import-untyped]

from moeopt.errors import ExportError
from moeopt.exporting.folders import inside
from moeopt.files import MALFORMED
from moeopt.showing import line

CARD, BASE_CARD = "README.md", "BASE_MODEL_CARD.md"
"""The card of a checkpoint, and that of the full model beside it."""
LICENCE_KEYS = ("license", "license_name", "license_link")
_LICENCE_FILE = re.compile(r"licen[cs]e(\.(txt|md))?", re.IGNORECASE)
_LONGEST_CARD = 1 << 20
"""Bytes of a card; nothing longer is read."""


@dataclass(frozen=True)
class Base:
    """What is known of the full model.

    Args:
        name: for people: its id on the hub, else the name of its folder.
        hub_id: the former alone; None where nothing says it.
        revision: the commit of the hub that was read; None where it is not known.
        licence: fields of a card's metadata; empty where it is not known.
        licence_from: the file that says so.
        card: its own card.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    licence: dict[str, str] = field(default_factory=dict)
    licence_from: str | None = None
    card: Path | None = None


def check_base(base_model: str | None) -> None:
    """Raise ExportError unless it may be the id of a model on the hub, or None."""
    try:
        if base_model is not None:
            validate_repo_id(base_model)
    except (HFValidationError, TypeError):
        raise ExportError(f"base_model must be the id of a model on the hub, as org/name, got {base_model!r}") from None


def base_of(folder: Path, base_model: str | None = None) -> Base:
    """What the files of a checkpoint say of it, and, in the hub's cache, where it lies.

    Args:
        folder: the checkpoint.
        base_model: its id on the hub, where the user knows it.
    """
    place = folder.resolve()
    hub_id, revision = base_model, None
    repository = place.parents[1].name if place.parent.name == "snapshots" else ""
    if repository.startswith("models--"):
        cached = repository.removeprefix("models--").replace("--", "/", 1)
        revision = place.name if base_model in (None, cached) else None
        hub_id = base_model or cached
    card = folder / CARD
    own = card if card.is_file() and inside(card, folder) and card.stat().st_size <= _LONGEST_CARD else None
    licence, licence_from = _licence(own), CARD
    if not licence:
        files = [file for file in sorted(folder.iterdir()) if _LICENCE_FILE.fullmatch(file.name) and file.is_file()]
        licence_from = files[0].name if files else ""
        if files:  # of what it grants a person may judge
            licence = {"license": "other", "license_name": "license-of-the-base-model", "license_link": licence_from}
    return Base(hub_id or line(place.name), hub_id, revision, licence, licence_from or None, own)


def _licence(card: Path | None) -> dict[str, str]:
    """The licence that a card's metadata name; none where they cannot be read."""
    try:
        data: Any = metadata_load(card) if card is not None else None
        told = {key: (data or {}).get(key) for key in LICENCE_KEYS}
    except (OSError, YAMLError, *MALFORMED):
        return {}
    if isinstance(told["license"], list) and len(told["license"]) == 1:
        told["license"] = told["license"][0]
    named = {key: line(value) for key, value in told.items() if isinstance(value, str) and value}
    return named if "license" in named else {}
