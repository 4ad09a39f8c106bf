"""Test translations of the pruned models against those of the whole one and of random draws: tests.json, and a table.

python recipes/results/tatoeba-pruning/compare.py build/tatoeba-pruned "data/tatoeba/{pair}.parquet"

A test is sacreBLEU's paired bootstrap of chrF++ on the pair trained last, at rates from 10 %; the random draws are
those of the largest share of neurons that is not above the model's own, and those of as much mass where there are any.
All tests are corrected together (Benjamini and Hochberg). Takes a second or two per test.
"""

import json
import sys
from pathlib import Path
from typing import Any

from neuron_specialization.analysis.statistics import paired_bootstrap
from neuron_specialization.translation.data import load_parallel
from neuron_specialization.translation.results import table, write_results

LOWEST_RATE, DRAWN = 0.1, ("random", "mass_matched")


def main(directory: Path, test_file: str) -> None:
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("seed-*/**/part.json"))]
    pair = parts[0]["rows"][0]["order"].split("/")[-1]
    references = list(load_parallel(test_file, [pair], split="test")[pair]["target"])
    models = [(part["rows"][0], part["translations"][pair]) for part in parts]
    whole, *_ = (texts for row, texts in models if row["criterion"] == "none")
    ours: dict[str, list[str]] = {}
    theirs: dict[str, list[str]] = {}
    about: dict[str, dict[str, Any]] = {}
    for row, texts in models:
        if row["criterion"].startswith(("none", *DRAWN)) or row["rate"] < LOWEST_RATE:
            continue
        matched = mass_matched_draws(models, row)
        for name, others in {"whole": whole, **random_draws(models, row["pruned"]), **matched}.items():
            key = f"{row['criterion']} {row['rate']} {name}"
            ours[key], theirs[key] = texts, others
            about[key] = {**{what: row[what] for what in ("criterion", "rate", "pruned")}, "against": name}
    tested = paired_bootstrap(ours, theirs, dict.fromkeys(ours, references))
    rows = [{**about[key], "direction": pair, **of} for key, of in tested.items()]
    print(table(rows))
    print(f"wrote {write_results(directory, {'tests': rows}, 'tests.json')}")


def random_draws(models: list[tuple[dict[str, Any], list[str]]], pruned: float) -> dict[str, list[str]]:
    """Return name → translations of the random draws that prune as large a share or the next smaller one."""
    random = [(row, texts) for row, texts in models if row["criterion"] == "random" and row["pruned"] <= pruned]
    most = max(row["pruned"] for row, _ in random)
    return {f"random {row['rate']}, draw {row['draw']}": texts for row, texts in random if row["pruned"] == most}


def mass_matched_draws(models: list[tuple[dict[str, Any], list[str]]], pruned: dict[str, Any]) -> dict[str, list[str]]:
    """Return name → translations of the random draws that prune as much positive mass as a model does."""
    matched = f"mass_matched:{pruned['criterion']}", pruned["rate"]
    return {
        f"{matched[0]} {matched[1]}, draw {row['draw']}": texts
        for row, texts in models
        if (row["criterion"], row["rate"]) == matched
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
