"""Exports on the Hugging Face hub: what could stop an upload is asked before it, and huggingface_hub does the rest."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from moeopt.errors import ExportError
from moeopt.exporting.base import CARD
from moeopt.exporting.folders import HTTP_ERROR, SOURCE
from moeopt.models.gate import CODE
from moeopt.showing import first_line, line

REPLACED = ["model*.safetensors", CODE]
"""Files of an earlier export in the repository that are deleted where this one has none of that name: weights that are
none of this model's, which loaders would prefer to its shards."""


def check_push(repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Make sure that an upload may begin: the repository, which is created where it is missing, takes files.

    The token is the one that `hf auth login` keeps, or HF_TOKEN.

    Args:
        repo_id: of a model on the hub: ``"org/name"``, or ``"name"``, then of the token's user.
        private: whether it is to be one that others do not see.
        revision: a branch, which is created where it is missing; None: the main one.

    Returns:
        The repository's whole id.

    Raises:
        ExportError: when the id is no valid one, there is no token, it may not write there, the repository is there and
            public though it is to be private, or the hub cannot be reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ExportError(f"{repo_id!r} is no name of a repository: {first_line(error)}") from None
    if get_token() is None:
        raise ExportError(
            f"no token for {constants.ENDPOINT} is here: log in with `hf auth login`, or set HF_TOKEN; it must be one "
            "that may write"
        )
    api = HfApi()
    with _saying(f"cannot push to {repo_id!r}"):
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise ExportError(f"{repo_id!r} is there and public: make it private on the hub, or leave out private")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # the first request of every upload, of which nothing is kept; others tell no right to write
        probe = CommitOperationAdd(CARD, b"# \n")
        api.preupload_lfs_files(repo_id, [probe], revision=revision)
    return repo_id


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload what `export` wrote to the Hugging Face hub.

    After a failure the same call goes on: what the hub has already is not sent again. Weights of an earlier export that
    lie there under other names are deleted with the commit; all other files stay.

    Args:
        folder: as `export` wrote it.
        repo_id, private, revision: as for `check_push`.
        commit_message: None: one that names the folder.

    Returns:
        Where to look at the commit.

    Raises:
        ExportError: as `check_push`, when the folder is no export, or the upload fails.
    """
    folder = Path(folder)
    missing = [name for name in ("config.json", "moeopt.json", CARD) if not (folder / name).is_file()]
    if missing:
        raise ExportError(f"{str(folder)!r} is nothing that moeopt export wrote: it has no {missing[0]}")
    repo_id = check_push(repo_id, private=private, revision=revision)
    words = ["moeopt", "push", str(folder), repo_id, *(["--private"] if private else [])]
    words += [] if revision is None else ["--revision", revision]
    again = f"{str(folder)!r} is whole, and not all of it on the hub; to go on: {shlex.join(words)}"
    with _saying(again):
        commit = HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or f"{folder.resolve().name}, exported by moeopt",
            ignore_patterns=[SOURCE],
            delete_patterns=REPLACED,
        )
    return str(commit.commit_url)


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Within it, whatever the hub or the way there refuses is one ExportError that says so behind `what`."""
    try:
        yield
    except RevisionNotFoundError:
        raise ExportError(f"{what}: there is no such revision") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {401: "the token is not valid", 403: "the token may not write there"}
        told = line(error.server_message or first_line(error), 300)
        raise ExportError(f"{what}: {reasons.get(status, 'the hub refuses')} ({status}: {told})") from None
    except (HTTP_ERROR, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, ExportError):
            raise
        cause = f": {first_line(error.__cause__)}" if error.__cause__ is not None else ""
        raise ExportError(f"{what}: {line(first_line(error), 300)}{line(cause, 300)}") from None
