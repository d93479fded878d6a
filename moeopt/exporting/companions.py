"""Files that belong to a model beside its weights: its tokenizer, templates, settings of generation and licence."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from moeopt.exporting.base import CARD
from moeopt.exporting.folders import SOURCE, inside

TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps a tokenizer's chat templates other than the default one."""
WRITTEN = ("config.json", "moeopt.json", CARD, "plan.safetensors", SOURCE)
"""What export writes itself; the card of the full model is copied under another name."""
BELONGS = re.compile(
    r"""
    ((generation|tokenizer|processor|preprocessor|(video_|image_)(pre)?processor|feature_extractor)_config
      |tokenizer|vocab|added_tokens|special_tokens_map|chat_template|tekken|normalizer|source_vocab|target_vocab)\.json
    |(vocab|dict|merges|vocabs)\.(txt|bpe|json)|bpe\.codes|sentencepiece\.bpe\.model
    |[\w.-]+\.(jinja|tiktoken|spm|spm\.model)|(tokenizer|spiece|spm|sentencepiece|tiktoken)[\w.-]*\.model(\.v\d+)?
    |(licen[cs]e|notice|copying|use_policy|third[ _-]?party)[\w .-]*
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""Names of files of tokenizers and processors as transformers knows them, of chat templates and of licences."""


def companions(
    folder: Path, weights: Sequence[Path], *, trust_remote_code: bool = False
) -> tuple[list[str], list[str]]:
    """Names of the files of a checkpoint that belong to the model, and of those that do not, or are links out of it.

    Args:
        folder: the checkpoint.
        weights: its weight files.
        trust_remote_code: whether Python that config.json names belongs to the model too.

    Returns:
        The first are files whose links, if they are any, stay in the checkpoint. Names of folders end in a slash.
    """
    taken, left = [], []
    skipped = {*WRITTEN, *(file.name for file in weights), *(f.name for f in folder.glob("*.index.json"))}
    for path in sorted(folder.iterdir()):
        if path.name in skipped:
            continue
        if path.name == TEMPLATES and path.is_dir() and inside(path, folder):
            names = sorted(path.iterdir())
            taken += [str(file.relative_to(folder)) for file in names if _belongs(file, folder)]
            left += [str(file.relative_to(folder)) for file in names if not _belongs(file, folder)]
        elif _belongs(path, folder):
            taken.append(path.name)
        else:
            left.append(f"{path.name}/" if path.is_dir() else path.name)
    code = {*_code(folder, [*taken, *(["config.json"] if trust_remote_code else [])])} & {*left}
    return sorted([*taken, *code]), [name for name in left if name not in code]


def _belongs(file: Path, folder: Path) -> bool:
    return BELONGS.fullmatch(file.name) is not None and file.is_file() and inside(file, folder)


def _code(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Python files that settings of a tokenizer, processor or model name, and what these import from beside them."""
    from transformers.dynamic_module_utils import get_relative_import_files

    for name in names:
        if name != "config.json" and not name.endswith("_config.json"):
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            classes = json.dumps(json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map"))
            for module in re.findall(r'"(\w+)\.\w+"', classes):  # one of another repository has a prefix
                file = folder / f"{module}.py"
                if file.is_file() and inside(file, folder):
                    files = [file, *map(Path, get_relative_import_files(file))]
                    yield from (path.name for path in files if path.parent == folder and inside(path, folder))
