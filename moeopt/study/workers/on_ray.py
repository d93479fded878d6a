"""Workers as Ray actors: Ray places them on a cluster's devices and restarts them, the study coordinates them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moeopt.errors import MoeoptError, StudyError

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

RESTARTS = 3


class Worker:
    """What an actor runs: `moeopt.run_worker`, and beside it, in another thread, the request to stop."""

    def __init__(self) -> None:
        self.stopping = threading.Event()

    def run(self, storage: str, study_name: str, options: dict[str, Any]) -> None:
        """Runs trials until the study holds all that are wanted, or `stop` is called."""
        import optuna

        from moeopt.study.workers.worker import run_worker

        def stop_when_asked(study: optuna.Study, trial: FrozenTrial) -> None:
            if self.stopping.is_set():
                study.stop()

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if not self.stopping.is_set():
            run_worker(storage, study_name, callbacks=[stop_when_asked], **options)

    def stop(self) -> None:
        """Let the running trial finish, and start no other."""
        self.stopping.set()


def run_on_ray(
    storage: str,
    study_name: str,
    *,
    workers: int,
    gpus_per_worker: float = 1.0,
    cpus_per_worker: float = 1.0,
    address: str | None = None,
    restarts: int = RESTARTS,
    tell: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> optuna.Study:
    """Run workers of a study on a Ray cluster until the study holds all the trials that are wanted.

    An actor whose process or node dies is started again by Ray, elsewhere if need be; its trial is run again by whoever
    comes first, as that of any dead worker. Ctrl-C lets running trials finish; a second one ends the actors.

    Args:
        storage: an SQLAlchemy URL that every node reaches.
        study_name: a study that `create_study` made.
        workers: actors, which wait until the cluster has room for them.
        gpus_per_worker: GPUs of each, 0.5 for two workers that share one; 0 for none.
        cpus_per_worker: cores of each.
        address: of the cluster, as for `ray.init`; None for the one that RAY_ADDRESS names, or a local one.
        restarts: how often an actor is started again; -1 for always.
        tell: is told what happens, in lines.
        options: of `moeopt.run_worker`; `model` is a hub id, or a folder that is on every node. A `task` travels to the
            workers with its examples and, when it is of a file of its own, the code in that file.

    Raises:
        StudyError: when Ray is not installed, an argument is out of range, or the cluster can never place a worker.
        MoeoptError: what a worker raised, once all have ended.
    """
    try:
        import ray
    except ImportError:
        raise StudyError("workers on Ray need Ray: pip install 'moeopt[ray]'") from None
    for what, value, least in (("workers", workers, 1), ("restarts", restarts, -1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise StudyError(f"{what} must be an integer of at least {least}, got {value!r}")
    for what, share in (("gpus_per_worker", gpus_per_worker), ("cpus_per_worker", cpus_per_worker)):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < float("inf"):
            raise StudyError(f"{what} must be a number of at least 0, got {share!r}")
    if gpus_per_worker > 1 and gpus_per_worker != int(gpus_per_worker):
        raise StudyError(f"gpus_per_worker must be a whole number or below 1, got {gpus_per_worker}")
    from moeopt.study import read_study
    from moeopt.tasks import own

    study = read_study(study_name, storage)
    if 0 < gpus_per_worker <= 1:  # "auto" would take what another worker left free of a GPU for all there is
        options.setdefault("device_map", "cuda:0")
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise StudyError(f"cannot reach Ray at {address or 'its default address'}: {_line(error)}") from error
    try:
        most = max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
        if gpus_per_worker > most:
            raise StudyError(f"no node of the Ray cluster has {gpus_per_worker:g} GPUs, at most {most:g}")
        place = ray.remote(
            num_gpus=gpus_per_worker,
            num_cpus=cpus_per_worker,
            max_restarts=restarts,
            max_task_retries=restarts,
            max_concurrency=2,
        )(Worker)
        if (code := own.module(options.get("task"))) is not None:
            ray.cloudpickle.register_pickle_by_value(code)
        actors = [place.remote() for _ in range(workers)]
        tell(f"{workers} workers on Ray")
        _finished(ray, actors, [actor.run.remote(storage, study_name, options) for actor in actors], tell)
    finally:
        if ours:
            ray.shutdown()
    return study


def _finished(ray: Any, actors: list[Any], runs: list[Any], tell: Callable[[str], None]) -> None:
    """Waits for all runs; raises what the first that failed did, once the others have ended."""
    names = {run: number for number, run in enumerate(runs, start=1)}
    failed: BaseException | None = None
    interrupted = False
    while runs:
        try:
            done, runs = ray.wait(runs, timeout=1.0)
            for run in done:
                try:
                    ray.get(run)
                except ray.exceptions.RayError as error:
                    cause: BaseException = getattr(error, "cause", None) or error
                    failed = failed or cause
                    tell(f"worker {names[run]} failed: {_line(cause)}")
        except KeyboardInterrupt:
            if interrupted:
                for actor in actors:
                    ray.kill(actor)
                raise
            interrupted = True
            tell("letting running trials finish")
            for actor in actors:
                actor.stop.remote()
    if interrupted:
        raise KeyboardInterrupt
    if isinstance(failed, MoeoptError):
        raise failed
    if failed is not None:
        raise StudyError(f"a worker on Ray failed: {_line(failed)}")


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
