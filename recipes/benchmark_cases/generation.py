"""Generation with adapters, and with models exported to transformers and CTranslate2."""

import copy
import tempfile

import torch
from peft import IA3Config, get_peft_model

import neuron_specialization as ns
from neuron_specialization.analysis.shapes import numbered_words, random_batch
from neuron_specialization.analysis.timing import compare, work
from neuron_specialization.export.ctranslate2 import load_ctranslate2, save_ctranslate2

from .models import PAIRS, adapted, lora

IA3 = IA3Config(target_modules=["fc2"], feedforward_modules=["fc2"], task_type="SEQ_2_SEQ_LM")


def generation(base, length: int, kept: float, repeats: int) -> list[dict]:
    """Compare beam search with adapters, with a pair exported as a smaller model, and with that in CTranslate2."""
    small = ns.compact(adapted(base, "none", kept), PAIRS[0])
    others = {"dense": base, "LoRA r=16": lora(base), "IA3": get_peft_model(copy.deepcopy(base), IA3)}
    models = {"ours": adapted(base, "delta", kept), **others, "exported": small}
    rows = []
    for size in (1, 32):
        what = f"batch {size}, 5 beams"
        inputs = random_batch(base, size, length)["input_ids"]
        functions = {name: transformers(model, inputs) for name, model in models.items()}
        rows += compare(f"generate, {what}", functions, {"dense": "<= 1.00"}, repeats)
        rows.append(exported(functions["exported"], functions["dense"], what, repeats))
        if base.device.type == "cpu":
            # one thread first for one sentence, where threads wait for each other longer than they compute
            threads = sorted({1, torch.get_num_threads()}, reverse=size > 1)
            functions = {f"threads: {n}": ctranslate2(small, inputs, n) for n in threads} | {
                "transformers, dense": functions["dense"]
            }
            what = f"CTranslate2 int8, threads: {threads[0]}, {what}"
            rows += compare(what, functions, {"transformers, dense": "<= 0.29"}, repeats)
    return rows


def exported(small, dense, what: str, repeats: int) -> dict:
    """Compare generation with an exported model and the dense one; the ratio of their work is the lower limit."""
    (flops, read), (all_flops, all_read) = work(small), work(dense)
    limit = {"FLOPs": flops / all_flops, "bytes": read / all_read}
    target = {"dense": f"<= {1.1 * max(limit.values()):.2f}"}
    return {**compare(f"exported, {what}", {"exported": small, "dense": dense}, target, repeats)[0], **limit}


def transformers(model, inputs: torch.Tensor):
    """Return a function that generates with a transformers model."""
    return lambda: model.eval().generate(input_ids=inputs, num_beams=5, min_new_tokens=16, max_new_tokens=16)


def ctranslate2(small, inputs: torch.Tensor, threads: int):
    """Return a function that generates with an exported model in CTranslate2, in int8."""
    words = numbered_words(small.config.vocab_size)
    with tempfile.TemporaryDirectory() as directory:
        save_ctranslate2(small, words, directory + "/int8", "int8")
        translator = load_ctranslate2(directory + "/int8", threads)
    sources = [words.convert_ids_to_tokens(row) for row in inputs.tolist()]
    return lambda: translator.translate_batch(sources, beam_size=5, min_decoding_length=16, max_decoding_length=16)
