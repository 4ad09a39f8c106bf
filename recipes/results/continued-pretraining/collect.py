"""Put the translation scores of all models of run.sh into one results.json, and print them as a table.

python recipes/results/continued-pretraining/collect.py build/continued-pretraining
"""

import json
import sys
from pathlib import Path

from neuron_specialization.translation.results import table, write_results

GROUPS = ("one-to-many", "many-to-one")
OF_A_RUN = ("updates", "target_tokens", "train_runtime", "best_validation_loss")


def main(directory: Path) -> None:
    rows, runs = [], []
    for path in sorted(directory.glob("*/results.json")):
        found = json.loads(path.read_text())
        scores = found if found["recipe"] == "score" else found.get("scores")
        if scores is None:
            continue
        name, _, number = path.parent.name.rpartition("-")
        model, seed = (name, int(number)) if number.isdigit() else (path.parent.name, 0)
        run = {"model": model, "seed": seed, **{key: found[key] for key in OF_A_RUN if key in found}}
        for group in GROUPS:
            average = scores["averages"].get(group, {})
            run |= {f"{group} {score}": average.get(score) for score in ("chrf++", "bleu")}
        runs.append(run)
        rows += [{"model": model, "seed": seed, "direction": d, **of} for d, of in scores["directions"].items()]
    print(table(runs))
    print(f"wrote {write_results(directory, {'runs': runs, 'rows': rows})}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
