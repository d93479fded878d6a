# MIT License
#
# Copyright (c) the moeopt authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
# documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
# rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
# persons to whom the Software is furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
# Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
# WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
# COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
# OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""A Mixtral whose experts moeopt pruned or merged in a way that the stock class has no place for.

It needs torch and transformers 5, nothing of moeopt. The field ``moeopt`` of config.json has one entry a MoE layer in

* ``experts``: r, how many experts the layer has, of the ``full`` model's n;
* ``active``: k, how many of them a token runs;
* ``router``: ``"rows"``, the family's own routing over r logits; ``"prob"``, the n scores of the full router are mapped
  by ``w_rm`` (r, n) before top-k (EEP, arXiv 2407.00945), and by it also a bias that corrects the choice; ``"alias"``,
  the full router picks k of n, and expert ``aliases[j]`` answers for j (HC-SMoE, arXiv 2410.08589); ``"whole"``, the
  full router picks k of n, and j is the layer's expert ``places[j]``, or, if that is r or more, gives row ``places[j] -
  r`` of ``novices`` (n - r, hidden), outputs that are the same for all tokens (MoNE, github.com/zxgx/mode-pd);
* ``negative``: what ``"prob"`` makes of negative mapped scores, ``"clamp"`` or, as they are, ``"eep"``;
* ``skip``: beta of dynamic skipping, 0 for none: experts of a token whose weight is below beta times its largest are
  not run (NAEE, arXiv 2402.14800);

and ``rule``, how the family makes weights of logits. On disk the fields for the number of experts hold lists, so that
no stock class takes the checkpoint for one of its own.

It can be trained. Parameters are those of the family's class: experts, merged or not, routers, attention. ``w_rm``,
``aliases``, ``places`` and ``novices`` are constants of the plan, thus buffers: gradients pass through them to the
router, but no optimiser moves or decays them. ``output_router_logits`` adds the family's load balancing loss, of the r
experts among which a router shares tokens out, or of all n where it picks among them first; where layers differ in
experts or k, it is the mean of the layers' own.
"""

# mypy: ignore-errors

import functools
import inspect
import sys
from contextlib import nullcontext

import torch
import transformers
from torch import nn

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"this checkpoint needs transformers 5 or later, here is {transformers.__version__}")

from transformers import MixtralConfig, MixtralForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

# of rules, in checkpoints that were written before there were such
SINCE = {"groups": 1, "returns_scores": False, "multiplier": 1.0, "jitter": 0.0, "factor": None}
OWN = (".w_rm", ".aliases", ".places", ".novices")
BALANCE = getattr(sys.modules[MixtralForCausalLM.__module__], "load_balancing_loss_func", None)


class MoeoptMixtralConfig(MixtralConfig):
    model_type = "moeopt_mixtral"
    moeopt = None

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        for full in (config_dict.get("moeopt") or {"full": {}})["full"].values():
            text = config_dict.get("text_config")
            config_dict = {**config_dict, **(full if text is None else {"text_config": {**text, **full}})}
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self):
        fields = super().to_dict()
        if self.moeopt is not None:
            for kind, full in self.moeopt["full"].items():
                fields.get("text_config", fields).update({key: list(self.moeopt[kind]) for key in full})
        return fields


class MoeoptRouter:
    """Mixed into the family's router, whose forward still gives the logits."""

    def forward(self, hidden_states, *args, **kwargs):
        plan, output = self.moeopt, super().forward(hidden_states, *args, **kwargs)
        if len(output) == 2:  # weights of all experts, which hidden states are multiplied with (Llama 4)
            weights, logits = output
            index = logits.topk(plan["active"], -1).indices
            weights = weights.gather(-1, index)
        else:
            logits, weights, index = output
        if plan["router"] == "prob":
            top, index = self._mapped(logits)
        elif plan["skip"]:
            whole, index = self._selected(logits)
            top = self._skipped(whole)
            if plan["rule"]["normalised"]:
                rest = top.sum(-1, keepdim=True)
                top = top * (whole.sum(-1, keepdim=True) / rest.masked_fill(rest == 0, 1.0))
            factor = self._named("factor")
            top = top if factor is None else top * factor[index]
        else:
            top = weights
        if plan["router"] == "alias":
            index = self.aliases[index]
        if plan["router"] == "whole":
            index = self.places[index]
        top = top.to(weights.dtype)
        if len(output) == 2:
            return top.new_zeros(len(top), plan["experts"]).scatter_add(1, index, top), logits
        return logits, top, index

    def _scores(self, logits):
        rule = self.moeopt["rule"]
        if rule["returns_scores"]:
            return logits
        logits = logits.float() if rule["float32_scores"] else logits
        return logits.sigmoid() if rule["score"] == "sigmoid" else logits.softmax(-1)

    def _mapped_scores(self, logits):
        with nullcontext() if logits.is_meta else torch.autocast(logits.device.type, enabled=False):
            return self._scores(logits).float() @ self.w_rm.float().T

    def mapped_logits(self, logits):
        """Logits whose softmax is the shares of the r experts, (tokens, r), for the load balancing loss."""
        return self._mapped_scores(logits).clamp(min=torch.finfo(torch.float32).tiny).log()

    def _mapped(self, logits):
        """Weights and experts from mapped scores."""
        rule, clamp = self.moeopt["rule"], self.moeopt["negative"] == "clamp"
        w_rm, correction, factor = self.w_rm.float(), self._named("correction"), self._named("factor")
        mapped = self._mapped_scores(logits)
        mapped = mapped.clamp(min=0) if clamp else mapped
        top, index = self._chosen(mapped, None if correction is None else w_rm @ correction.float())
        top = self._skipped(top)
        total = top.sum(-1, keepdim=True)
        if clamp:
            total = total.masked_fill(total == 0, 1.0)
        top = (top / total if rule["normalised"] else top) * rule["scale"]
        return top if factor is None else top * (w_rm @ factor.float())[index], index

    def _selected(self, logits):
        """Weights, before they are rounded, and experts by the family's rule."""
        rule, k = self.moeopt["rule"], self.moeopt["active"]
        if rule["score"] == "selected":
            logits = logits.float() if rule["float32_scores"] else logits
            top, index = logits.topk(k, -1, sorted=rule["ordered"])
            top = top.softmax(-1)
        elif rule["score"] == "sparsemixer":
            left, picks = logits, []
            for _ in range(k):
                largest, index = left.max(-1, keepdim=True)
                far = (largest - logits) / logits.abs().clamp(min=largest) > 2 * rule["jitter"]
                picks.append((left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, index), index))
                left = left.scatter(-1, index, -torch.inf)
            top, index = (torch.cat(parts, -1) for parts in zip(*picks))
        else:
            top, index = self._chosen(self._scores(logits), self._named("correction"))
        if rule["renormalise"]:
            top = top / (top.sum(-1, keepdim=True) + rule["epsilon"])
        return top * rule["scale"], index

    def _named(self, role):
        """What is added to the n scores for the choice, or multiplied with the weights of n experts, (n,), if any."""
        name = self.moeopt["rule"][role]
        if name is None:
            return None
        if name.startswith("../"):  # of the block
            return getattr(self.block[0], name[3:]).reshape(-1)
        path, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(path), leaf).reshape(-1)

    def _chosen(self, scores, correction):
        """Scores and numbers of the k experts of largest corrected score, of the best groups where there are groups."""
        rule, k = self.moeopt["rule"], self.moeopt["active"]
        choice = scores if correction is None else scores + correction
        if rule["groups"] > 1:
            grouped = choice.unflatten(-1, (rule["groups"], -1))
            best = grouped.amax(-1) if rule["group_score"] == "max" else grouped.topk(2, dim=-1).values.sum(-1)
            index = best.topk(rule["kept_groups"], dim=-1, sorted=False).indices
            inside = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, index, True)
            outside = 0.0 if rule["zero_outside"] else -torch.inf
            choice = grouped.masked_fill(~inside[..., None], outside).flatten(-2)
        top, index = choice.topk(k, -1, sorted=rule["ordered"])
        if correction is not None or (rule["groups"] > 1 and rule["group_score"] != "max"):
            top = scores.gather(-1, index)
        return top, index

    def _skipped(self, top):
        largest = top.amax(-1, keepdim=True)
        beta = self.moeopt["skip"]
        return top.masked_fill((top < beta * largest) & (top < largest), 0.0) if beta else top


class MoeoptExperts:
    """Mixed into the family's experts: those whose weight is 0 do not run."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        active = top_k_weights != 0
        token, place = active.nonzero(as_tuple=True)
        if len(token) == active.numel():
            return super().forward(hidden_states, top_k_index, top_k_weights)
        outputs = hidden_states.new_zeros(*active.shape, hidden_states.shape[-1])
        if len(token):
            pairs = top_k_index[token, place][:, None], top_k_weights[token, place][:, None]
            outputs[token, place] = super().forward(hidden_states[token], *pairs)
        return outputs.sum(1)


class MoeoptNovices(MoeoptExperts):
    """Mixed into the family's experts: numbers behind theirs are those of constants."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        r = self.moeopt["experts"]
        kept = top_k_weights.masked_fill(top_k_index >= r, 0.0)
        given = super().forward(hidden_states, top_k_index, kept)
        weights = torch.zeros(len(top_k_index), r + len(self.novices), dtype=torch.float32, device=given.device)
        weights = weights.scatter_(1, top_k_index, top_k_weights.float())[:, r:]
        return (given.float() + weights @ self.novices.float()).to(given.dtype)


class MoeoptMixtralForCausalLM(MixtralForCausalLM):
    config_class = MoeoptMixtralConfig

    def __init__(self, config):
        super().__init__(config)
        blocks = [block for block in self.modules() if isinstance(getattr(block, "experts", None), nn.Module)]
        lists = ("experts", "active", "router", "negative", "skip")
        layers = [dict(zip(lists, values)) for values in zip(*(config.moeopt[name] for name in lists))]
        if len(layers) != len(blocks):
            raise ValueError(f"config.moeopt describes {len(layers)} MoE layers, the model has {len(blocks)}")
        (n,) = set(config.moeopt["full"]["experts"].values())
        self.plans, self.routed = layers, None
        for block, layer in zip(blocks, layers):
            router = _fit(block, n, {**layer, "rule": {**SINCE, **(config.moeopt["rule"] or {})}})
            router.register_forward_hook(self._note)

    @functools.wraps(MixtralForCausalLM.forward)
    def forward(self, *args, output_router_logits=None, **kwargs):
        if BALANCE is None:
            given = {} if output_router_logits is None else {"output_router_logits": output_router_logits}
            return super().forward(*args, **given, **kwargs)
        if output_router_logits is None:
            output_router_logits = getattr(self.config.get_text_config(), "output_router_logits", False)
        if not output_router_logits:
            return super().forward(*args, output_router_logits=False, **kwargs)
        as_dict = kwargs.pop("return_dict", None)
        self.routed = []
        try:
            output = super().forward(*args, output_router_logits=False, return_dict=True, **kwargs)
        finally:
            routed, self.routed = self.routed, None
        mask = inspect.signature(super().forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        output.router_logits = tuple(logits for _, logits in routed)
        output.aux_loss = self._balance(routed, mask)
        if output.loss is not None:
            settings = self if hasattr(self, "router_aux_loss_coef") else self.config.get_text_config()
            output.loss = output.loss + settings.router_aux_loss_coef * output.aux_loss.to(output.loss.device)
        return output if as_dict or (as_dict is None and self.config.return_dict) else output.to_tuple()

    def _note(self, router, args, output):
        if self.routed is not None:  # which it is while a layer is run again for its gradients
            self.routed.append((router, output[0]))

    def _balance(self, routed, mask):
        """The family's load balancing loss; it takes layers of one size, so of several the mean of the layers' own."""
        logits = [
            router.mapped_logits(part) if plan["router"] == "prob" else part
            for (router, part), plan in zip(routed, self.plans, strict=True)
        ]
        sizes = [(part.shape[-1], plan["active"]) for part, plan in zip(logits, self.plans)]
        if len(set(sizes)) == 1:
            return BALANCE(tuple(logits), *sizes[0], mask)
        losses = [BALANCE((part,), *size, mask) for part, size in zip(logits, sizes)]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    @classmethod
    def _can_set_experts_implementation(cls):  # transformers looks for the answer in the source of the class
        return MixtralForCausalLM._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls):
        return MixtralForCausalLM._can_set_attn_implementation()

    def tie_weights(self, missing_keys=None, **options):
        lost = sorted(name for name in missing_keys or () if name.endswith(OWN))
        if lost:
            raise ValueError(f"the checkpoint lacks {', '.join(lost)}, without which the model is another one")
        return super().tie_weights(missing_keys=missing_keys, **options)


def _fit(block, n, plan):
    """Make a block of the full model the one that the plan describes, and give its router; weights are to be loaded."""
    router = block.gate if isinstance(getattr(block, "gate", None), nn.Module) else block.router
    experts, r = block.experts, plan["experts"]
    _resize(experts, n, r)
    if plan["router"] == "rows":
        for module in router.modules():
            _resize(module, n, r)
        _resize(block, n, r, inspect.signature(router.forward).parameters)  # what it gives its router
    for module in (block, router):
        if hasattr(module, "top_k"):
            module.top_k = plan["active"]
    if plan["router"] != "rows" or plan["skip"]:
        router.__class__ = type(f"Moeopt{type(router).__name__}", (MoeoptRouter, type(router)), {})
        router.moeopt, router.block = plan, (block,)  # in a tuple, as a module would be a part of the router
    if plan["router"] == "prob":
        router.register_buffer("w_rm", torch.eye(r, n, dtype=torch.float32))
    if plan["router"] == "alias":
        router.register_buffer("aliases", torch.arange(n) % r)
    if plan["router"] == "whole":
        router.register_buffer("places", torch.arange(n))
        hidden = next(p for p in router.parameters() if p.ndim == 2).shape[1]
        experts.register_buffer("novices", torch.zeros(n - r, hidden, dtype=torch.float32))
        experts.moeopt = plan
    if plan["router"] == "whole" or plan["skip"]:
        if len(inspect.signature(type(experts).forward).parameters) == 2:
            raise ValueError("experts that are not told what was picked run for every token, skipped or not")
        mixed = MoeoptNovices if plan["router"] == "whole" else MoeoptExperts
        experts.__class__ = type(f"Moeopt{type(experts).__name__}", (mixed, type(experts)), {})
    return router


def _resize(module, n, r, only=None):
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if only is not None and name not in only:
                continue
            if tensor is not None and tensor.ndim and n in (tensor.shape[0], tensor.shape[-1]):
                smaller = tensor.detach().narrow(0 if tensor.shape[0] == n else -1, 0, r).clone()
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(smaller, tensor.requires_grad) if is_parameter else smaller
    for name, value in vars(module).items():
        if type(value) is int and value == n and ("expert" in name or name == "out_features"):
            setattr(module, name, r)


# the names that the tensors of a checkpoint have on disk, by type and by class
for theirs, own in (("mixtral", "moeopt_mixtral"), ("MixtralForCausalLM", "MoeoptMixtralForCausalLM")):
    mapping = get_checkpoint_conversion_mapping(theirs)
    if mapping is not None:
        register_checkpoint_conversion_mapping(own, mapping, overwrite=True)
