r"""The paper's comparison, stage by stage: methods x seeds on the same baseline, data and order of batches.

python recipes/compare_methods.py --config recipes/configs/compare_methods/toy-control.yaml \
    --model_name_or_path build/toy/baseline/model --train_file build/toy/train.jsonl \
    --validation_file build/toy/validation.jsonl --test_file build/toy/test.jsonl --output_dir build/toy/comparison

`--only METHOD --seed N` runs one stage and leaves the tables to a later call; `--tables_only true` makes them from the
stages that exist. Finished stages are skipped and interrupted ones resume, so that the directory can be filled step by
step, and by several processes or machines: seed 0 of a method, which makes its trials, before the others. Zero-shot
directions (`--zero_shot_pairs`) are scored after the stages, from the models that they kept; `--zero_shot_only true`
runs no stage before that. Stages that fail do not keep others from running; the exit code is 1 then.

`knobs: {ours_k: [0.9, 0.95, 0.98], lass_alpha: [0.3, 0.5, 0.7]}` in the configuration chooses a method's own knob on
validation data, as `learning_rates` does its learning rate. For larger models, fix what a small one has chosen. Trials
make a third of the updates, and prefer lower learning rates than a whole stage would; with `trial_share: 1` they make
all, and the best one is the stage.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import disable_progress_bars

from neuron_specialization.analysis.comparison import premise
from neuron_specialization.analysis.comparison_report import (
    comparison_results,
    comparison_tables,
    directions_tested,
    draw,
)
from neuron_specialization.analysis.comparison_tables import usable_rows
from neuron_specialization.analysis.figures import check_figures
from neuron_specialization.analysis.report import write_report
from neuron_specialization.baselines.collected import collect
from neuron_specialization.baselines.methods import MethodArguments, planned_stages
from neuron_specialization.baselines.options import CompareArguments, check_options
from neuron_specialization.baselines.settings import StageArguments
from neuron_specialization.baselines.stages import Comparison
from neuron_specialization.baselines.zero_shot import ZeroShotArguments, collect_zero_shot, load_zero_shot
from neuron_specialization.neurons.selection import CumulativeThreshold
from neuron_specialization.translation.arguments import DataArguments, ModelArguments
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import check_single_process
from neuron_specialization.translation.results import table, titled_tables, write_results
from neuron_specialization.translation.runs import training_of
from neuron_specialization.translation.trainer import SpecializationTrainingArguments

UNUSED = ("adapter", "learning_rate", "patience", "eval_steps", "data_seed", "overwrite_output_dir")


def main() -> None:
    compare, stage, method, zero, where, data, training = parse(
        *(CompareArguments, StageArguments, MethodArguments, ZeroShotArguments),
        *(ModelArguments, DataArguments, SpecializationTrainingArguments),
        unused=UNUSED,
    )
    check_options(compare, zero, data, training)
    check_single_process()
    check_figures()
    planned = [] if compare.tables_only else planned_stages(stage.methods, compare.only, training.seed)
    disable_progress_bars()
    model, tokenizer = load_checkpoint(where.model_name_or_path, "float32")
    train, validation, checked = data.load_checked()
    print(table(checked))
    comparison = Comparison(
        *(model, tokenizer, {"train": train, "validation": validation, "test": data.load("test")}),
        *(stage, method, training, data.tokens, data.source_tag, data.pivot, data.max_length),
    )
    zero_shot = load_zero_shot(comparison, zero, data) if zero.zero_shot_pairs and planned else None
    failed = comparison.run_all(planned if not compare.zero_shot_only else [])
    for name, seed in planned if zero_shot is not None else []:
        print(f"\n== zero-shot, {name}, seed {seed}", flush=True)
        failed += zero_shot.score(name, seed)
    if compare.only is None:
        tiers = compare.languages_of_tiers
        parts = (("stage", stage), ("method", method), ("zero_shot", zero), ("data", data), ("tiers", tiers))
        settings = {name: part if isinstance(part, dict) else vars(part) for name, part in parts}
        stages = report(comparison, where.model_name_or_path, tiers, {**settings, "training": training.to_dict()})
        if compare.report is not None:
            k = next((s["knobs"]["k"] for s in stages if s["method"] == "ours" and "parts" in s), method.k)
            masks = CumulativeThreshold(k).select(comparison.counts())
            print(f"wrote {write_report(compare.report, 'Comparison of methods', masks, [comparison.directory])}")
    if failed:
        raise ValueError(f"Not all stages ran: {'; '.join(failed)}. The same command tries them again.")


def report(comparison: Comparison, baseline: str, tiers: dict[str, list[str]], settings: dict[str, Any]) -> list[Any]:
    """Print and write the tables and figures of the stages that exist, and return these."""
    found = collect(comparison.directory, planned_stages(comparison.stage.methods))
    found["zero_shot"] = collect_zero_shot(comparison.directory)
    references = {pair: list(rows["target"]) for pair, rows in comparison.data["test"].items()}
    significance = directions_tested(found["translations"], references)
    tables = comparison_tables(found, significance, comparison.pivot, tiers)
    results = comparison_results(found, tables, significance, training_of(baseline))
    text = as_text(results["facts"], results["headroom"], tables)
    print("\n" + text)
    (comparison.directory / "tables.md").write_text(text, encoding="utf-8")
    print(f"wrote {write_results(comparison.directory, {**results, 'settings': settings})}")
    draw(usable_rows(found["rows"], found["stages"]), tables, comparison.directory, found["zero_shot"]["rows"])
    return found["stages"]


def as_text(facts: Sequence[str], headroom: Mapping[str, Any], tables: Mapping[str, Any]) -> str:
    """Return what is printed: what was fair, the premise, and every table under its title."""
    return "\n\n".join(["\n".join(facts), premise(headroom), titled_tables(tables)]) + "\n"


if __name__ == "__main__":
    run(main)
