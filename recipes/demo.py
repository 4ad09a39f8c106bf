"""The whole method, its control and its ceiling on artificial related languages, in a few minutes on two CPU cores.

python recipes/demo.py --config recipes/configs/demo.yaml
"""

import copy
import time
from dataclasses import dataclass, field

from datasets import disable_progress_bars
from transformers import set_seed

import neuron_specialization as ns
from neuron_specialization.analysis.overlap import neuron_overlap
from neuron_specialization.analysis.report import write_report
from neuron_specialization.baselines.methods import MethodArguments, build_model
from neuron_specialization.neurons.ffn import STACKS
from neuron_specialization.neurons.files import atomic_directory
from neuron_specialization.translation.checkpoints import load_checkpoint, new_model
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.data import load_parallel
from neuron_specialization.translation.evaluation import SCORES, evaluate
from neuron_specialization.translation.identification import record_corpus
from neuron_specialization.translation.processes import check_single_process
from neuron_specialization.translation.results import table, write_results
from neuron_specialization.translation.tokenization import train_tokenizer
from neuron_specialization.translation.toy import PIVOT, SPLITS, ToyLanguages
from neuron_specialization.translation.trainer import SpecializationTrainingArguments
from neuron_specialization.translation.training import fit

OVERLAP = "IoU of the neurons of two languages' pairs, within and across families, mean over layers"
METHODS = {
    "fine_tune": "every parameter",
    "ours": "every parameter, under the masks of each pair",
    "random_overlap": "the same, with the neurons of the masks renumbered: the control",
    "ffn_copies": "an FFN of its own for every direction: the ceiling",
}
UNUSED = ("max_steps",)


@dataclass
class DemoArguments:
    """Sizes of the languages, the model and the runs."""

    families: int = field(default=3, metadata={"help": "Language families."})
    languages_per_family: int = field(default=2, metadata={"help": "Languages in each."})
    replaced: float = field(default=0.5, metadata={"help": "Share of roots that a language replaces by its own."})
    roots: int = field(default=44, metadata={"help": "Roots in each language, a multiple of 11."})
    sentences: int = field(default=4000, metadata={"help": "Training sentences, in every language."})
    held_out: int = field(default=100, metadata={"help": "Validation sentences, and as many test sentences."})
    vocab_size: int = field(default=700, metadata={"help": "Entries of the shared BPE."})
    layers: int = field(default=2, metadata={"help": "Encoder layers, and decoder layers."})
    d_model: int = field(default=32, metadata={"help": "Width of the model."})
    d_ff: int = field(default=256, metadata={"help": "FFN neurons per layer."})
    pretrain_steps: int = field(default=1200, metadata={"help": "Updates of the baseline."})
    continue_steps: int = field(default=400, metadata={"help": "Updates of each method."})
    continue_learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of each method."})
    k: float = field(default=0.95, metadata={"help": "Share of activations that the kept neurons make up."})


def main() -> None:
    demo, training = parse(DemoArguments, SpecializationTrainingArguments, unused=UNUSED)
    check_single_process()
    set_seed(training.seed)
    disable_progress_bars()  # of tokenizing, which takes no time here; training shows its own
    started = time.perf_counter()
    toy = ToyLanguages(demo.families, demo.languages_per_family, training.seed, demo.replaced, demo.roots)
    with atomic_directory(f"{training.output_dir}/data") as folder:  # to try other recipes on
        toy.write(folder, demo.sentences, demo.held_out)
    data = {split: load_parallel(f"{training.output_dir}/data/{split}.jsonl", toy.language_pairs) for split in SPLITS}
    tokenizer = train_tokenizer(
        (text for code in toy.languages for text in toy.sentences(demo.sentences, "train")[code]),
        toy.languages,
        demo.vocab_size,
    )

    def run(name: str, model, steps: int, learning_rate: float) -> dict:
        print(f"\n== {name}: {steps} updates", flush=True)
        args = copy.deepcopy(training)
        args.max_steps, args.learning_rate = steps, learning_rate
        args.output_dir = f"{training.output_dir}/{name}"
        fit(model, tokenizer, data["train"], data["validation"], args, max_length=64)
        result = evaluate(model, tokenizer, data["test"], pivot=PIVOT, num_beams=1, batch_size=200)
        return {key: result[key] for key in ("averages", "directions")}

    baseline = new_model(tokenizer, demo.layers, demo.d_model, demo.d_ff, heads=4, dropout=0.0, max_length=64)
    results = {"baseline": run("baseline", baseline, demo.pretrain_steps, training.learning_rate)}
    # as it was saved: a demo that was interrupted goes on from the same model, down to its configuration
    saved, _ = load_checkpoint(f"{training.output_dir}/baseline/model", "float32")
    baseline = saved.to(baseline.device)
    print("\n== identify")
    counts = record_corpus(baseline, tokenizer, data["validation"])
    masks = ns.CumulativeThreshold(demo.k).select(counts)
    masks.save_pretrained(f"{training.output_dir}/masks")

    for method in METHODS:
        model = build_model(method, baseline, counts, MethodArguments(demo.k), PIVOT, training.seed)
        results[method] = run(method, model, demo.continue_steps, demo.continue_learning_rate)

    rows = [
        {"run": name, **{f"{group} {s}": v[s] for group, v in result["averages"].items() for s in SCORES}}
        for name, result in results.items()
    ]
    overlaps = [neuron_overlap(masks, stack, PIVOT) for stack in STACKS]
    families = [overlap.by_family([toy.family[code] for code in overlap.languages]) for overlap in overlaps]
    iou = [{name: float(of.mean()) for name, of in groups.items()} for groups in families]
    results[OVERLAP] = dict(zip(STACKS, iou, strict=True))
    results["kept"] = {pair: 1 - sum((s := masks.sparsity(pair)).values()) / len(s) for pair in masks.language_pairs}
    print("\n" + table(rows))
    trained = [{"run": name, "what is trained": what} for name, what in METHODS.items()]
    print("\n" + table(trained))
    print(f"\n{OVERLAP}")
    print(table([{"stack": side, **iou} for side, iou in results[OVERLAP].items()]))
    seconds = round(time.perf_counter() - started, 1)
    results |= {"comparison": rows, "runs": trained, "seed": training.seed, "seconds": seconds}
    path = write_results(str(training.output_dir), results)
    report = f"{training.output_dir}/report.html"
    write_report(report, "Neurons of artificial languages", masks, [str(training.output_dir)], toy.family)
    print(f"\n{seconds} s; wrote {path}; look at {report}")


if __name__ == "__main__":
    run(main)
