"""Recording activations, compared with forward passes that do not record and with counting on the host."""

import copy

import torch

import neuron_specialization as ns
from neuron_specialization.analysis.timing import compare


def identification(model, batch: dict, repeats: int) -> list[dict]:
    """Compare recording activations with other passes over the same batches."""
    headless = copy.deepcopy(model).model
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    inputs["decoder_input_ids"] = batch["labels"]
    batches = [batch] * 2
    functions = {
        "ours": lambda: ns.record_activations(model, {"a-b": batches}, progress=False),
        "forward with loss": torch.no_grad()(lambda: [model.eval()(**each) for each in batches]),
        "headless forward": torch.no_grad()(lambda: [headless.eval()(**inputs) for _ in batches]),
        "copy to host and nonzero": lambda: [count_on_host(model, each) for each in batches],
    }
    targets = {"forward with loss": "<= 0.70", "headless forward": "<= 1.05", "copy to host and nonzero": "<= 0.62"}
    return compare("identification", functions, targets, repeats)


def count_on_host(model, batch: dict) -> dict[str, torch.Tensor]:
    """Count as the code released with the paper does: copy every FFN activation to the host and look for non-zeros."""
    counts: dict[str, torch.Tensor] = {}

    def count(name: str, values: torch.Tensor) -> None:
        hit = values.detach().cpu().reshape(-1, values.shape[-1]).nonzero()[:, 1]
        counts[name] = torch.bincount(hit, minlength=values.shape[-1])

    hooks = [
        block.down.register_forward_pre_hook(lambda module, args, name=block.name: count(name, args[0]))
        for block in ns.find_ffn_blocks(model)
    ]
    with torch.no_grad():
        model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    return counts
