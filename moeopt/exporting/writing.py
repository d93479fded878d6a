"""Files of a checkpoint: safetensors written in place a few MiB at a time, in a folder that appears whole or not at
all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from moeopt.errors import ExportError
from moeopt.exporting.folders import real
from moeopt.exporting.layout import Layout
from moeopt.exporting.source import BYTES, Source, Stored
from moeopt.models.weight_files import INDEX
from moeopt.trials.process import is_dead, this_worker

WRITER = ".writer.json"
"""Names the process that writes a folder, in it."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What writing fails with where a disk is full, or a quota or the largest size of a file is reached."""


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name when the block ends well, and is gone when it does not.

    What earlier processes left of theirs, killed while they wrote to the same place, is removed first.
    """
    for left in out.parent.glob(f".{out.name}.*"):
        if _abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        write_json(temporary / WRITER, this_worker())
        yield temporary
        (temporary / WRITER).unlink()
        for file in temporary.iterdir():
            with room_for(file, file.stat().st_size):
                _sync(file)
        _sync(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        # Every file is on disk before the name is: a crash leaves the hidden folder, or the whole one.
        temporary.rename(out)  # also over an empty folder
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_weights(layout: Layout, source: Source, folder: Path, shard_bytes: int) -> None:
    """Write the tensors of a layout as safetensors files of at most `shard_bytes`, with an index.

    Loaders that read every safetensors file of a folder, where no index says which, would take the plan's for weights.
    Header first; the tensors are then filled in piece by piece, so that never more than a few MiB are in memory.
    """
    shards: list[dict[str, Stored]] = [{}]
    size = 0
    for name, tensor in layout.tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    single = len(shards) == 1
    files = [
        "model.safetensors" if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    places: dict[str, tuple[Path, FileIO, int]] = {}
    sizes: dict[Path, int] = {}
    with ExitStack() as stack:
        for file, tensors in zip(files, shards):
            path = folder / file
            stream = stack.enter_context(path.open("w+b", buffering=0))
            header, offsets, end = _header(tensors)
            sizes[path] = len(header) + end
            with room_for(path, sizes[path]):
                _write_all(stream, header)
                stream.truncate(sizes[path])  # a hole, into which tensors are written in whatever order they are made
            places |= {name: (path, stream, len(header) + offset) for name, offset in offsets.items()}
        for name, at, piece in layout.parts(source):
            path, stream, offset = places[name]
            with room_for(path, sizes[path]):
                stream.seek(offset + at)
                _write_all(stream, piece)
        for path, stream in {(path, stream) for path, stream, _ in places.values()}:
            with room_for(path, sizes[path]):
                os.fsync(stream.fileno())
    weight_map = {name: file for file, tensors in zip(files, shards) for name in tensors}
    write_json(folder / INDEX, {"metadata": {"total_size": layout.nbytes}, "weight_map": weight_map})


def copy_companions(source: Path, names: Sequence[str], folder: Path) -> None:
    """Copy those files of a checkpoint, from where links point that do not leave it."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        data = real(source, name).read_bytes()
        with room_for(folder / name, len(data)):
            (folder / name).write_bytes(data)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        with contextlib.suppress(ValueError):  # what is no JSON stays as it is
            config = json.loads(tokenizer.read_text(encoding="utf-8"))
            # transformers 4 knows the class by its old name only
            if isinstance(config, dict) and config.get("tokenizer_class") == "TokenizersBackend":
                write_json(tokenizer, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_json(path: Path, content: Any) -> None:
    """JSON that people can read."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Text in UTF-8."""
    data = text.encode()
    with room_for(path, len(data)):
        path.write_bytes(data)


@contextmanager
def room_for(file: Path, size: int) -> Iterator[None]:
    """Within it, a disk that is full is an ExportError that names the file written, its size and what is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ExportError(f"cannot write {file.name}: {needs(size, file.parent.parent)} ({error.strerror})") from error


def needs(size: int, folder: Path) -> str:
    """How many bytes something takes, and how many are free where it goes, in words."""
    free = shutil.disk_usage(folder).free
    return f"it takes {_amount(size)}, and the disk of {str(folder)!r} has {_amount(free)} free"


def _amount(size: int) -> str:
    unit, name = next(((2**p, n) for p, n in ((30, "GiB"), (20, "MiB")) if size >= 2**p), (1, "bytes"))
    return f"{size / unit:.2f} {name}" if unit > 1 else f"{size} {name}"


def _header(tensors: dict[str, Stored]) -> tuple[bytes, dict[str, int], int]:
    """The head of a safetensors file, where each tensor starts behind it, and where the last one ends."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: -BYTES[tensors[name].dtype]):  # so that all are aligned
        tensor = tensors[name]
        offsets[name] = end
        end += tensor.nbytes
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, end


def _write_all(stream: FileIO, piece: bytes) -> None:
    view = memoryview(piece)
    while len(view):
        view = view[stream.write(view) :]


def _abandoned(folder: Path) -> bool:
    try:
        return is_dead(json.loads((folder / WRITER).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def _sync(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # folders, on Windows
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
