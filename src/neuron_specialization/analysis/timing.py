"""Timings that can be compared: measured side by side in one run, in turns, as ratios within each round."""

import copy
import itertools
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
from .shapes import ModelShape, random_m2m100


def side_by_side(
    functions: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """Time functions in turns, A B C C B A A B C ..., so that drift of the machine hits all of them alike.

    Args:
        functions: name → function.
        repeats: counted rounds.
        warmup: rounds before them.

    Returns:
        name → its times in seconds, one per round.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warmup + repeats):
        order = list(functions)
        for name in order if round_ % 2 == 0 else reversed(order):
            _synchronize()
            started = time.perf_counter()
            functions[name]()
            _synchronize()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - started)
    return times


def compare(
    what: str, functions: Mapping[str, Callable[[], Any]], targets: Mapping[str, str], repeats: int
) -> list[dict[str, Any]]:
    """Return one row per pair of functions: the first one's time as a ratio of each other's, the median over rounds.

    Ratios are taken within a round, where the machine is most likely to be in one mood; "rounds" gives their range.

    Args:
        what: what is timed.
        functions: name → function, timed by `side_by_side`; the first is compared with the others.
        targets: name of another function → the ratio aimed at, for people.
        repeats: counted rounds.
    """
    times = side_by_side(functions, repeats)
    first, *others = functions
    rows = []
    for other in others:
        ratios = [ours / theirs for ours, theirs in zip(times[first], times[other], strict=True)]
        row = {"what": what, "compared with": other, "ratio": statistics.median(ratios)}
        row |= {"rounds": f"{min(ratios):.2f} to {max(ratios):.2f}", "target": targets.get(other, "")}
        rows.append({**row, "ms": 1e3 * statistics.median(times[first])})
        print(f"{what}: {first} takes {row['ratio']:.2f} ({row['rounds']}) of {other}", flush=True)
    return rows


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
    """Measure files of NLLB-600M's shape (24 blocks of 4,096 neurons): the size of 60 pairs, loading 10,000 pairs, or
    the factorized masks of 202 languages (40,602 directions), into a model, and what a new pair adds to a forward."""
    languages = [f"l{i}" for i in range(202)]
    routes = {
        "60": Routes.per_pair([f"{code}-en" for code in languages[:60]]),
        "10,000 pairs": Routes.per_pair([f"{a}-{b}" for a in languages[:100] for b in languages[100:200]]),
        "40,602 directions": Routes(languages, languages),
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for name, route in routes.items():
            _save_random_masks(f"{directory}/{name}", route)
        size = (Path(directory) / "60" / "adapter_model.safetensors").stat().st_size
        rows.append({"what": "file of 60 pairs", "compared with": "bits / 8", "ratio": size / (24 * 512 * 60)})
        functions = {
            name: lambda name=name: PeftModel.from_pretrained(_nllb(8), f"{directory}/{name}") for name in routes
        }
        times = side_by_side({**functions, "build": lambda: _nllb(8)}, repeats)
        for name in list(routes)[1:]:
            rows.append({"what": f"load {name}", "ms": 1e3 * _added(times[name], times["build"])})
        for execution in ("auto", "compact"):
            config: Any = PeftConfig.from_pretrained(f"{directory}/40,602 directions")
            config.execution = execution
            model = PeftModel.from_pretrained(_nllb(1024), f"{directory}/40,602 directions", config=config)
            rows.append({"what": f"switch the pair, {execution}, one token", "ms": 1e3 * _switch(model, repeats)})
    targets = ("<= 1.03", "about 1000 ms", "about 1000 ms", "about 1 ms", "about 1 ms")
    return [{**row, "target": target} for row, target in zip(rows, targets, strict=True)]


def _nllb(d_model: int) -> Any:
    """Return a model with the FFN blocks of NLLB 600M (d_model 1,024 there) and hardly any vocabulary."""
    return random_m2m100(ModelShape(layers=12, d_model=d_model, d_ff=4096, vocab_size=100))


def _save_random_masks(directory: str, routes: Routes) -> None:
    stacks = {block.name: block.stack for block in find_ffn_blocks(_nllb(8))}
    rows = {name: torch.rand(len(routes.encoder_rows), 4096) < 0.8 for name in stacks}
    NeuronMasks(rows, stacks, routes).save_pretrained(directory)


def _switch(model: Any, repeats: int) -> float:
    """Return what a forward of one token takes longer, in seconds, where the pair is not the one before."""
    token = torch.ones(1, 1, dtype=torch.long)
    pairs = itertools.cycle([f"l{i}-l{i + 1}" for i in range(201)])

    @torch.no_grad()
    def run() -> None:
        model(input_ids=token, decoder_input_ids=token)

    def switch() -> None:
        model.set_language_pair(next(pairs))
        run()

    times = side_by_side({"switch": switch, "stay": run}, 5 * repeats)
    return _added(times["switch"], times["stay"])


def _added(more: list[float], less: list[float]) -> float:
    """Return the median of the differences within rounds."""
    return statistics.median(a - b for a, b in zip(more, less, strict=True))
