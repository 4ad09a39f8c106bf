"""Timings that can be compared: measured side by side in one run, in turns, as ratios of medians."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import M2M100Config, M2M100ForConditionalGeneration

from ..neurons.ffn import find_ffn_blocks
from ..neurons.language_pairs import Routes
from ..neurons.masks import NeuronMasks


def side_by_side(functions: Mapping[str, Callable[[], Any]], repeats: int = 9, warmup: int = 2) -> dict[str, float]:
    """Time functions in turns, A B C A B C ..., so that drift of the machine hits all of them alike.

    Args:
        functions: name → function.
        repeats: counted rounds.
        warmup: rounds before them.

    Returns:
        name → median of its times in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warmup + repeats):
        for name, function in functions.items():
            _synchronize()
            started = time.perf_counter()
            function()
            _synchronize()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_masks(model: nn.Module, pairs: list[str], kept: float) -> NeuronMasks:
    """Return masks that keep a random share of each block's neurons, drawn from torch's generator."""
    blocks = find_ffn_blocks(model)
    rows = {block.name: torch.rand(len(pairs), block.d_ff) < kept for block in blocks}
    return NeuronMasks(rows, {block.name: block.stack for block in blocks}, Routes.per_pair(pairs))


def count_on_host(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Count as the code released with the paper does: copy every FFN activation to the host and look for non-zeros."""
    counts: dict[str, torch.Tensor] = {}

    def count(name: str, values: torch.Tensor) -> None:
        hit = values.detach().cpu().reshape(-1, values.shape[-1]).nonzero()[:, 1]
        counts[name] = torch.bincount(hit, minlength=values.shape[-1])

    blocks = find_ffn_blocks(model)
    hooks = [
        block.down.register_forward_pre_hook(lambda module, args, name=block.name: count(name, args[0]))
        for block in blocks
    ]
    with torch.no_grad():
        model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    return counts


def storage_costs(repeats: int) -> list[dict[str, Any]]:
    """Measure files of NLLB-600M's shape (24 blocks of 4,096 neurons): the size of 60 pairs, loading factorised masks
    of 202 languages (40,602 directions) into a model, and what a new pair adds to a forward."""
    stacks = {f"model.{stack}.layers.{i}.fc1": stack for stack in ("encoder", "decoder") for i in range(12)}
    languages = [f"l{i}" for i in range(202)]

    def save(directory: str, rows: int, routes: Routes) -> None:
        NeuronMasks({name: torch.rand(rows, 4096) < 0.8 for name in stacks}, stacks, routes).save(directory)

    config = M2M100Config(vocab_size=100, d_model=8, encoder_ffn_dim=4096, decoder_ffn_dim=4096)
    config.encoder_attention_heads = config.decoder_attention_heads = 2

    def build() -> M2M100ForConditionalGeneration:
        return M2M100ForConditionalGeneration(config)

    with tempfile.TemporaryDirectory() as directory:
        save(f"{directory}/pairs", 60, Routes.per_pair([f"{code}-en" for code in languages[:60]]))
        size = (Path(directory) / "pairs" / "adapter_model.safetensors").stat().st_size
        save(f"{directory}/languages", 202, Routes(languages, languages))
        loaded: Any = PeftModel.from_pretrained(build(), f"{directory}/languages")
        token = torch.ones(1, 1, dtype=torch.long)
        pairs = (f"l{i}-l{i + 1}" for i in range(200))

        @torch.no_grad()
        def run() -> None:
            loaded(input_ids=token, decoder_input_ids=token)

        def switch() -> None:
            loaded.set_language_pair(next(pairs))
            run()

        median = side_by_side(
            {
                "load": lambda: PeftModel.from_pretrained(build(), f"{directory}/languages"),
                "build": build,
                "switch": switch,
                "stay": run,
            },
            repeats,
        )
    return [
        {
            "what": "file of 60 pairs",
            "compared with": "bits / 8",
            "ratio": size / (24 * 512 * 60),
            "target": "<= 1.03",
        },
        {"what": "load 40,602 directions", "seconds": median["load"] - median["build"], "target": "about 1 s"},
        {
            "what": "switch the pair (d_model 8)",
            "seconds": median["switch"] - median["stay"],
            "target": "about 0.001 s",
        },
    ]
