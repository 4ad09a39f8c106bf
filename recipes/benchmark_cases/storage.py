"""Files of NLLB-600M's shape: their size, loading them into a model, and switching between their pairs."""

import itertools
import statistics
import tempfile
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel

from neuron_specialization.analysis.shapes import random_masks
from neuron_specialization.analysis.timing import side_by_side
from neuron_specialization.neurons.language_pairs import Routes
from neuron_specialization.translation.checkpoints import new_m2m100

LANGUAGES = [f"l{i}" for i in range(202)]
ROUTES = {
    "60 pairs": Routes.per_pair([f"{code}-en" for code in LANGUAGES[:60]]),
    "10,000 pairs": Routes.per_pair([f"{a}-{b}" for a in LANGUAGES[:100] for b in LANGUAGES[100:200]]),
    "40,602 directions": Routes(LANGUAGES, LANGUAGES),  # factorized
}
LARGEST = "40,602 directions"


def storage(repeats: int) -> list[dict]:
    """Measure the size of 60 pairs, loading 10,000 pairs or all directions of 202 languages, and switching pairs."""
    with tempfile.TemporaryDirectory() as directory:
        paths = {name: f"{directory}/{name}" for name in ROUTES}
        for name, routes in ROUTES.items():
            random_masks(nllb(8), routes, 0.8).save_pretrained(paths[name])
        size = (Path(paths["60 pairs"]) / "adapter_model.safetensors").stat().st_size
        ratio = size / (24 * 512 * 60)  # 24 blocks of 4,096 neurons, a bit each
        rows = [{"what": "file of 60 pairs", "compared with": "bits / 8", "ratio": ratio, "target": "<= 1.03"}]
        loading = {name: lambda path=path: PeftModel.from_pretrained(nllb(8), path) for name, path in paths.items()}
        times = side_by_side({**loading, "build": lambda: nllb(8)}, repeats)
        for name in ("10,000 pairs", LARGEST):
            ms = 1e3 * added(times[name], times["build"])
            rows.append({"what": f"load {name}", "ms": ms, "target": "about 1000 ms"})
        for execution in ("auto", "compact"):
            config = PeftConfig.from_pretrained(paths[LARGEST])
            config.execution = execution
            model = PeftModel.from_pretrained(nllb(1024), paths[LARGEST], config=config)
            what = f"switch the pair, {execution}, one token"
            rows.append({"what": what, "ms": 1e3 * switching(model, repeats), "target": "about 1 ms"})
    return rows


def nllb(d_model: int):
    """Return a model with the FFN blocks of NLLB 600M (d_model 1,024 there) and hardly any vocabulary."""
    return new_m2m100(layers=12, d_model=d_model, d_ff=4096, heads=8, vocab_size=100)


def switching(model, repeats: int) -> float:
    """Return how much longer, in seconds, a forward of one token takes after a change of the pair."""
    token = torch.ones(1, 1, dtype=torch.long)
    pairs = itertools.cycle([f"l{i}-l{i + 1}" for i in range(201)])

    @torch.no_grad()
    def run() -> None:
        model(input_ids=token, decoder_input_ids=token)

    def switch() -> None:
        model.set_language_pair(next(pairs))
        run()

    times = side_by_side({"switch": switch, "stay": run}, 5 * repeats)
    return added(times["switch"], times["stay"])


def added(more: list[float], less: list[float]) -> float:
    """Return the median of the differences within rounds."""
    return statistics.median(a - b for a, b in zip(more, less, strict=True))
