"""Time the method against its alternatives, side by side in one run: median ratios, as a table and as JSON.

accelerate launch recipes/benchmark.py --output_dir build/benchmark
"""

import copy
import tempfile
from dataclasses import dataclass, field

import torch
from peft import IA3Config, LoraConfig, get_peft_model

import neuron_specialization as ns
from neuron_specialization.analysis.shapes import ModelShape, numbered_words, random_batch, random_m2m100, random_masks
from neuron_specialization.analysis.timing import TrainingStep, compare, identification_costs, storage_costs, work
from neuron_specialization.export.ctranslate2 import load_ctranslate2, save_ctranslate2
from neuron_specialization.translation.arguments import parse
from neuron_specialization.translation.processes import this_process
from neuron_specialization.translation.results import table, write_results

PAIRS = [f"l{i}-en" for i in range(8)]
LORA = LoraConfig(r=16, target_modules=["fc1"], task_type="SEQ_2_SEQ_LM")
IA3 = IA3Config(target_modules=["fc2"], feedforward_modules=["fc2"], task_type="SEQ_2_SEQ_LM")


@dataclass
class BenchmarkArguments:
    """What runs through it, under random masks."""

    output_dir: str = field(metadata={"help": "Where results.json goes."})
    batch_size: int = field(default=32, metadata={"help": "Sentences per batch."})
    length: int = field(default=64, metadata={"help": "Tokens per sentence."})
    kept: float = field(default=0.7, metadata={"help": "Share of neurons that a pair keeps."})
    repeats: int = field(default=5, metadata={"help": "Rounds that count."})


def main() -> None:
    args, shape = parse(BenchmarkArguments, ModelShape)
    torch.manual_seed(0)
    base = random_m2m100(shape).to(this_process().device)
    batch = random_batch(base, args.batch_size, args.length)
    rows = identification_costs(base, batch, args.repeats) + training(base, batch, args) + mixed(base, batch, args)
    rows += generation(base, args) + storage_costs(args.repeats)
    print("\n" + table(rows))
    print(f"wrote {write_results(args.output_dir, {'rows': rows, 'arguments': [vars(args), vars(shape)]})}")


def adapted(base, trainable: str, kept: float):
    """Return a copy of the base under random masks, one of whose pairs is set."""
    masks = random_masks(base, PAIRS, kept)
    config = ns.NeuronSpecializationConfig(masks=masks, trainable=trainable, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    model.set_language_pair(PAIRS[0])
    return model


def lora(base):
    return get_peft_model(copy.deepcopy(base), LORA)


def training(base, batch: dict, args: BenchmarkArguments) -> list[dict]:
    dense = TrainingStep(copy.deepcopy(base), batch)
    rows = []
    for kept in (0.6, args.kept, 0.9, 1.0):
        full = TrainingStep(adapted(base, "full", kept), batch)
        functions, target = {"full": full, "dense": dense}, "<= 0.90" if kept < 0.9 else "<= 1.02"
        row = compare(f"training step, full, {kept:.0%} kept", functions, {"dense": target}, args.repeats)[0]
        rows.append({**row, "FLOPs": work(full)[0] / work(dense)[0]})
    functions = {"delta": TrainingStep(adapted(base, "delta", args.kept), batch)}
    functions["LoRA r=16"] = TrainingStep(lora(base), batch)
    return rows + compare("training step, delta", functions, {"LoRA r=16": "<= 1.00"}, args.repeats)


def mixed(base, batch: dict, args: BenchmarkArguments) -> list[dict]:
    order = [i % len(PAIRS) for i in range(args.batch_size)]
    ours, many = adapted(base, "none", args.kept).eval(), lora(base)
    for i in range(len(PAIRS)):
        many.add_adapter(f"lora{i}", LORA)
    functions = {
        "ours": lambda: ours(**batch, language_pairs=[PAIRS[i] for i in order]),
        "dense": lambda: base.eval()(**batch),
        "LoRA, 8 adapter_names": lambda: many.eval()(**batch, adapter_names=[f"lora{i}" for i in order]),
    }
    functions = {name: torch.no_grad()(function) for name, function in functions.items()}
    return compare("mixed batch of 8 pairs, forward", functions, {"dense": "<= 1.05"}, args.repeats)


def ctranslate2(small, inputs: torch.Tensor, threads: int):
    """Return what generates with an exported model in CTranslate2, in int8."""
    words = numbered_words(small.config.vocab_size)
    with tempfile.TemporaryDirectory() as directory:
        save_ctranslate2(small, words, directory + "/int8", "int8")
        translator = load_ctranslate2(directory + "/int8", threads)
    sources = [words.convert_ids_to_tokens(row) for row in inputs.tolist()]
    return lambda: translator.translate_batch(sources, beam_size=5, min_decoding_length=16, max_decoding_length=16)


def generation(base, args: BenchmarkArguments) -> list[dict]:
    small = ns.compact(adapted(base, "none", args.kept), PAIRS[0])
    others = {"dense": base, "LoRA r=16": lora(base), "IA3": get_peft_model(copy.deepcopy(base), IA3)}
    models = {"ours": adapted(base, "delta", args.kept), **others, "exported": small}

    def generate(model, inputs):
        return lambda: model.eval().generate(input_ids=inputs, num_beams=5, min_new_tokens=16, max_new_tokens=16)

    rows = []
    for size in (1, 32):
        what = f"batch {size}, 5 beams"
        inputs = random_batch(base, size, args.length)["input_ids"]
        functions = {name: generate(model, inputs) for name, model in models.items()}
        rows += compare(f"generate, {what}", functions, {"dense": "<= 1.00"}, args.repeats)
        exported = {name: functions[name] for name in ("exported", "dense")}
        (flops, read), (all_flops, all_read) = [work(function) for function in exported.values()]
        limit = {"FLOPs": flops / all_flops, "bytes": read / all_read}
        target = {"dense": f"<= {1.1 * max(limit.values()):.2f}"}
        rows.append({**compare(f"exported, {what}", exported, target, args.repeats)[0], **limit})
        if base.device.type == "cpu":
            # for one sentence, threads wait for each other longer than they compute
            threads = sorted({1, torch.get_num_threads()}, reverse=size > 1)
            functions = {f"threads: {n}": ctranslate2(small, inputs, n) for n in threads}
            functions["transformers, dense"] = exported["dense"]
            what = f"CTranslate2 int8, threads: {threads[0]}, {what}"
            rows += compare(what, functions, {"transformers, dense": "<= 0.29"}, args.repeats)
    return rows


if __name__ == "__main__":
    main()
