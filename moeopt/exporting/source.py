"""The tensors of a checkpoint, read a few MiB at a time."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, dtype

from moeopt.errors import ExportError, ModelError
from moeopt.exporting.folders import check_inside
from moeopt.models.weight_files import weight_files
from moeopt.showing import first_line, listed

BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Of each dtype, as safetensors names it."""


def torch_dtype(name: str) -> dtype:
    """The torch dtype that safetensors calls `name`."""
    dtypes: dict[str, dtype] = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }  # fmt: skip
    if name not in dtypes:
        raise ExportError(f"moeopt does not read tensors of dtype {name}")
    return dtypes[name]


def dtype_name(kind: dtype) -> str:
    """What safetensors calls a torch dtype."""
    return next(name for name in BYTES if name[0] != "U" and name != "F8_E8M0" and torch_dtype(name) == kind)


@dataclass(frozen=True)
class Stored:
    """A tensor on disk.

    Args:
        dtype: as safetensors names it.
        shape: of the tensor.
        file: it lies in, among those of a checkpoint.
        offset: of its first byte in that file (-1 where the file is not one of safetensors).
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path = Path()
    offset: int = -1

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return self.size * BYTES[self.dtype]


class Source:
    """A checkpoint folder of safetensors or `.bin` files, sharded or not; a context manager.

    Attributes:
        folder: where it lies.
        tensors: of all files, by name, in the order of the files.
        files: that hold them.

    Raises:
        ExportError: when files are missing, truncated, not what their names say, or links out of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        self._open: dict[Path, IO[bytes]] = {}
        self._loaded: dict[str, Tensor] = {}
        files, named = _files(folder)
        for file in files:
            tensors = _header(file) if file.suffix == ".safetensors" else self._unpickled(file)
            twice = next((name for name in tensors if name in self.tensors), None)
            if twice is not None:
                raise ExportError(f"{str(folder)!r} holds {twice!r} twice, the second time in {file.name}")
            self.tensors |= tensors
        self.files = tuple(files)
        absent = [name for name in named if name not in self.tensors]
        if absent:
            raise ExportError(f"{str(folder)!r} lacks tensors that its index names: {listed(absent)}")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes of the numbers `start` to `stop` of a tensor, in its order in memory."""
        stored = self.tensors[name]
        size = BYTES[stored.dtype]
        if name in self._loaded:
            part = self._loaded[name].reshape(-1)[start:stop].contiguous()
            return part.view(torch.uint8).numpy().tobytes()
        file = self._open.get(stored.file)
        if file is None:
            file = self._open[stored.file] = stored.file.open("rb", buffering=0)
        file.seek(stored.offset + start * size)
        count = (stop - start) * size
        data = b""
        while len(data) < count:  # one call gives at most 2 GiB
            piece = file.read(count - len(data))
            if not piece:
                raise ExportError(f"{str(stored.file)!r} ends in the middle of {name!r}")
            data += piece
        return data

    def read_bytes(self, name: str, at: int, count: int) -> bytes:
        """That many bytes of a tensor, from the byte `at`, where both are whole numbers."""
        size = BYTES[self.tensors[name].dtype]
        return bytes(self.read(name, at // size, (at + count) // size))

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Those numbers of a tensor, (stop - start,)."""
        stored = self.tensors[name]
        stop = stored.size if stop is None else stop
        return torch.frombuffer(bytearray(self.read(name, start, stop)), dtype=torch_dtype(stored.dtype))

    def _unpickled(self, file: Path) -> dict[str, Stored]:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:
            raise ExportError(f"{str(file)!r} cannot be read as a weights-only file: {first_line(error)}") from error
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ExportError(f"{str(file)!r} must hold tensors by name and nothing else")
        self._loaded |= state
        return {name: Stored(dtype_name(t.dtype), tuple(t.shape), file) for name, t in state.items()}

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._open.values():
            file.close()
        self._loaded.clear()


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and the file of each tensor by their index."""
    try:
        files, named = weight_files(folder)
    except ModelError as error:
        raise ExportError(str(error)) from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ExportError(f"{str(folder)!r} lacks the weight files {', '.join(missing)} that its index names")
    if not files:
        raise ExportError(
            f"{str(folder)!r} holds neither model.safetensors nor pytorch_model.bin, nor an index of either"
        )
    for file in files:
        check_inside(file)
    return files, named


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(str(file), framework="pt"):  # checks that the header and the length of the file agree
            pass
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{str(file)!r} is truncated or not a safetensors file: {error}") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(BYTES))
    if unknown:
        raise ExportError(f"{str(file)!r} holds tensors of a dtype that moeopt does not copy: {', '.join(unknown)}")
    begin = 8 + length
    inside = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: Stored(entry["dtype"], tuple(entry["shape"]), file, begin + entry["data_offsets"][0])
        for name, entry in inside
    }
