"""Tasks of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.10256836), and ours in its YAML, as objectives.

    get("arc_easy")                                          # its data set from the hub
    get("arc_easy", data="arc/", num_fewshot=5)              # train.jsonl, validation.jsonl, test.jsonl
    get("eep_boolq", data="boolq.jsonl")                     # the prompt of EEP (arXiv 2407.00945)
    get("mmlu", subjects="stem,virology", held_out=True)     # test of all other subjects
    get("my_task", include_path="my_tasks/")                 # my_tasks/my_task.yaml

Prompts, few-shot examples and metrics come from the harness's own code, and token ids are the harness's, so that
log-likelihoods and metrics are those that `lm_eval` gives for the same documents, up to the rounding of the model's
dtype. (The harness takes the log-softmax in that dtype, moeopt in float32.) The ids are others where the harness's are
not those of context and continuation, as it loses characters to a token that spans the two, or scores the </s> that a
tokenizer ends every text with; see `moeopt.tasks.tokens`. A prompt that is too long loses its beginning as in the
harness, its begin-of-sequence token included.

The loss of a document is the mean negative log-likelihood, per token, of its right option (of the likeliest, where
several are right); `correct` is the metric reported, by default the task's first, such as `acc`. Where answers are
generated, the loss is that of the reference answer, and the metrics judge what the model writes, greedily.

Splits: what the harness calls training, validation and test documents become search, dev and test as in
`moeopt.tasks.splits`. Test documents (or where the task has none, validation documents) are what the harness reports
on, and get the few-shot examples that they get there. Prompts of search and dev show no document of a later split, nor
the answer to their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from moeopt.errors import TaskError
from moeopt.tasks.base import SPLITS, Example
from moeopt.tasks.lm_eval.base import PublishedTask
from moeopt.tasks.lm_eval.documents import Document, PromptOptions, Reader
from moeopt.tasks.lm_eval.generated import HarnessGenerationTask
from moeopt.tasks.lm_eval.loading import Harness, failing, load
from moeopt.tasks.lm_eval.local_data import Data
from moeopt.tasks.lm_eval.options import HarnessTask
from moeopt.tasks.splits import FRACTIONS, Splits, without_shared

PREFIX = "lm_eval:"
"""What may stand before the name of a task of the harness."""
OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "generate_until")


def lm_eval_task(
    name: str,
    data: Data | None = None,
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool | None = None,
    metric: str | None = None,
    subjects: str | Iterable[str] | None = None,
    held_out: bool = False,
    fractions: Sequence[float] = FRACTIONS,
    most: int | None = None,
    config: str | None = None,
    trust_remote_code: bool = False,
) -> PublishedTask:
    """A task, group or tag of lm-evaluation-harness, or one of ours in its YAML, as an objective.

    Args:
        name: as on the harness's command line; "lm_eval:" may stand before it.
        data: a file of rows in its data set's own schema, for the split that the harness evaluates, or a folder with a
            file for every split; or a hub id. None: what the task says, usually a hub data set.
        include_path: a folder with tasks of one's own.
        num_fewshot: examples in front of every question; None for what the task says.
        apply_chat_template: whether the tokenizer's chat template writes the prompts.
        system_instruction: a text in front of all, the system message of a chat.
        fewshot_as_multiturn: whether the examples are turns of the chat rather than one message; None: they are.
        metric: what `correct` is, by the harness's name; None for `acc`, or the first of generated answers. With
            "acc_norm" the options are compared, also by ``score="choice"``, per character, with "acc_bytes" per byte.
        subjects: of a group, such as `mmlu`, the tasks, groups or tags to take, also as one text with commas between.
        held_out: the test split of what is not among `subjects`, and nothing else.
        fractions: of search, dev and test where the data has no splits of its own.
        most: read at most so many documents of each of the harness's splits, in their order; they are rendered one by
            one, which takes about a millisecond.
        config: another configuration of the hub data set than the task's.
        trust_remote_code: whether tasks in `include_path` may run Python.

    Raises:
        TaskError: if the task is unknown, can be no objective, or cannot be loaded.
    """
    prompts = PromptOptions(apply_chat_template, system_instruction, fewshot_as_multiturn)
    if not isinstance(held_out, bool):
        raise TaskError(f"held_out must be true or false, got {held_out!r}")
    short = name.removeprefix(PREFIX)
    harness = load(
        [short],
        include_path=include_path,
        data={} if data is None else {short: data},
        config=config,
        subjects=_subjects(subjects),
        held_out=held_out,
        num_fewshot=num_fewshot,
        trust_remote_code=trust_remote_code,
    )
    return read(name, harness, prompts, fractions=fractions, most=most, only_test=held_out, metric=metric)


def read(
    name: str,
    harness: Harness,
    prompts: PromptOptions,
    *,
    fractions: Sequence[float] = FRACTIONS,
    most: int | None = None,
    only_test: bool = False,
    metric: str | None = None,
) -> PublishedTask:
    """The harness's tasks, from `moeopt.tasks.lm_eval.loading.load`, as one task of moeopt; arguments as above.

    Raises:
        TaskError: if a task can be no objective, tasks of options and of generated answers are mixed, or the data do
            not fit.
    """
    if most is not None and most < 1:
        raise TaskError(f"most must be at least 1, got {most}")
    generates = {leaf.OUTPUT_TYPE == "generate_until" for leaf in harness.tasks.values()}
    if len(generates) > 1:
        raise TaskError(f"task {name!r} has tasks of options and of generated answers: make a mixture of them")
    documents: dict[str, Document] = {}
    parts: dict[str, list[Example]] = {split: [] for split in SPLITS}
    origins: dict[str, str] = {}
    for leaf_name, leaf in harness.tasks.items():
        if leaf.OUTPUT_TYPE not in OUTPUT_TYPES or not hasattr(leaf, "fewshot_cfg"):
            raise TaskError(
                f"lm_eval task {leaf_name!r} ({leaf.OUTPUT_TYPE}) neither scores given answers nor generates them, so"
                " it is no objective; moeopt.evaluation.lm_eval_report reports on it"
            )
        reader = Reader(leaf_name, leaf, prompts)
        with failing(leaf_name, "fails on its documents"):
            for split, examples in reader.parts(fractions, most).items():
                parts[split] += examples
        documents |= reader.documents
        origins.setdefault(reader.origin, leaf_name)
    kind = HarnessGenerationTask if generates == {True} else HarnessTask
    apart = without_shared(parts, name)
    splits = Splits(name, **{split: apart[split] if split == "test" or not only_test else () for split in SPLITS})
    origin = "; ".join(said if len(origins) == 1 else f"{leaf}: {said}" for said, leaf in origins.items())
    return kind(name, splits, documents, harness=harness, prompts=prompts, origin=origin, metric=metric)


def _subjects(subjects: str | Iterable[str] | None) -> list[str]:
    if subjects is None:
        return []
    names = subjects.split(",") if isinstance(subjects, str) else subjects
    if not isinstance(names, Iterable):
        raise TaskError(f"subjects must be names with commas between them or a list of names, got {subjects!r}")
    listed = [str(name).strip().lower().replace(" ", "_") for name in names]
    if not listed:
        raise TaskError("subjects must name at least one subject or category")
    return listed
