"""A script for a fresh process: loads a checkpoint as anyone would, without moeopt, and writes down what it computes.

    python reloading.py FOLDER REQUEST RESULT OPTIONS

REQUEST is a safetensors file of token sequences, int64 (1, tokens) each; RESULT gets the logits of each, float32, and
``generated``, the tokens that greedy decoding puts behind ``prompt``. OPTIONS is JSON; its ``auto_class`` is the class
of transformers that loads the checkpoint, its ``unread`` are tensors that the class of the original does not read
either, and ``beside`` ends of names of others, which quantised layers use.
"""

from __future__ import annotations

import json
import sys
from typing import Any


class NoMoeopt:
    """An import hook that makes moeopt unimportable."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "moeopt":
            raise ImportError("this process does without moeopt")


def compute(model: Any, request: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Logits, float32 (1, tokens, vocabulary), of every sequence, and a greedy continuation of ``prompt``."""
    import torch

    device = model.get_input_embeddings().weight.device
    results = {}
    with torch.inference_mode():
        for name, ids in request.items():
            logits = model(input_ids=ids.to(device), use_cache=False).logits
            results[name] = logits.float().cpu().contiguous()
        ids = request["prompt"].to(device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    results["generated"] = output.sequences[:, ids.shape[1] :].cpu().contiguous()
    results["steps"] = torch.stack(output.logits, 1).float().cpu().contiguous()
    return results


def main() -> None:
    sys.meta_path.insert(0, NoMoeopt())  # type: ignore[arg-type]
    folder, request, result, text = sys.argv[1:]
    options = json.loads(text)
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(options["threads"])
    stored_as = options["dequantised_by"]  # the original's weights were, whether or not this machine could do without
    more = {"quantization_config": getattr(transformers, stored_as)(dequantize=True)} if stored_as else {}
    model, info = getattr(transformers, options["auto_class"]).from_pretrained(
        folder,
        dtype="auto",
        device_map=options["device_map"],
        trust_remote_code=options["trust_remote_code"],
        output_loading_info=True,
        **more,
    )
    unexpected = set(info["unexpected_keys"]) - set(options["unread"])
    info["unexpected_keys"] = {name for name in unexpected if not name.endswith(tuple(options["beside"]))}
    wrong = [f"{kind.replace('_', ' ')}: {sorted(map(str, names))[:5]}" for kind, names in info.items() if names]
    if wrong:
        raise SystemExit("; ".join(wrong))
    assert "moeopt" not in sys.modules
    save_file(compute(model.eval(), load_file(request), options["new_tokens"]), result)


if __name__ == "__main__":
    main()
