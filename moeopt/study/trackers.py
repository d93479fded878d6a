"""MLflow, Weights & Biases and TensorBoard, each as a place that trials of a study are sent to.

Optuna's callbacks for these (optuna-integration) are deprecated and go with its version 6; they know nothing of resumed
studies, and the one for TensorBoard needs TensorFlow. What is used here are the tools' own clients.

A tracker keeps one run for a study, by the study's `tracking` id, and goes on with it after a restart.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from moeopt.study.storage.urls import anywhere, scrub

PROJECT = "moeopt"
"""Experiment of MLflow and project of W&B, where neither is named by their environment variables."""
FOLDER = "runs"
"""TensorBoard's folder, where none is named: that of PyTorch's writer."""
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""How MLflow's client asks a server that does not answer: by itself for minutes."""
PATIENCE = 30.0
"""Seconds that W&B may take to start a run, and to upload the rest at the end."""
DURABLE = "x_transaction_log_flush_interval"
"""Setting of W&B: seconds until rows are on disk, whatever becomes of this process; by itself 15."""
TAG, TRIAL, PARENT = "moeopt.study_id", "moeopt.trial", "mlflow.parentRunId"


@dataclass(frozen=True)
class Sent:
    """What is sent of a trial that ended; `began` and `ended` in seconds since 1970."""

    number: int
    state: str
    metrics: Mapping[str, float]
    words: Mapping[str, str]
    began: float
    ended: float


@dataclass(frozen=True)
class About:
    """What is sent of a study, once; of its objectives, whether they are maximised."""

    name: str
    id: str
    config: Mapping[str, str | float]
    objectives: Mapping[str, bool]


class Tracker(Protocol):
    """Where trials go. Any call may raise anything: then it is made again, later."""

    @property
    def place(self) -> str:
        """What tells it from others of its kind; without passwords."""

    @property
    def told(self) -> str:
        """Where to look, once it is open."""

    def open(self, about: About, noted: set[int]) -> set[int]:
        """Start the study's run, or go on with it; `noted` trials were sent before. Returns those that it holds."""

    def send(self, trial: Sent) -> None: ...

    def close(self) -> None: ...


@dataclass
class MLflow:
    """A run for the study, with its metrics by trial, and within it a run for each trial."""

    where: str | None = None
    _client: Any = None
    _experiment: str = ""
    _run: str = ""
    _open: dict[int, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        uri = self.where or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        return scrub(anywhere(uri) if uri.startswith("sqlite:") else uri)

    @property
    def told(self) -> str:
        return f"{self.place}, run {self._run}"

    def open(self, about: About, noted: set[int]) -> set[int]:
        for name, value in QUICK.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(tracking_uri=self.where)
        self._experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or self._named(client)
        runs = client.search_runs([self._experiment], f"tags.`{TAG}` = '{about.id}'", max_results=1)
        run = runs[0] if runs else client.create_run(self._experiment, run_name=about.name, tags={TAG: about.id})
        self._run = run.info.run_id
        if not run.data.params:
            params = [Param(name, str(value)) for name, value in about.config.items()]
            for first in range(0, len(params), 100):
                client.log_batch(self._run, params=params[first : first + 100])
        client.update_run(self._run, status="RUNNING")
        held: set[int] = set()
        self._open = {}
        token: str | None = None
        while True:
            page = client.search_runs([self._experiment], f"tags.`{PARENT}` = '{self._run}'", page_token=token)
            for child in page:
                number = child.data.tags.get(TRIAL, "")
                if number.isdecimal() and child.info.status == "RUNNING":  # this process ended in the middle of it
                    self._open[int(number)] = child.info.run_id
                elif number.isdecimal():
                    held.add(int(number))
            token = page.token
            if not token:
                break
        self._client = client
        return held

    def _named(self, client: Any) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        there = client.get_experiment_by_name(name)
        return str(client.create_experiment(name) if there is None else there.experiment_id)

    def send(self, trial: Sent) -> None:
        from mlflow.entities import Metric

        began, ended = (int(1000 * moment) for moment in (trial.began, trial.ended))
        run = self._open.get(trial.number)
        if run is None:
            tags = {**trial.words, PARENT: self._run, TRIAL: str(trial.number)}
            name = f"trial {trial.number}"
            made = self._client.create_run(self._experiment, start_time=began, tags=tags, run_name=name)
            run = self._open[trial.number] = made.info.run_id
        metrics = [Metric(name, value, ended, trial.number) for name, value in trial.metrics.items()]
        for each in (run, self._run):  # what is there already, by name, time and step, is not there twice
            self._client.log_batch(each, metrics=metrics)
        self._client.set_terminated(run, "FAILED" if trial.state == "failed" else "FINISHED", ended)
        del self._open[trial.number]

    def close(self) -> None:
        self._client.set_terminated(self._run, "FINISHED")


@dataclass
class WandB:
    """A run for the study, a row a trial; offline where nobody is logged in, unless WANDB_MODE says otherwise."""

    where: str | None = None
    _run: Any = None

    @property
    def place(self) -> str:
        return "/".join(filter(None, (os.environ.get("WANDB_ENTITY"), os.environ.get("WANDB_PROJECT") or PROJECT)))

    @property
    def told(self) -> str:
        folder = Path(self._run.dir).parent
        return f"offline; to upload it: wandb sync {folder}" if self._run.offline else str(self._run.url)

    def open(self, about: About, noted: set[int]) -> set[int]:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None and not wandb.login(prompt=False, verify=False):
            mode = "offline"
        if self.where is not None:
            Path(self.where).mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(console="off", silent=True, init_timeout=PATIENCE, finish_timeout=PATIENCE)
        if hasattr(settings, DURABLE):
            setattr(settings, DURABLE, 0.5)
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT, id=f"moeopt-{about.id}", name=about.name,
            resume="allow", reinit="create_new", dir=self.where, mode=mode, config=dict(about.config),
            settings=settings,
        )  # fmt: skip
        run.define_metric("*", step_metric="trial")
        for name, maximised in about.objectives.items():
            run.define_metric(name, step_metric="trial", summary="max" if maximised else "min")
        self._run = run
        return set() if mode != "offline" and not run.resumed else noted

    def send(self, trial: Sent) -> None:
        self._run.log({"trial": trial.number, **trial.metrics, **trial.words}, commit=True)

    def close(self) -> None:
        self._run.finish()


@dataclass
class TensorBoard:
    """A folder of scalars by trial, and what is text of a trial as such."""

    where: str | None = None
    _writer: Any = None

    @property
    def place(self) -> str:
        return str(Path(self.where or FOLDER).absolute())

    @property
    def told(self) -> str:
        return f"tensorboard --logdir {self.place}"

    def open(self, about: About, noted: set[int]) -> set[int]:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = Path(self.place) / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', about.name)[:80]}-{about.id[:8]}"
        begun = any(folder.glob("events.out.tfevents.*"))
        # TensorBoard's way to go on: of what was written before, trials from the first that is missing count no more.
        first = next(number for number in range(len(noted) + 1) if number not in noted) if begun else 0
        self._writer = SummaryWriter(str(folder), purge_step=first if begun else None)
        if not begun:
            for each in hparams({**about.config}, dict.fromkeys(about.objectives, 0.0)):
                self._writer.file_writer.add_summary(each)
        self._writer.flush()
        return set(range(first))

    def send(self, trial: Sent) -> None:
        for name, value in trial.metrics.items():
            self._writer.add_scalar(name, value, trial.number, walltime=trial.ended)
        text = "; ".join(f"{name} {value}" for name, value in trial.words.items())
        self._writer.add_text("trial", text, trial.number, walltime=trial.ended)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


TRACKERS: dict[str, type[MLflow] | type[WandB] | type[TensorBoard]] = {
    "mlflow": MLflow,
    "wandb": WandB,
    "tensorboard": TensorBoard,
}


def seconds(moment: datetime | None, otherwise: float) -> float:
    """A moment as Optuna notes it, in local time, as seconds since 1970."""
    return otherwise if moment is None else moment.timestamp()
