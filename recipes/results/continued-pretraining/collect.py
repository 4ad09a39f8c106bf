"""Put the translation scores and test losses of all models of run.sh into one results.json, and print them as a table.

python recipes/results/continued-pretraining/collect.py build/continued-pretraining
"""

import json
import sys
from pathlib import Path

import yaml

import neuron_specialization as ns
from neuron_specialization.translation.checkpoints import load_adapted
from neuron_specialization.translation.results import table, write_results
from neuron_specialization.translation.token_loss import token_losses

CONFIG = yaml.safe_load(Path("recipes/configs/continue_pretraining/small.yaml").read_text(encoding="utf-8"))
RECIPES = ("pretrain", "continue_pretraining", "score")
GROUPS = ("one-to-many", "many-to-one")
OF_A_RUN = ("updates", "best_step", "target_tokens", "train_runtime", "best_validation_loss")


def main(directory: Path) -> None:
    rows, runs = [], []
    for path in sorted(directory.glob("*/results.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["recipe"] not in RECIPES:
            continue
        name, _, number = path.parent.name.rpartition("-")
        model, seed = (name, int(number)) if number.isdigit() else (path.parent.name, 0)
        run = {"model": model, "seed": seed, **{key: found[key] for key in OF_A_RUN if key in found}}
        runs.append(run)
        scores = found if found["recipe"] == "score" else found.get("scores")
        if scores is None:
            continue
        losses = test_losses(path.parent, directory, list(scores["directions"]))
        for group in GROUPS:
            pairs = [pair for pair in losses if pair.startswith("en-") == (group == GROUPS[0])]
            run |= {f"{group} {score}": scores["averages"][group][score] for score in ("chrf++", "bleu")}
            run[f"{group} loss"] = sum(losses[pair] for pair in pairs) / len(pairs)
        rows += [
            {"model": model, "seed": seed, "direction": pair, **of, "loss": losses[pair]}
            for pair, of in scores["directions"].items()
        ]
    print(table(runs, 3))
    print(f"wrote {write_results(directory, {'runs': runs, 'rows': rows})}")


def test_losses(run: Path, directory: Path, pairs: list[str]) -> dict[str, float]:
    """Return pair → nats per target token of the test text, the tag left out: under masks a model knows it."""
    adapter = str(run / "adapter") if (run / "adapter").is_dir() else None
    model, tokenizer = load_adapted(
        str(run / "model" if adapter is None else directory / "denoised" / "model"), adapter
    )
    corpus = ns.load_parallel(str(directory / "text" / "parallel" / "test.parquet"), pairs)
    return token_losses(model.eval(), tokenizer, corpus, language_tokens=CONFIG["language_tokens"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
