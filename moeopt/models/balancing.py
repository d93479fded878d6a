"""The auxiliary load balancing loss of a model under a plan: that of the experts which the plan has."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.errors import ModelError
from moeopt.models.routing import RoutingRule
from moeopt.plan import LayerPlan, Plan

LoadBalancing = Callable[..., Tensor]
"""transformers' `load_balancing_loss_func(router_logits, experts, k, attention_mask)`."""


class BalancedLoss:
    """A forward hook of a whole model that puts `aux_loss` right, and with it `loss`.

    `output_router_logits=True` makes a model add `load_balancing_loss_func` of all n experts' logits; under a plan it
    is that of the r experts which a smaller checkpoint would have. `router_logits` stay n wide. Where layers differ in
    r or k, which that function does not know, it is the mean of the layers' own losses.
    """

    def __init__(self, model: nn.Module, plan: Plan, rules: Sequence[RoutingRule]) -> None:
        self.plan, self.rules = plan, rules
        module = sys.modules[type(model).__module__]
        self.function: LoadBalancing | None = getattr(module, "load_balancing_loss_func", None)
        self._parameters = inspect.signature(model.forward)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = getattr(output, "aux_loss", None)
        if self.function is None or not isinstance(before, Tensor):
            return output
        if len(output.router_logits) != len(self.plan.layers):
            raise ModelError(
                f"{type(model).__name__} gives the router logits of {len(output.router_logits)} layers, of which "
                f"{len(self.plan.layers)} have a plan: the load balancing loss under a plan is not known; call it "
                "without output_router_logits"
            )
        mask = self._parameters.bind_partial(*args, **kwargs).arguments.get("attention_mask")
        logits = [mapped(*each) for each in zip(output.router_logits, self.plan.layers, self.rules)]
        # transformers' function takes one n and one k for all layers, and concatenates their logits
        sizes = [(part.shape[-1], layer.k) for part, layer in zip(logits, self.plan.layers)]
        if len(set(sizes)) == 1:
            after = self.function(tuple(logits), *sizes[0], mask)
        else:
            each = [self.function((part,), *size, mask) for part, size in zip(logits, sizes)]
            after = torch.stack([loss.to(before.device) for loss in each]).mean()
        output.aux_loss = after
        if output.loss is not None:
            # The model added it to the loss already: the difference corrects that, on whatever device the loss is.
            config: Any = model.config
            weight = getattr(model, "router_aux_loss_coef", config.get_text_config().router_aux_loss_coef)
            output.loss = output.loss + weight * (after - before).to(output.loss.device)
        return output


def mapped(logits: Tensor, layer: LayerPlan, rule: RoutingRule) -> Tensor:
    """(tokens, n) logits of the full router -> (tokens, r) logits, whose softmax is what the plan's router shares out.

    Where the planned router goes on to choose among all n experts, the (tokens, n) logits as they are.
    """
    if layer.picks_among_all or layer.is_identity:
        return logits
    if layer.router_rows is not None and layer.router != "prob":
        return logits[:, list(layer.router_rows)]
    matrix = torch.from_numpy(layer.router_matrix.copy()).to(logits.device)
    if layer.router == "logit":
        return (logits.float() @ matrix.T).to(logits.dtype)
    # the loss takes the softmax of logits: that of log p' is p' / sum p'; log 0 has no derivative
    return (rule.scores(logits).float() @ matrix.T).clamp(min=torch.finfo(torch.float32).tiny).log()
