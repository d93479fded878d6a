"""Which file of a data folder is which split, told by names as the datasets package tells it.

A split's word stands anywhere in the name, as in `mytask_test.jsonl`, `validation-00000-of-00002.parquet`, or is that
of the folder, as in `test/part.jsonl`; subfolders count. Where several files could be one split, the ones nearest to
the top are it, and among these the one with no other word in its name. What looks like a split, or like rows, and is
not read is named in a warning.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from moeopt.errors import TaskError
from moeopt.showing import line, listed
from moeopt.tasks.formats import ENDINGS, PACKED, form_of

WORDS = {
    **dict.fromkeys(("train", "training", "search"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(.*?)[-_.]?(\d+)-of-(\d+)(?!\d)")


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split ("train", "validation", "test") of a folder, or "train" of its only file of rows.

    Args:
        folder: where to look, subfolders included; nothing is read whose name begins with a dot.

    Raises:
        TaskError: if there is no file to read, or several could be one split.
    """
    named: dict[str, list[Path]] = defaultdict(list)
    lone, over = [], []
    for file in files_of(folder, hidden=True):
        splits = splits_named(file.relative_to(folder))
        if _is_hidden(file.relative_to(folder)):
            over.append(file)
        elif len(splits) == 1 and form_of(file):
            named[splits.pop()].append(file)
        elif splits:
            over.append(file)
        elif form_of(file):
            lone.append(file)
    chosen = {split: topmost(folder, split, files) for split, files in named.items()}
    if not chosen and lone:
        chosen = {"train": one_set(folder, "train", _top(lone))}
    if not chosen:
        have = listed(sorted(line(str(path.relative_to(folder)), 80) for path in files_of(folder))) or "nothing"
        raise TaskError(f"folder {folder} has no train, validation or test file ending in {ENDINGS} (it has {have})")
    warn_passed_over(folder, [*over, *lone, *(file for files in named.values() for file in files)], chosen)
    return chosen


def files_of(folder: Path, hidden: bool = False) -> list[Path]:
    """All files of a folder and its subfolders, links followed, in order; with `hidden` also those with a dot."""

    def walk(place: Path, above: tuple[str, ...]) -> Iterator[Path]:
        real = os.path.realpath(place)
        if real in above:
            return
        for path in sorted(place.iterdir()):
            if path.name.startswith(".") and not hidden:
                continue
            if path.is_dir():
                yield from walk(path, (*above, real))
            elif path.is_file():
                yield path

    try:
        return list(walk(folder, ()))
    except OSError as error:
        raise TaskError(f"cannot read data folder {folder}: {error.strerror or error}") from error


def splits_named(path: Path) -> set[str]:
    """The splits that a file's name tells, or else the nearest folder's whose name is that of a split and no more."""
    splits = {WORDS[word] for word in _words(path) if word in WORDS}
    folders = (WORDS[part.lower()] for part in reversed(path.parent.parts) if part.lower() in WORDS)
    return splits or set(list(folders)[:1])


def topmost(folder: Path, split: str, files: list[Path]) -> list[Path]:
    """Those of the files that are the split, as the top of this file says; raises as `one_set`."""
    files = _top(files)
    exact = [file for file in files if all(word in (*WORDS, "of") for word in _words(file))]
    return one_set(folder, split, exact or files)


def one_set(folder: Path, split: str, files: list[Path]) -> list[Path]:
    """The files, if they are the pieces of one: a lone file, numbered ones, or all that a folder of the split holds.

    Raises:
        TaskError: naming the files if not.
    """
    pieces = defaultdict(list)
    for file in files:
        shard = _SHARD.match(file.name)
        name = f"{shard[1]} of {shard[3]}" if shard else re.sub(r"\d+", "#", file.name)
        whole = not shard and WORDS.get(file.parent.name.lower()) == split and not splits_named(Path(file.name))
        pieces[file.parent, "" if whole else name, form_of(file), file.suffix].append(file)
    if len(pieces) > 1:
        names = listed(line(str(file.relative_to(folder)), 80) for file in files)
        raise TaskError(
            f"folder {folder} has several files that may be its {split} split: {names}. Leave one there, name one file"
            f" instead of the folder, or number its pieces as {split}-00000-of-00002.jsonl"
        )
    shards = [shard for file in files if (shard := _SHARD.match(file.name))]
    if shards and len(shards) < int(shards[0][3]):
        warnings.warn(
            f"{folder} has {len(shards):,} of {int(shards[0][3]):,} pieces of its {split} split: the others are not"
            " read",
            stacklevel=4,
        )
    return files


def warn_passed_over(folder: Path, files: Iterable[Path], chosen: Mapping[str, Iterable[Path]]) -> None:
    """Name those of the files that look like splits or rows, and are not among the chosen ones."""
    read = {file for split in chosen.values() for file in split}
    names = {file: file.relative_to(folder) for file in set(files) - read}
    over = sorted(  # a .json that is no split may be anything, such as a data set's card
        line(str(name), 80)
        for name in names.values()
        if (form_of(name) not in (None, ".json") or splits_named(name)) and (form_of(name) or not _is_hidden(name))
    )
    if over:
        splits = listed(f"{split} from {listed(file.name for file in files)}" for split, files in chosen.items())
        warnings.warn(f"{folder}: not read: {listed(over, most=20)} (read are {splits})", stacklevel=4)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _words(path: Path) -> list[str]:
    """The words of a file's name, its endings left out."""
    stem = path.name
    while Path(stem).suffix.lower() in PACKED or form_of(Path(stem)):
        stem = Path(stem).stem
    return [word for word in re.split("[^a-z]+", stem.lower()) if word]


def _top(files: list[Path]) -> list[Path]:
    depth = min(len(file.parts) for file in files)
    return [file for file in files if len(file.parts) == depth]
