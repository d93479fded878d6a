"""Where checkpoints lie: the full one found, links out of it seen, and a place for the smaller one checked."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub.errors

from moeopt.errors import ExportError
from moeopt.showing import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HTTP_ERROR: type[Exception] = huggingface_hub.errors.HTTPError  # type: ignore[attr-defined]
"""What huggingface_hub's library for HTTP raises; which one that is depends on the version."""
SOURCE = ".source.json"
"""Where in an exported folder it says where the full model lies on this machine; it is not pushed to the hub."""


def check_folder(out: Path) -> None:
    """Raise ExportError unless a checkpoint can be written to `out`: new or empty, in a writable folder."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{str(out)!r} is a file; give a folder to write the checkpoint to")
    if out.is_dir() and any(out.iterdir()):
        raise ExportError(f"{str(out)!r} is not empty; give a new or empty folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise ExportError(f"cannot write to {str(out.parent)!r}: {error.strerror or error}") from None


def locate(model: PreTrainedModel | str | Path, revision: str | None = None) -> Path:
    """The checkpoint folder of a model, from the hub's cache or the hub where it is no folder here.

    Of the hub it is the revision that is given, else that which a model was loaded from, else the main one.

    Raises:
        ExportError: when there is none.
    """
    name = str(model if isinstance(model, (str, Path)) else getattr(model.config, "_name_or_path", "") or "")
    if not name:
        raise ExportError("the model was not loaded from a checkpoint, and export reads one: save it and load it first")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    revision = revision or getattr(model, "moeopt_revision", None)
    left = ["*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack"]
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=left))
    except (HTTP_ERROR, OSError, ValueError) as error:
        raise ExportError(f"no folder {name!r} is here, and the hub does not give it: {first_line(error)}") from None


def inside(file: Path, folder: Path) -> bool:
    """Whether a file of a checkpoint folder is no link, or one that stays in it or, in the hub's cache, in its
    repository."""
    real, root = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    if real.is_relative_to(root):
        return True
    repository = root.parents[1] if len(root.parents) > 1 else root
    cached = root.parent.name == "snapshots" and repository.name.startswith("models--")
    return cached and real.parent == Path(os.path.realpath(repository / "blobs"))


def check_inside(file: Path) -> None:
    """Raise ExportError where a file that export needs is a link out of its checkpoint."""
    if not inside(file, file.parent):
        raise ExportError(
            f"{str(file)!r} is a link out of the checkpoint, to {os.path.realpath(file)!r}, which export does not "
            "follow; put the file itself there"
        )


def real(folder: Path, name: str) -> Path:
    """A file of the checkpoint without links, so that none is followed that was put there after the check."""
    return Path(os.path.realpath(folder / name))
