"""What moeopt costs on one GPU, over the bare forward, and both over what the GPU can do, measured in the same run.

    python benchmarks/on_gpu.py [--device cuda] [--models mixtral qwen3] [--tokens 65536] [--minutes 8] [--json FILE]
    python benchmarks/on_gpu.py --small --device cpu          # tiny models, seconds: what a test runs

**Never run on a GPU**, but for its small form on a CPU. It is for one GPU of 80 GB or more and takes at most
`--minutes`; what time does not reach is listed as not run. Models have the shapes of Mixtral-8x7B (32 layers of 8
experts) and Qwen3-30B-A3B (48 layers, 128 experts), and random bf16 weights made on the device, a tensor at a time,
in as many layers as fit (`FILLED` of free memory; 93 GB of Mixtral fit into no 80 GB).

Rows of the table: the model's own forward of all batches (bare); a new one-hot plan with half of the experts; a new
dense plan, every layer merged anew, resident and in scratch memory; one-hot plans that part from an earlier one at a
quarter, half, three quarters of the layers and at the last; the method `loss_aware`; 32 tokens for each of some prompts
generated, bare and one-hot. `limit` is the roofline of a row: for each batch the larger of multiplications at the speed
of a large matrix product and weights read at that of a copy, or for a merge its bytes at that of a copy.

What one should see, by the roofline of an H100 (bf16 790 TFLOP/s, 3.3 TB/s; H200: 4.3 TB/s) at 64k tokens:

* batch_tokens of 8k to 32k; a quarter of the throughput with 1k, as 60 GB of weights take 14 to 18 ms to read, as long
  as 7 TFLOP take, beside thousands of kernel launches;
* bare Qwen3-30B-A3B: 430 TFLOP, 0.55 s at the peak, so 0.8 to 1.4 s at the 40 to 70 % that grouped kernels reach;
  bare Mixtral with all 32 layers: 1.65 PFLOP, 2.1 s at the peak, 3 to 5 s;
* a one-hot trial within 1.05 of bare; a dense one 60 to 100 ms above it (90 GB read and 45 GB written for Mixtral),
  where merging in 4 MiB chunks would add about a second of launches;
* prefix reuse from the first changed layer l of L on: 1 - l / L of bare, and 2 % more;
* every self-check exact, or within rounding where a grouped kernel takes another tile for one expert.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import moeopt
from moeopt.evaluation import Evaluator
from moeopt.evaluation.memory import free_bytes
from moeopt.files import write_atomically
from moeopt.methods import Calibration, plan
from moeopt.models import is_exact
from moeopt.plan import LayerPlan, Plan
from moeopt.tasks import GenerationTask, TextTask
from moeopt.tasks.base import Example

FILLED = 0.6
"""Share of the free memory that weights may take: merged experts, up to half of them, and states come beside."""
DEPTHS = (0.25, 0.5, 0.75, 1.0)
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "qwen3": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
        "max_position_embeddings": 4096,
    },
}  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 512, "num_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One measured case: median seconds, what they are over the bare forward, the roofline, and peak memory."""

    model: str
    case: str
    seconds: float | None
    over_bare: float | None = None
    limit_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_gib: float | None = None
    note: str = ""


class Device:
    """Where it runs, and what that can do: TFLOP/s of a large product in the models' dtype, bytes/s of a copy."""

    def __init__(self, name: str, small: bool) -> None:
        self.device = torch.device(name)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        n, numbers = (256, 1 << 20) if small else (8192, 1 << 30)
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
        self.flops = 2 * n**3 / self.seconds(lambda: a @ b, 5)
        source = torch.zeros(numbers, device=self.device, dtype=self.dtype)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.nbytes / self.seconds(lambda: target.copy_(source), 5)

    def wait(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """Median seconds of a run, after one that is not counted."""
        return statistics.median(self.all_seconds(run, repeats))

    def all_seconds(self, run: Callable[[], Any], repeats: int, first: bool = True) -> list[float]:
        taken = []
        for turn in range(repeats + first):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            if turn or not first:
                taken.append(time.perf_counter() - started)
        return taken

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated() / (1 << 30) if self.device.type == "cuda" else None

    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type


class Bench:
    """The cases of one model."""

    def __init__(self, name: str, device: Device, args: argparse.Namespace, deadline: float) -> None:
        self.name, self.device, self.args, self.deadline = name, device, args, deadline
        self.rows: list[Row] = []
        self.bare: float | None = None
        self.model = made(name, device, args.small)
        self.tokenizer = byte_tokenizer()
        self.window = 32 if args.small else 512
        letters = np.random.default_rng(0).integers(97, 123, size=(args.tokens // self.window, self.window))
        texts = ["".join(map(chr, row)) for row in letters]
        self.task = TextTask("random letters", search=texts, window=self.window)
        self.shape = moeopt.shape_of(self.model)
        self.rng = np.random.default_rng(1)

    def run(self) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.evaluator = Evaluator(self.model, self.tokenizer, self.task)
            self._bare()
            self._trials()
            self._prefixes()
            self._case("loss_aware", self._loss_aware, once=True)
            self._generation()
        notes = dict.fromkeys(str(w.message) for w in said)
        exact = "bit for bit" if is_exact(self.model) else "within rounding"
        layers = f"{self.shape.layers} layers, batch_tokens {self.evaluator.batch_tokens:,}"
        self.rows.append(Row(self.name, "self-checks", None, note=f"all that ran passed, {exact}; {layers}"))
        self.rows += [Row(self.name, "said", None, note=note) for note in notes]

    def _case(
        self, case: str, run: Callable[[], Any], *, limit: float | None = None, tokens: int | None = None,
        once: bool = False, before: Callable[[], Any] = lambda: None, note: str = "",
    ) -> float | None:  # fmt: skip
        """Measures a case, unless the time is up; `before` each run, out of the clock."""
        if time.monotonic() > self.deadline:
            self.rows.append(Row(self.name, case, None, note="not run: out of time"))
            return None
        self.device.reset_peak()
        taken = []
        for turn in range(1 if once else 1 + self.args.repeats):
            before()
            seconds = self.device.all_seconds(run, 1, first=False)[0]
            if turn or once:  # the first run loads kernels
                taken.append(seconds)
        seconds = statistics.median(taken)
        over = None if self.bare is None else seconds / self.bare
        rate = None if tokens is None else tokens / seconds
        self.rows.append(Row(self.name, case, seconds, over, limit, rate, self.device.peak_gib(), note))
        return seconds

    def _bare(self) -> None:
        batches = self.evaluator.batches
        tokens = sum(batch.ids.numel() for batch in batches)
        inputs = [batch.inputs(self.device.device, self.device.dtype) for batch in batches]

        @torch.inference_mode()
        def run() -> None:
            for batch in inputs:
                self.model(**batch, use_cache=False, logits_to_keep=1)

        experts, rest = self._parameters()
        active = rest + experts * self.shape.k / self.shape.experts
        itemsize = self.device.dtype.itemsize
        read = (experts + rest) * itemsize / self.device.bandwidth
        limit = sum(max(2 * active * b.ids.numel() / self.device.flops, read) for b in batches)
        self.bare = self._case("bare forward", run, limit=limit, tokens=tokens)

    def _parameters(self) -> tuple[int, int]:
        """Numbers of the experts, and of the rest that is multiplied."""
        named = [(name, p.numel()) for name, p in self.model.named_parameters()]
        experts = sum(size for name, size in named if ".experts." in name)
        return experts, sum(size for name, size in named) - experts - self.model.get_input_embeddings().weight.numel()

    def _trials(self) -> None:
        tokens = self.evaluator.tokens
        self._case("one-hot trial", lambda: self.evaluator.evaluate(self.one_hot()), tokens=tokens)
        moved = self._parameters()[0] * self.device.dtype.itemsize * 1.5 / self.device.bandwidth
        for where in ("resident", "scratch"):
            self.evaluator.passes.merged_weights = where  # type: ignore[assignment]
            if where == "resident" and self._parameters()[0] * self.device.dtype.itemsize / 2 > self._free():
                self.rows.append(Row(self.name, "dense trial, resident", None, note="not run: half the experts more"))
                continue
            case, once = f"dense trial, {where}", lambda: self.evaluator.evaluate(self.dense())
            self._case(case, once, tokens=tokens, note=f"merging at a copy's speed: {moved:.3g} s")
            self.evaluator.clear()
        self.evaluator.passes.merged_weights = "auto"

    def _free(self) -> int:
        self.device.reset_peak()
        return free_bytes(self.device.device)

    def _prefixes(self) -> None:
        layers = self.shape.layers
        base = self.one_hot()
        for first in dict.fromkeys(min(layers - 1, round(depth * layers)) for depth in DEPTHS):
            plans: list[Plan] = []

            def before(first: int = first, plans: list[Plan] = plans) -> None:
                if not plans:
                    self.evaluator.clear()
                    self.evaluator.evaluate(base)
                plans.append(Plan((*base.layers[:first], *self.one_hot().layers[first:])))

            def run(plans: list[Plan] = plans) -> None:
                self.evaluator.evaluate(plans[-1])

            note = f"{1 - first / layers:.2f} of the layers"
            self._case(f"prefix reuse from layer {first}", run, before=before, note=note)
        self.evaluator.clear()

    def _loss_aware(self) -> None:
        limit = max(1, min(self.evaluator.examples, 16))
        batch_tokens = min(self.evaluator.batch_tokens, 4096)
        calibration = Calibration(self.model, self.tokenizer, self.task, limit=limit, batch_tokens=batch_tokens)
        plan("loss_aware", calibration, keep=self.shape.experts // 2)

    def _generation(self) -> None:
        prompts = ["".join(chr(97 + i % 26) for i in range(n, n + self.window // 2)) for n in range(16)]
        rows = [Example(str(i), prompt, (" a",), 0) for i, prompt in enumerate(prompts)]
        length = 4 if self.args.small else 32
        task = GenerationTask("letters", search=rows, max_new_tokens=length)
        evaluator = Evaluator(self.model, self.tokenizer, task, batch_tokens=self.evaluator.batch_tokens)
        for case, made_plan in (("generation, bare", None), ("generation, one-hot", self.one_hot())):
            self._case(case, partial(evaluator.generate, made_plan), tokens=16 * length)

    def one_hot(self) -> Plan:
        n, keep = self.shape.experts, max(self.shape.k, self.shape.experts // 2)
        rows = [sorted(self.rng.permutation(n)[:keep].tolist()) for _ in range(self.shape.layers)]
        return Plan.one_hot(rows, experts=n, k=self.shape.k)

    def dense(self) -> Plan:
        n, keep = self.shape.experts, max(self.shape.k, self.shape.experts // 2)
        one_hot = np.eye(n, dtype=np.float32)[:keep]
        parts = [one_hot + 0.1 * self.rng.random((keep, n), np.float32) for _ in range(self.shape.layers)]
        return Plan(tuple(LayerPlan(n, self.shape.k, w_em=w_em, w_rm=one_hot) for w_em in parts))


def made(name: str, device: Device, small: bool) -> Any:
    """A model of random weights, made on the device a tensor at a time, with as many layers as fit."""
    settings = SHAPES[name] | ({key: value for key, value in SMALL.items() if key in SHAPES[name]} if small else {})
    settings = {key: value for key, value in settings.items() if key != "model_type"}

    def empty(layers: int) -> Any:
        config = AutoConfig.for_model(SHAPES[name]["model_type"], **settings | {"num_hidden_layers": layers})
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=device.dtype).eval()

    with_one, with_two = (sum(p.nbytes for p in empty(layers).parameters()) for layers in (1, 2))
    fitting = int((FILLED * free_bytes(device.device) - (2 * with_one - with_two)) // (with_two - with_one))
    if fitting < 2:
        raise SystemExit(
            f"not even two layers of {name}, {with_two / 1e9:.1f} GB, fit into {FILLED:.0%} of free memory"
        )
    model = empty(min(settings["num_hidden_layers"], fitting))
    rotary = type(model.model.rotary_emb)
    model.to_empty(device=device.device)
    model.model.rotary_emb = rotary(model.config).to(device.device)  # whose frequencies are no parameters
    generator = torch.Generator(device.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)  # norms
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def table_of(device: Device, rows: list[Row]) -> Table:
    table = Table(title=f"{device.name()}: {device.flops / 1e12:.3g} TFLOP/s, {device.bandwidth / 1e9:.4g} GB/s copied")
    for column in ("model", "case", "seconds", "over bare", "limit", "tokens/s", "peak GiB", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        numbers = (row.seconds, row.over_bare, row.limit_seconds, row.tokens_per_second, row.peak_gib)
        table.add_row(row.model, row.case, *("" if x is None else f"{x:,.3g}" for x in numbers), row.note)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What moeopt costs on one GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=None, help="of one evaluation [65536; small: 512]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no case is begun [8]")
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--json", type=Path, default=Path("on_gpu.json"))
    args = parser.parse_args(arguments)
    started = time.monotonic()
    args.tokens = args.tokens or (512 if args.small else 65536)
    moeopt.models.check_device(args.device, "--device")
    device = Device(args.device, args.small)
    rows: list[Row] = []
    for place, name in enumerate(args.models):
        # the last case begun may take half a minute; later models get their share of the time
        share = (args.minutes * 60 - 30) * (place + 1) / len(args.models)
        bench = Bench(name, device, args, started + share)
        try:
            bench.run()
        except (RuntimeError, MemoryError) as error:  # what was measured before it is kept
            first = str(error).partition("\n")[0]
            bench.rows.append(Row(name, "failed", None, note=f"{type(error).__name__}: {first}"))
        rows += bench.rows
        del bench
        with suppress(RuntimeError):
            device.reset_peak()
    Console(width=150).print(table_of(device, rows))
    facts = {
        "device": device.name(), "torch": torch.__version__, "moeopt": moeopt.__version__,
        "flops": device.flops, "bandwidth": device.bandwidth, "tokens": args.tokens, "small": args.small,
        "seconds": time.monotonic() - started, "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    write_atomically(args.json, json.dumps(facts, indent=2, allow_nan=False).encode())
    if any(row.case == "failed" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
