"""Time the method against its alternatives, side by side in one run: ratios of medians, as a table and as JSON.

accelerate launch recipes/benchmark.py --output_dir build/benchmark
"""

import copy
from dataclasses import dataclass, field

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import M2M100Config, M2M100ForConditionalGeneration

import neuron_specialization as ns
from neuron_specialization.analysis.timing import count_on_host, random_masks, side_by_side, storage_costs
from neuron_specialization.translation.arguments import parse
from neuron_specialization.translation.processes import this_process
from neuron_specialization.translation.results import table, write_results

PAIRS = [f"l{i}-en" for i in range(8)]


@dataclass
class BenchmarkArguments:
    """An M2M100-shaped model with random weights, and random masks."""

    output_dir: str = field(metadata={"help": "Where results.json goes."})
    layers: int = field(default=6, metadata={"help": "Encoder layers, and decoder layers."})
    d_model: int = field(default=512, metadata={"help": "Width."})
    d_ff: int = field(default=2048, metadata={"help": "Neurons per layer."})
    vocab_size: int = field(default=32000, metadata={"help": "Vocabulary."})
    batch_size: int = field(default=16, metadata={"help": "Sentences per batch."})
    length: int = field(default=32, metadata={"help": "Tokens per sentence."})
    kept: float = field(default=0.7, metadata={"help": "Share of neurons that a pair keeps."})
    repeats: int = field(default=7, metadata={"help": "Rounds that count."})


def main() -> None:
    (args,) = parse(BenchmarkArguments)
    torch.manual_seed(0)
    device = this_process().device
    config = M2M100Config(
        vocab_size=args.vocab_size, d_model=args.d_model, encoder_ffn_dim=args.d_ff, decoder_ffn_dim=args.d_ff,
        encoder_layers=args.layers, decoder_layers=args.layers, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
        encoder_attention_heads=8, decoder_attention_heads=8, dropout=0.1, activation_dropout=0.0,
    )  # fmt: skip
    base = M2M100ForConditionalGeneration(config).to(device)
    masks = random_masks(base, PAIRS, args.kept)
    tokens = torch.randint(4, args.vocab_size, (args.batch_size, args.length), device=device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    rows = []

    def compare(what: str, ours: str, functions: dict, target: str) -> None:
        median = side_by_side(functions, args.repeats)
        for other in [name for name in functions if name != ours]:
            ratio = median[ours] / median[other]
            row = {"what": what, "compared with": other, "seconds": median[ours], "other": median[other]}
            rows.append({**row, "ratio": ratio, "target": target})
        print(what, flush=True)

    def adapted(kind) -> PeftModel:
        model = get_peft_model(copy.deepcopy(base), kind)
        if hasattr(model, "set_language_pair"):
            model.set_language_pair(PAIRS[0])
        return model

    def ours(trainable: str) -> PeftModel:
        return adapted(ns.NeuronSpecializationConfig(masks=masks, trainable=trainable, task_type="SEQ_2_SEQ_LM"))

    def step(model):
        optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-5)

        def run() -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def forward(model, **kwargs):
        @torch.no_grad()
        def run() -> None:
            model.eval()(**batch, **kwargs)

        return run

    headless = copy.deepcopy(base).model.eval()
    once = {"input_ids": tokens, "attention_mask": batch["attention_mask"], "decoder_input_ids": tokens}
    times = range(8)  # batches of one recording
    identify = {
        "identification": lambda: ns.record_activations(base, {PAIRS[0]: [batch] * len(times)}, progress=False),
        "forward with loss": lambda: [forward(base)() for _ in times],
        "headless forward": torch.no_grad()(lambda: [headless(**once) for _ in times]),
        "copy to host and nonzero": lambda: [count_on_host(base, batch) for _ in times],
    }
    compare("identification", "identification", identify, "<= 0.70 / <= 1.05 headless / <= 0.62 released")
    lora = LoraConfig(r=16, target_modules=["fc1"], task_type="SEQ_2_SEQ_LM")
    functions = {"full": step(ours("full")), "dense fine-tuning": step(copy.deepcopy(base))}
    compare("training step, full, one pair", "full", functions, "<= 0.90")
    functions = {"delta": step(ours("delta")), "LoRA r=16": step(adapted(lora))}
    compare("training step, delta", "delta", functions, "<= 1.00")
    mixed = [PAIRS[i % len(PAIRS)] for i in range(args.batch_size)]
    many = adapted(lora)
    for name in PAIRS:
        many.add_adapter(name.replace("-", "_"), lora)
    functions = {
        "mixed batch": forward(ours("none"), language_pairs=mixed),
        "dense": forward(base),
        "LoRA, 8 adapter_names": forward(many, adapter_names=[name.replace("-", "_") for name in mixed]),
    }
    compare("mixed batch of 8 pairs, forward", "mixed batch", functions, "<= 1.05 dense")
    small = ns.compact(ours("none"), PAIRS[0])
    ia3 = IA3Config(target_modules=["fc2"], feedforward_modules=["fc2"], task_type="SEQ_2_SEQ_LM")
    models = {"ours": ours("delta"), "dense": base, "LoRA": adapted(lora), "IA3": adapted(ia3), "exported": small}

    def generate(model, size: int):
        inputs = torch.randint(4, args.vocab_size, (size, args.length), device=device)
        return lambda: model.eval().generate(input_ids=inputs, num_beams=5, max_new_tokens=16, min_new_tokens=16)

    for size in (1, 32):
        functions = {name: generate(model, size) for name, model in models.items()}
        compare(f"generate, batch {size}, 5 beams", "ours", functions, "<= 1.00 dense")
        exported = {name: functions[name] for name in ("exported", "dense")}
        compare(f"exported, batch {size}, 5 beams", "exported", exported, "the byte and FLOP ratio")
    rows += storage_costs(args.repeats)
    print("\n" + table(rows))
    print(f"wrote {write_results(args.output_dir, {'rows': rows, 'arguments': vars(args)})}")


if __name__ == "__main__":
    main()
