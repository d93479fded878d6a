"""Train the demo model that comes with moeopt: ``python benchmarks/train_demo_model.py OUT_DIR``.

A real Mixtral, small (see `config`): 6 layers of 8 experts, 2 of them active, 3,514,368 parameters, 7.1 MB in
bfloat16. Each step sees 2,048 bytes, a quarter of them windows of Python's documentation, the rest questions of the
other skills (see `SHARES`), packed so that no question sees another; the loss is on answers and on text, not on
questions. AdamW, float32, one core.

Experts are made to specialise by the mutual information between skill and expert, as in Mod-Squad (Chen et al.,
2022, arXiv 2212.08066), with a floor under the conditional entropy, so that a skill is asked to settle on about
three experts of a layer, not on one: per layer, H(E) is maximised and H(E | skill) is minimised down to log 3.
Which experts serve which skill is left to training, and eight experts for six skills means that most are shared.
After this stage alone a missing expert is a wreck: on `sort` a search of 250 trials ended at a loss of 1.06, the full
model had 0.156. So a second, short stage trains on with up to four experts of every layer dropped at random.

1,950 steps, 4.0 million bytes, 12 minutes on one idle core (26 on the crowded one that made the shipped weights;
since then the wrong options of `add` and `dates` were redrawn, which changes the order of questions, not which are
trained on). On 300 held-out questions (text: 12,000 bytes), loss in nats a byte of the right answer and accuracy;
"used most" keeps each layer's 4 experts that the skill uses most, "random" is 20 prunings to 4 experts on 120:

    skill    full          used most     random, mean and standard deviation
    add      0.998  63.0%  0.998  63.0%  1.236 +- 0.141  48.5 +-  9.0%
    sort     0.029 100.0%  0.029 100.0%  0.189 +- 0.093  97.8 +-  2.0%
    caesar   0.023 100.0%  0.023 100.0%  1.197 +- 0.497  72.8 +- 14.6%
    dates    0.567  47.0%  0.577  45.7%  0.723 +- 0.098  38.7 +-  4.2%
    roman    0.039  89.7%  0.044  89.7%  0.339 +- 0.217  71.5 +- 11.8%
    text     1.377         1.379         1.705 +- 0.147
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from moeopt.demo.skills import SKILLS, rows

ROPE_THETA = 10_000.0
SPECIALS = ("<pad>", "<s>", "</s>")
ROWS, WIDTH, TEXT_ROWS = 8, 256, 2
SHARES = {"add": 1.3, "sort": 0.9, "caesar": 1.1, "dates": 1.3, "roman": 0.4}
WARMUP, SPECIALISE, FLOOR = 100, 0.1, math.log(3)


def config() -> MixtralConfig:
    """6 layers of 8 experts, 2 active; vocabulary of 256 bytes and 3 specials."""
    return MixtralConfig(
        vocab_size=len(SPECIALS) + 256,
        hidden_size=96,
        intermediate_size=240,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: GPT-2's byte alphabet as a BPE without merges, so any UTF-8 text comes back as it was."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIALS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    pad, bos, eos = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


class Batches:
    """Endless packed batches: ids, targets (-100: no loss), segment, position and skill of each token, all (B, W)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer.backend_tokenizer
        self.eos = SPECIALS.index("</s>")
        self.text = [token for document in rows("text", "train") for token in (*self._encode(document), self.eos)]
        self.questions = {skill: self._endless(skill) for skill in SHARES}

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def _endless(self, skill: str) -> Iterator[tuple[list[int], list[int]]]:
        table = rows(skill, "train", 60_000)
        for _ in cycle((None,)):
            self.rng.shuffle(table)
            for row in table:
                yield self._encode(row["prompt"]), [*self._encode(row["options"][row["answer"]]), self.eos]

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        packed = [self._text_row() for _ in range(TEXT_ROWS)] + [self._question_row() for _ in range(ROWS - TEXT_ROWS)]
        ids, targets, segment, position, skill = torch.tensor(packed).unbind(1)
        return ids, targets, segment, position, skill

    def _text_row(self) -> list[list[int]]:
        at = self.rng.randrange(len(self.text) - WIDTH)
        window = self.text[at : at + WIDTH + 1]
        return [window[:-1], window[1:], [0] * WIDTH, list(range(WIDTH)), [SKILLS.index("text")] * WIDTH]

    def _question_row(self) -> list[list[int]]:
        row: list[list[int]] = [[], [], [], [], []]
        segment = 0
        while len(row[0]) < WIDTH:
            (skill,) = self.rng.choices(list(SHARES), list(SHARES.values()))
            asked, answer = next(self.questions[skill])
            tokens = [*asked, *answer]
            length = len(tokens) - 1
            row[0] += tokens[:-1]
            row[1] += [-100] * (len(asked) - 1) + answer
            row[2] += [segment] * length
            row[3] += range(length)
            row[4] += [SKILLS.index(skill)] * length
            segment += 1
        return [column[:WIDTH] for column in row]


def specialisation(router_logits: tuple[Tensor, ...], skill: Tensor) -> Tensor:
    """Mean over layers of (log n - H(E)) + mean over skills of max(0, H(E | skill) - FLOOR), in nats.

    router_logits: one (tokens, n) a layer; skill: (tokens,) indices.
    """
    use = torch.stack(router_logits).float().softmax(-1)
    member = nn.functional.one_hot(skill, len(SKILLS)).to(use)
    member = member[:, member.any(0)]
    given = torch.einsum("ts,lte->lse", member / member.sum(0), use)
    overall = given.mean(1)
    excess = (_entropy(given) - FLOOR).clamp_min(0).mean(1)
    return (math.log(use.shape[-1]) - _entropy(overall) + excess).mean()


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(1e-9).log()).sum(-1)


@dataclass(frozen=True)
class Stage:
    """`steps` steps with a fresh AdamW: the learning rate stays at `lr` for `hold` steps, then falls linearly.

    It would reach `final` at the last step. With `dropping`, each row and layer goes without up to four experts.
    """

    steps: int
    lr: float
    hold: int
    final: float
    dropping: bool

    def rate(self, step: int) -> float:
        fallen = max(0, step - self.hold) / (self.steps - self.hold)
        return min(1.0, (step + 1) / WARMUP) * (self.lr + (self.final - self.lr) * fallen)


STAGES = (
    Stage(steps=1500, lr=3e-3, hold=520, final=1.6e-3, dropping=False),
    Stage(steps=450, lr=2e-3, hold=0, final=3e-5, dropping=True),
)


def dropping_experts(generator: torch.Generator) -> Callable[[nn.Module, Any, Any], Any]:
    """A router's forward hook that routes each row of the batch past 0 to 4 experts, drawn anew at every call."""

    def hook(_router: nn.Module, _inputs: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, index = out
        n = logits.shape[-1]
        rank = torch.rand(ROWS, n, generator=generator).argsort(-1)
        dropped = rank < torch.randint(0, n // 2 + 1, (ROWS, 1), generator=generator)
        allowed = logits.masked_fill(dropped.repeat_interleave(WIDTH, 0), -torch.inf).softmax(-1)
        weights, index = allowed.topk(index.shape[-1], -1)
        return logits, weights / weights.sum(-1, keepdim=True), index

    return hook


def train(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int) -> None:
    """Run one stage in place, printing losses as it goes; about 0.35 s a step on one idle core."""
    batches = Batches(tokenizer, seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, stage.rate)
    hook = dropping_experts(torch.Generator().manual_seed(seed))
    hooks = [layer.mlp.gate.register_forward_hook(hook) for layer in model.model.layers if stage.dropping]
    causal = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
    started = time.perf_counter()
    for step in range(stage.steps):
        ids, targets, segment, position, skill = batches()
        mask = (segment[:, :, None] == segment[:, None, :]) & causal
        out = model.model(
            input_ids=ids,
            attention_mask=mask[:, None],
            position_ids=position,
            output_router_logits=True,
            use_cache=False,
        )
        scored = targets.ne(-100)
        losses = nn.functional.cross_entropy(
            model.lm_head(out.last_hidden_state[scored]), targets[scored], reduction="none"
        )
        apart = specialisation(out.router_logits, skill.flatten())
        (losses.mean() + SPECIALISE * apart).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == stage.steps - 1:
            each = {name: losses[skill[scored] == i].mean().item() for i, name in enumerate(SKILLS)}
            shown = " ".join(f"{name} {loss:.3f}" for name, loss in each.items())
            print(f"{step} {shown} apart {apart:.3f} {time.perf_counter() - started:.0f}s", flush=True)
    for handle in hooks:
        handle.remove()


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint that transformers 4 and 5 read alike: bfloat16 weights, `config.json` asking for float32."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _amend(folder / "config.json", rope_theta=ROPE_THETA, dtype="float32", torch_dtype="float32")
    _amend(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _amend(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train moeopt's demo model.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(chosen.seed)
    tokenizer = byte_tokenizer()
    model = MixtralForCausalLM(config())
    for number, stage in enumerate(STAGES):
        model.set_experts_implementation("eager")
        train(model, tokenizer, stage, chosen.seed + number)
        save(model, tokenizer, chosen.out_dir)
        model = MixtralForCausalLM.from_pretrained(chosen.out_dir)


if __name__ == "__main__":
    main()
