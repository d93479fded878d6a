"""What a folder of harness tasks may run that is not trusted: nothing.

YAML of lm-evaluation-harness runs Python in three ways: `!function`, also in a file that it includes; a metric that the
harness does not have, which the evaluate package then imports from a folder or the hub; and templates of Jinja, which
reach all of Python. The harness's own tasks, and those that moeopt ships, may do the first two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from moeopt.errors import TaskError
from moeopt.tasks.lm_eval.catalogue import FOLDERS, harness_folder

TRUST = "read it, and if you trust it: trust_remote_code=True, or --trust-remote-code"


def trusts(manager: Any) -> bool:
    """Whether all tasks that a task manager knows are the harness's or moeopt's own."""
    files = (entry.yaml_path for entry in manager.task_index.values())
    return all(file is None or _is_shipped(Path(file)) for file in files)


@contextmanager
def untrusted(include_path: str | Path) -> Iterator[None]:
    """Within it, tasks that are loaded import no Python but the harness's and moeopt's own.

    It is where the harness imports that is guarded, so that it does not matter by which file or group it gets there.

    Raises:
        TaskError: when a task needs to, or this version of the harness imports in another way.
    """
    import lm_eval
    from lm_eval.api import task as api
    from lm_eval.tasks import _yaml_loader as loader

    try:
        import_function: Callable[[str, Path], Any] = loader._import_func_in_yml
        get_metric: Callable[..., Any] = api.get_metric
    except AttributeError:
        raise TaskError(
            f"include_path {str(include_path)!r} cannot be held to run no Python with lm_eval {lm_eval.__version__}; "
            f"{TRUST}"
        ) from None

    def imported(name: str, folder: Path) -> Any:
        if not _is_shipped(Path(folder)):
            raise TaskError(f"a task in {str(folder)!r} runs Python (!function {name}); {TRUST}")
        return import_function(name, folder)

    def metric(name: str, of_evaluate: bool = False) -> Any:
        from lm_eval.api import metrics, registry  # noqa: F401  metrics registers the harness's own

        if of_evaluate or name not in registry.metric_registry:
            raise TaskError(
                f"a task in {str(include_path)!r} has the metric {name!r}, which is none of the harness's own and runs "
                f"Python of the evaluate package's finding; {TRUST}"
            )
        return get_metric(name, of_evaluate)

    loader._import_func_in_yml, api.get_metric = imported, metric
    try:
        yield
    finally:
        loader._import_func_in_yml, api.get_metric = import_function, get_metric


@cache
def sandboxed() -> None:
    """From now on the harness's templates cannot reach Python's own attributes, as in transformers' chat templates."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    old = utils.env
    utils.env = SandboxedEnvironment(
        loader=old.loader, undefined=old.undefined, keep_trailing_newline=old.keep_trailing_newline
    )
    utils.env.filters.update(old.filters)


def _is_shipped(path: Path) -> bool:
    """Whether a file or folder is the harness's or moeopt's own."""
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in (harness_folder(), *FOLDERS))
