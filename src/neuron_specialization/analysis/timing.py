"""Timings that can be compared: measured side by side in one run, in turns, as ratios of medians."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from ..neurons.activations import record_activations
from ..neurons.ffn import find_ffn_blocks
from ..neurons.language_pairs import Routes
from ..neurons.masks import NeuronMasks
from .random_models import random_m2m100


def side_by_side(functions: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1) -> dict[str, float]:
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


def compare(
    what: str, functions: Mapping[str, Callable[[], Any]], targets: Mapping[str, str], repeats: int
) -> list[dict[str, Any]]:
    """Return one row per pair of functions: the first one's time as a ratio of each other's.

    Args:
        what: what is timed.
        functions: name → function, timed by `side_by_side`; the first is compared with the others.
        targets: name of another function → the ratio aimed at, for people.
        repeats: counted rounds.
    """
    median = side_by_side(functions, repeats)
    first, *others = functions
    print(what, flush=True)
    return [
        {
            "what": what,
            "compared with": other,
            "ratio": median[first] / median[other],
            "target": targets.get(other, ""),
            "ms": 1e3 * median[first],
            "other ms": 1e3 * median[other],
        }
        for other in others
    ]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class TrainingStep:
    """One update of a model with AdamW on one batch, to be called again and again."""

    def __init__(self, model: Any, batch: Mapping[str, Any]) -> None:
        self.model, self.batch = model.train(), batch
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def __call__(self) -> None:
        self.model.train()(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def work(function: Callable[[], Any]) -> tuple[int, int]:
    """Return the floating-point operations of a call, and the bytes of linear layers' weights that it reads."""
    read = 0

    def count(module: nn.Module, args: tuple) -> None:
        nonlocal read
        if isinstance(module, nn.Linear):
            read += module.weight.nbytes

    handle = register_module_forward_pre_hook(count)
    with FlopCounterMode(display=False) as counter:
        function()
    handle.remove()
    return counter.get_total_flops(), read


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


def identification_costs(model: Any, batch: Mapping[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Compare recording activations with passes over the same batches that do not count, and that count elsewhere."""
    headless = copy.deepcopy(model).model
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    inputs["decoder_input_ids"] = batch["labels"]
    batches = [batch] * 2
    functions = {
        "ours": lambda: record_activations(model, {"a-b": batches}, progress=False),
        "forward with loss": torch.no_grad()(lambda: [model.eval()(**each) for each in batches]),
        "headless forward": torch.no_grad()(lambda: [headless.eval()(**inputs) for _ in batches]),
        "copy to host and nonzero": lambda: [count_on_host(model, each) for each in batches],
    }
    targets = {"forward with loss": "<= 0.70", "headless forward": "<= 1.05", "copy to host and nonzero": "<= 0.62"}
    return compare("identification", functions, targets, repeats)


def storage_costs(repeats: int) -> list[dict[str, Any]]:
    """Measure files of NLLB-600M's shape (24 blocks of 4,096 neurons): the size of 60 pairs, loading factorised masks
    of 202 languages (40,602 directions) into a model, and what a new pair adds to a forward."""
    stacks = {f"model.{stack}.layers.{i}.fc1": stack for stack in ("encoder", "decoder") for i in range(12)}
    languages = [f"l{i}" for i in range(202)]

    def save(directory: str, rows: int, routes: Routes) -> None:
        NeuronMasks({name: torch.rand(rows, 4096) < 0.8 for name in stacks}, stacks, routes).save(directory)

    def build() -> Any:
        return random_m2m100(layers=12, d_model=8, d_ff=4096, vocab_size=100, heads=2)

    with tempfile.TemporaryDirectory() as directory:
        save(f"{directory}/pairs", 60, Routes.per_pair([f"{code}-en" for code in languages[:60]]))
        size = (Path(directory) / "pairs" / "adapter_model.safetensors").stat().st_size
        save(f"{directory}/languages", 202, Routes(languages, languages))
        files = {"load": lambda: PeftModel.from_pretrained(build(), f"{directory}/languages"), "build": build}
        median = side_by_side(files, repeats)
        rows = [
            {"what": "file of 60 pairs", "compared with": "bits / 8", "ratio": size / (24 * 512 * 60)},
            {"what": "load 40,602 directions", "ms": 1e3 * (median["load"] - median["build"])},
        ]
        for execution in ("masked", "compact"):
            config: Any = PeftConfig.from_pretrained(f"{directory}/languages")
            config.execution = execution
            model = PeftModel.from_pretrained(build(), f"{directory}/languages", config=config)
            rows.append({"what": f"switch the pair, {execution}", "ms": 1e3 * _switch(model, repeats)})
    targets = ("<= 1.03", "about 1000 ms", "about 1 ms", "about 1 ms")
    return [{**row, "target": target} for row, target in zip(rows, targets, strict=True)]


def _switch(model: Any, repeats: int) -> float:
    """Return what a forward of one token takes longer, in seconds, where the pair is not the one before."""
    token = torch.ones(1, 1, dtype=torch.long)
    pairs = (f"l{i}-l{i + 1}" for i in range(201))

    @torch.no_grad()
    def run() -> None:
        model(input_ids=token, decoder_input_ids=token)

    def switch() -> None:
        model.set_language_pair(next(pairs))
        run()

    median = side_by_side({"switch": switch, "stay": run}, 5 * repeats)
    return median["switch"] - median["stay"]
