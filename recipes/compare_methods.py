r"""The paper's comparison, stage by stage: methods x seeds on the same baseline, data and order of batches.

accelerate launch --quiet recipes/compare_methods.py --config recipes/configs/compare_methods/toy-control.yaml \
    --model_name_or_path build/toy/baseline/model --train_file build/toy/train.jsonl \
    --validation_file build/toy/validation.jsonl --test_file build/toy/test.jsonl --output_dir build/toy/comparison

`--only METHOD --seed N` runs one stage and leaves the tables to a later call; `--tables_only true` makes them from the
stages that exist. Finished stages are skipped and interrupted ones resume, so that the directory can be filled step by
step, and on several machines.
"""

from dataclasses import dataclass, field
from typing import Any

from datasets import disable_progress_bars

from neuron_specialization.analysis.comparison import headroom, main_table, premise
from neuron_specialization.analysis.plots import plot_differences, plot_interference
from neuron_specialization.analysis.statistics import paired_bootstrap
from neuron_specialization.baselines.methods import MethodArguments
from neuron_specialization.baselines.stages import Comparison, StageArguments, collect
from neuron_specialization.translation.arguments import DataArguments, ModelArguments, as_mapping
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import check_single_process
from neuron_specialization.translation.results import table, write_results
from neuron_specialization.translation.trainer import SpecializationTrainingArguments

UNUSED = ("adapter", "drop_faulty", "learning_rate", "patience", "eval_steps", "num_train_epochs")


@dataclass
class CompareArguments:
    """Which stages to run now."""

    only: str | None = field(default=None, metadata={"help": "Run this method only, with the seed given by --seed."})
    tables_only: bool = field(default=False, metadata={"help": "Only make the tables again."})


def main() -> None:
    compare, stage, method, where, data, training = parse(
        *(CompareArguments, StageArguments, MethodArguments),
        *(ModelArguments, DataArguments, SpecializationTrainingArguments),
        unused=UNUSED,
    )
    check_single_process()
    disable_progress_bars()
    model, tokenizer = load_checkpoint(where.model_name_or_path)
    comparison = Comparison(
        *(model, tokenizer, {split: data.load(split) for split in ("train", "validation", "test")}),
        *(stage, method, training, data.tokens, data.source_tag, data.pivot, data.max_length),
    )
    seeds = {name: int(number) for name, number in as_mapping(stage.methods).items()}
    planned = [(name, seed) for seed in range(max(seeds.values())) for name in seeds if seed < seeds[name]]
    if compare.only is not None:
        planned = [(compare.only, training.seed)]
    for name, seed in planned if not compare.tables_only else []:
        print(f"\n== {name}, seed {seed}", flush=True)
        print("done" if comparison.run(name, seed) else "FAILED, see failed.json", flush=True)
    if compare.only is not None:
        return
    settings = {name: vars(part) for name, part in (("stage", stage), ("method", method), ("data", data))}
    report(comparison, {**settings, "training": training.to_dict()})


def report(comparison: Comparison, settings: dict[str, Any]) -> None:
    """Print and write the tables and figures of the stages that exist."""
    found = collect(comparison.directory)
    rows, stages, translations = found["rows"], found["stages"], found.pop("translations")
    measured = headroom(rows)
    main_rows = main_table(rows, stages, comparison.pivot)
    references = {pair: list(data["target"]) for pair, data in comparison.data["test"].items()}
    significance = {
        name: paired_bootstrap(seeds[0], translations["fine_tune"][0], references)
        for name, seeds in translations.items()
        if name != "fine_tune" and 0 in seeds and 0 in translations.get("fine_tune", {})
    }
    for line in main_rows:
        if line["method"] in significance:
            signs = [r["difference"] > 0 for r in significance[line["method"]].values() if r["significant"]]
            line["chrF++ better/worse"] = f"{sum(signs)}/{len(signs) - sum(signs)}"
    text = f"{premise(measured)}\n\n{table(measured['ceilings'])}\n\n{table(main_rows)}\n"
    print("\n" + text)
    methods = {row["method"] for row in rows}
    if "fine_tune" in methods and len(methods) > 1:
        plot_differences(rows, comparison.directory / "differences.svg")
        compared = [name for name in ("ours", "random_overlap", "general_specific") if name in methods]
        if "bilingual" in methods and compared:
            plot_interference(rows, compared, comparison.directory / "interference.svg")
    (comparison.directory / "tables.md").write_text(text)
    results = {**found, "headroom": measured, "main": main_rows, "significance": significance, "settings": settings}
    print(f"wrote {write_results(comparison.directory, results)}")


if __name__ == "__main__":
    run(main)
