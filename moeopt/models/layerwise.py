"""A model taken apart into embedding, decoder layers and head, each run on its own, bit for bit as in the whole.

(Where a kernel gives other bits each time it runs, within rounding: `rounding.is_exact` tells.)

The layers' calls are learnt by running the model's own forward with every decoder layer replaced by a stand-in that
notes its arguments; the head is that same forward with the last stand-in answering the given hidden states. So masks,
positions, norms, scalings and soft caps are the model's own, whatever its class.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import named_module_tensors, send_to_device
from torch import Tensor, nn

from moeopt.errors import ModelError
from moeopt.models import rounding
from moeopt.models.devices import is_cuda
from moeopt.models.layers import moe_layers

Inputs = Mapping[str, Any]
Sent = dict[Any, dict[str, Tensor]]
"""By hook of accelerate's, weights that are on its device before it asks for them."""


@dataclass(frozen=True, eq=False)
class Call:
    """How a model calls one decoder layer: the hidden states come first, or under `hidden_states`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def __call__(self, layer: nn.Module, hidden: Tensor, device: torch.device | None = None) -> Tensor:
        """The layer's hidden states for `hidden`; arguments are moved to `device` where one is named."""
        args, kwargs = self.args, self.kwargs
        if device is not None:
            hidden, args, kwargs = hidden.to(device), send_to_device(args, device), send_to_device(kwargs, device)
        output = layer(*args, hidden_states=hidden, **kwargs) if self.by_name else layer(hidden, *args, **kwargs)
        left: Tensor = _first(output)
        return left


class Layerwise:
    """The parts of a causal language model; made by `layerwise`, which checks that they add up to the whole.

    Attributes:
        layers: the decoder layers, in the order they run.
        moe: for every MoE layer, the index of its decoder layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers, self.moe = _decoder_layers(model)
        self._model = weakref.ref(model)
        self._tuples = [False] * len(self.layers)
        self._streams: dict[torch.device, Any] = {}

    @property
    def model(self) -> nn.Module:
        model = self._model()
        assert model is not None
        return model

    def begin(self, inputs: Inputs) -> tuple[Tensor, list[Call]]:
        """Hidden states that enter the first layer, (rows, width, hidden), and how each layer is called.

        Args:
            inputs: what the model's forward takes: `input_ids`, `attention_mask`, ...
        """
        calls: list[Call] = []
        first: list[Tensor] = []

        def note(index: int, *args: Any, **kwargs: Any) -> Any:
            by_name = "hidden_states" in kwargs
            hidden = kwargs.pop("hidden_states") if by_name else args[0]
            first.append(hidden)
            calls.append(Call(args if by_name else args[1:], kwargs, by_name))
            return (hidden,) if self._tuples[index] else hidden

        self._forward(note, inputs, head=False)
        return first[0], calls

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) of hidden states that left the last layer, (tokens, hidden)."""
        last = len(self.layers) - 1

        def answer(index: int, *args: Any, **kwargs: Any) -> Any:
            given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            given = hidden[None] if index == last else given
            return (given,) if self._tuples[index] else given

        # as one sequence of hidden states in place of embedded tokens, which no layer looks at
        output = self._forward(answer, {"inputs_embeds": hidden[None]})
        logits: Tensor = output.logits[0]
        return logits

    def _forward(self, stand_in: Callable[..., Any], inputs: Inputs, head: bool = True) -> Any:
        """The model's forward with `stand_in(index, *args, **kwargs)` in place of every decoder layer."""
        with ExitStack() as stack:
            for i, layer in enumerate(self.layers):
                stack.enter_context(_forward_is(layer, lambda *args, i=i, **kwargs: stand_in(i, *args, **kwargs)))
            return self.model(**inputs, **self._options(head))

    def _options(self, all_logits: bool) -> dict[str, Any]:
        parameters = inspect.signature(self.model.forward).parameters
        options = {"use_cache": False, "output_router_logits": False, "logits_to_keep": 0 if all_logits else 1}
        return {name: value for name, value in options.items() if name in parameters or name == "use_cache"}

    def loaded(self, index: int) -> AbstractContextManager[torch.device | None]:
        """Layer `index` with its weights in place, to be called often: under accelerate's offload they are moved once.

        Yields their device, to which arguments must be moved.
        """
        return _loaded(self.layers[index].modules())

    def in_turn(self, first: int) -> Generator[tuple[int, torch.device | None], None, None]:
        """Layers from `first` on as by `loaded`, each in place until the next one is asked for; to be closed.

        Under offload to a CUDA device the next layer's weights are sent, on a stream of their own, when the work of a
        layer is queued: the device computes meanwhile. Two layers are on it then, or one where memory is short.
        """
        sent: Sent = {}
        for index in range(first, len(self.layers)):
            with _loaded(self.layers[index].modules(), sent) as there:
                yield index, there
                sent = self._sent(index + 1) if index + 1 < len(self.layers) else {}

    def _sent(self, index: int) -> Sent:
        device = runs_on(self.layers[index])
        if not is_cuda(device) or not any(_offloads(module) for module in self.layers[index].modules()):
            return {}
        here, side = torch.cuda.current_stream(device), self._streams.get(device)
        if side is None:
            side = self._streams[device] = torch.cuda.Stream(device)
        sent: Sent = {}
        try:
            with torch.cuda.stream(side):
                for module in self.layers[index].modules():
                    for hook in _offloading_hooks(module):
                        sent[hook] = _values(module, hook, device)
        except torch.OutOfMemoryError:
            return {}  # then it is fetched when its turn comes
        here.wait_stream(side)
        for values in sent.values():
            for value in values.values():
                value.record_stream(here)  # else its memory could be used again while the layer reads it
        return {hook: values for hook, values in sent.items() if values}

    def head_loaded(self) -> AbstractContextManager[torch.device | None]:
        """What follows the decoder layers with its weights in place, for `head` to be called often."""
        others = {id(module) for layer in self.layers for module in layer.modules()}
        others.add(id(self.model.get_input_embeddings()))  # type: ignore[operator]
        return _loaded(module for module in self.model.modules() if id(module) not in others)

    def check(self) -> None:
        """Run a few tokens in parts and as a whole; raises ModelError where the two differ."""
        name, n = type(self.model).__name__, len(self.layers)
        config: Any = self.model.config
        vocabulary = int(config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(0)
        device = input_device(self.model)
        batches = []
        for width in (6, 9):  # what a layer keeps may depend on nothing but shape and mask
            ids = torch.randint(vocabulary, (2, width), generator=generator)
            mask = torch.ones_like(ids)
            mask[1, width // 2 + 1 :] = 0
            batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
        runs = [self._watched(inputs) for inputs in batches]
        for run in runs:
            if [index for index, *_ in run[0]] != list(range(n)):
                raise ModelError(f"{name} does not run its {n} decoder layers once each, in order")
        for inputs, (records, _) in zip(batches, runs):
            self._tuples = [isinstance(output, tuple) for *_, output in records]
            if any(isinstance(o, tuple) and any(x is not None for x in o[1:]) for *_, o in records):
                raise ModelError(f"the decoder layers of {name} return more than hidden states")
            hidden, calls = self.begin(inputs)
            for (index, entering, call, output), learnt in zip(records, calls):
                before = hidden if index == 0 else _first(records[index - 1][3])
                if not _equal(entering, before):
                    raise ModelError(f"{name} changes the hidden states between decoder layers, before layer {index}")
                if not _equal((call.args, call.kwargs), (learnt.args, learnt.kwargs)):
                    raise ModelError(f"decoder layer {index} of {name} is given what earlier layers computed")
                if not isinstance(_first(output), Tensor):
                    raise ModelError(f"decoder layer {index} of {name} returns no tensor")
        # Not in the order of before: what a layer stored for a later one, or for a later batch, is stale now.
        for records, _ in reversed(runs):
            for index, entering, call, output in reversed(records):
                with self.loaded(index) as there:
                    if not self._repeats(index, call, entering, _first(output), there):
                        raise ModelError(f"{name} keeps state across layers: layer {index} alone gives something else")
        records, logits = runs[0]
        alone = self.head(_first(records[-1][3]).flatten(0, 1)).view(logits.shape)
        off = 1e-4 if logits.dtype == torch.float32 else 0.05
        spread = float(logits.float().nan_to_num(posinf=0.0, neginf=0.0).std())
        if not torch.allclose(alone.float(), logits.float(), rtol=off, atol=off * spread, equal_nan=True):
            raise ModelError(f"the head of {name} needs more than the hidden states of its last layer")

    def _repeats(self, index: int, call: Call, entering: Tensor, output: Tensor, there: torch.device | None) -> bool:
        """Whether a layer alone gives what it gave in the whole model.

        Bit for bit, as shapes are the same; only where it gives something else each time (it adds by atomics), within
        rounding. What differs from the whole but not from itself is state, however little.
        """
        alone = [call(self.layers[index], entering, there)]
        if _equal(alone[0], output):
            return True
        alone += [call(self.layers[index], entering, there) for _ in range(3)]
        terms = max(size for t in self.layers[index].parameters() for size in t.shape)
        near = rounding.near([output], [alone[0].to(output.device)], terms, rounding.IN_LAYER)
        if all(_equal(alone[0], other) for other in alone) or not near:
            return False
        rounding.note(self.model, "a decoder layer that runs again")
        return True

    def _watched(self, inputs: Inputs) -> tuple[list[tuple[int, Tensor, Call, Any]], Tensor]:
        """The whole model's run: (index, hidden states entering, call, output) of every layer called, and logits."""
        records: list[tuple[int, Tensor, Call, Any]] = []

        def watch(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                by_name = "hidden_states" in kwargs
                kwargs = dict(kwargs)
                hidden = kwargs.pop("hidden_states") if by_name else args[0]
                records.append((index, hidden, Call(args if by_name else args[1:], kwargs, by_name), output))

            return hook

        with ExitStack() as stack:
            for i, layer in enumerate(self.layers):
                handle = layer.register_forward_hook(watch(i), with_kwargs=True)
                stack.callback(handle.remove)
            output = self.model(**inputs, **self._options(True))
        return records, output.logits


_CHECKED: weakref.WeakKeyDictionary[nn.Module, tuple[Layerwise, str | None]] = weakref.WeakKeyDictionary()


@torch.inference_mode()
def layerwise(model: nn.Module) -> Layerwise:
    """The model in parts, checked once on a few tokens; the model must be in eval mode and bear no plan.

    Raises:
        ModelError: where the parts do not give, bit for bit, what the whole gives: state is kept across layers.
    """
    layers = _decoder_layers(model)[0]
    parts, refusal = _CHECKED.get(model, (None, None))
    if parts is None or len(parts.layers) != len(layers) or any(a is not b for a, b in zip(parts.layers, layers)):
        parts, refusal = Layerwise(model), None
        try:
            parts.check()
        except ModelError as error:
            refusal = str(error)
        except Exception as error:  # such as too little memory, which is no property of the model
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ModelError(f"{type(model).__name__} cannot be run layer by layer ({reason})") from error
        _CHECKED[model] = parts, refusal
    if refusal is not None:
        raise ModelError(refusal)
    return parts


def _decoder_layers(model: nn.Module) -> tuple[tuple[nn.Module, ...], tuple[int, ...]]:
    """The list of layers that holds every MoE layer, and the place of each MoE layer in it."""
    modules = dict(model.named_modules())
    homes, places = set(), []
    for layer in moe_layers(model):
        parts = layer.name.split(".")
        home = next((i for i in range(len(parts)) if isinstance(modules[".".join(parts[:i])], nn.ModuleList)), None)
        if home is None:
            raise ModelError(f"{layer.name} lies in no list of decoder layers")
        homes.add(".".join(parts[:home]))
        places.append(int(parts[home]))
    if len(homes) != 1:
        raise ModelError(f"the MoE layers lie in several lists of layers: {', '.join(sorted(homes))}")
    stack = modules[homes.pop()]
    assert isinstance(stack, nn.ModuleList)
    return tuple(stack), tuple(places)


@contextmanager
def _forward_is(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")  # accelerate puts one on the instance, else it is the class's
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def _loaded(modules: Iterable[nn.Module], sent: Sent | None = None) -> Iterator[torch.device | None]:
    device = None
    with ExitStack() as stack:
        for module in modules:
            if _offloads(module):
                # The hook's own fetch and drop, once around all calls; in between the module runs as it did before
                # accelerate wrapped it, which would fetch and drop at each.
                hook: Any = module._hf_hook
                stack.callback(hook.post_forward, module, None)
                with _from(sent or {}, _offloading_hooks(module)):
                    hook.pre_forward(module)
                stack.enter_context(_forward_is(module, module._old_forward))  # type: ignore[arg-type]
            device = next((p.device for p in module.parameters(recurse=False) if not p.is_meta), device)
        yield device


@contextmanager
def _from(sent: Sent, hooks: Iterable[Any]) -> Iterator[None]:
    """While the context is open, hooks find what was sent to the device already in place of what they would send."""
    with ExitStack() as stack:
        for hook in hooks:
            if hook in sent:
                stack.callback(setattr, hook, "weights_map", hook.weights_map)
                hook.weights_map = sent.pop(hook)
        yield


def _values(module: nn.Module, hook: Any, device: torch.device) -> dict[str, Tensor]:
    """What a hook would fetch, on the device; nothing where it does more than fetch: tied or 8-bit weights."""
    if hook.tied_params_names:
        return {}
    named = named_module_tensors(
        module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
    )
    values = {name: hook.weights_map[name] for name, _ in named}
    if any(value.dtype == torch.int8 for value in values.values()):
        return {}
    return {name: value.to(device, non_blocking=True) for name, value in values.items()}


def _offloading_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False)]


def _offloads(module: nn.Module) -> bool:
    return bool(_offloading_hooks(module))


def runs_on(module: nn.Module) -> torch.device:
    """Where a module computes: what its weights lie on, or where accelerate takes them from memory or disk."""
    for part in module.modules():
        if _offloads(part):
            return torch.device(_offloading_hooks(part)[0].execution_device)
        for parameter in part.parameters(recurse=False):
            if not parameter.is_meta:
                return parameter.device
    return torch.device("cpu")


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go; for offloaded weights the CPU, from where accelerate moves them."""
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator,union-attr]
    return torch.device("cpu") if device.type == "meta" else device


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _equal_with_nan(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def _equal(a: Any, b: Any) -> bool:
    """Bitwise equality of nested tuples, lists and dictionaries of tensors and plain values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        b = b.to(a.device)
        return a.dtype == b.dtype and (torch.equal(a, b) or (a.is_floating_point() and _equal_with_nan(a, b)))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and bool(a == b)
