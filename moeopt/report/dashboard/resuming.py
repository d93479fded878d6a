"""How a study is resumed, for its note: by the command that made it, or by Python with what it was made with."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from moeopt.report.dashboard.digest import Digest
from moeopt.study.storage.urls import HIDDEN

LONGEST_COMMAND = 8000
LONGEST_OPTIONS = 2000
"""Characters of a sampler's options that are written out."""


def resuming(digest: Digest, command: Any, storage: str, trials: int | None) -> str:
    """Markdown; arguments as of `moeopt.report.dashboard.note.note`."""
    typed = _command(command)
    if typed is not None:
        secret = f"{HIDDEN} stands for what is secret in the storage's URL.\n\n" if HIDDEN in typed else ""
        return secret + _fenced(typed, "bash")
    opened, object_of = _opened(digest, storage)
    run = (
        "study.optimize(objective, n_trials=10)"
        if trials is None
        else (f"moeopt.optimize(study, objective, n_trials={trials})")
    )
    told = "Run the Python that made `objective` again" + (f", and `{object_of}`, as it was" if object_of else "")
    return f"{told}, then\n\n" + _fenced(f"{opened}\n{run}", "python")


def _opened(digest: Digest, storage: str) -> tuple[str, str | None]:
    """Python that opens the study to go on, and the name of an object that it takes for it."""
    sampler, pruner = digest.part("sampler"), str(digest.part("pruner", "class"))
    raced = {"pruner": "racing"} if pruner.endswith(".RacingPruner") else {}
    options = _options(sampler) if isinstance(sampler, Mapping) else None
    needed = None
    if options is None:
        needed, seed = "sampler", digest.part("sampler", "seed")
        given = "    sampler=sampler,\n" + (f"    seed={seed},\n" if type(seed) is int else "")
    elif _starts_elsewhere(digest) or not (raced or pruner.endswith((".NopPruner", "None"))):
        return f"study = moeopt.load_study({digest.name!r}, {storage!r})", None
    else:
        given = "".join(f"    {name}={value!r},\n" for name, value in options.items())
    given += "".join(f"    {name}={value!r},\n" for name, value in raced.items())
    return (
        f"study = moeopt.create_study(\n    {digest.name!r},\n    objective=objective,\n    storage={storage!r},\n"
        f"{given}    load_if_exists=True,\n)"
    ), needed


def _options(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """A sampler's settings as arguments of `create_study`; None for one that is no name."""
    from moeopt.samplers import SAMPLERS

    name = settings.get("name")
    if not isinstance(name, str) or name.partition(":")[0] not in SAMPLERS or not re.fullmatch(r"[\w:]+", name):
        return None
    options = {key: value for key, value in settings.items() if key not in ("name", "start")}
    plain = all(key.isidentifier() and _is_plain(value) for key, value in options.items())
    return {"sampler": name, **options} if plain and len(repr(options)) <= LONGEST_OPTIONS else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, str)) or (isinstance(value, (int, float)) and abs(value) < 1 << 63)


def _starts_elsewhere(digest: Digest) -> bool:
    """Whether the sampler starts at another point than the space's own, which only the study holds."""
    from moeopt.samplers.checks import digest as digits

    start = digest.part("sampler", "start")
    return start is not None and (digest.space is None or start != digits(digest.space.start()))


def _command(command: Any) -> str | None:
    """A `moeopt search`, and the folder that it is of, quoted anew so that a shell runs nothing but it; else None."""
    if not isinstance(command, str) or len(command) > LONGEST_COMMAND or not command.isprintable():
        return None
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    folder = ""
    if len(words) > 2 and words[0] == "cd" and words[1].startswith("/") and words[2] == "&&":
        folder, words = f"cd {shlex.quote(words[1])} && ", words[3:]
    return folder + shlex.join(words) if words[:2] == ["moeopt", "search"] else None


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
