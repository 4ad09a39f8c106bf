"""Small real models, languages and corpora that the tests share."""

import copy
import io
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path

import datasets
import pytest
import torch
from transformers import M2M100ForConditionalGeneration, T5Config, T5ForConditionalGeneration

import neuron_specialization as ns
from neuron_specialization.adapter import compact_policy
from neuron_specialization.translation.checkpoints import new_m2m100, new_model
from neuron_specialization.translation.data import load_parallel
from neuron_specialization.translation.tokenization import train_tokenizer
from neuron_specialization.translation.toy import ToyLanguages

RECIPES = Path(__file__).parent.parent / "recipes"
PAIRS = ["en-de", "de-en", "en-fr", "fr-en"]


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory):
    """What datasets caches, here and in the processes that tests start, is of this session only."""
    directory = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", directory)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", directory)
        yield


@pytest.fixture
def small_batches_run_compact(monkeypatch):
    """execution="auto" runs compact in batches of any size, as it does in large ones."""
    monkeypatch.setattr(compact_policy, "FEW_TOKENS", 0)


@pytest.fixture(params=[0, compact_policy.FEW_TOKENS], ids=["large batches", "small batches"])
def each_batch_size(request, monkeypatch):
    """execution="auto" as in large batches, and as in small ones."""
    monkeypatch.setattr(compact_policy, "FEW_TOKENS", request.param)


def make_m2m100(**changes) -> M2M100ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"layers": 2, "d_model": 16, "d_ff": 20, "heads": 2, "vocab_size": 60, "dropout": 0.0}
    config = {"decoder_ffn_dim": 28, "max_position_embeddings": 64, "init_std": 0.3}
    model = new_m2m100(**{**sizes, **config, **changes}).eval()
    for block in ns.find_ffn_blocks(model):
        torch.nn.init.normal_(block.up.bias, std=0.3)  # initialized to zero, masked neurons would output 0
    return model


def make_t5(feed_forward: str = "gated-gelu") -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60,
        d_model=16,
        d_kv=8,
        d_ff=20,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        initializer_factor=1.0,
        feed_forward_proj=feed_forward,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def make_batch(
    batch: int = 4, source: int = 9, target: int = 7, seed: int = 0, pad: int = 1
) -> dict[str, torch.Tensor]:
    """A batch whose rows have different lengths, padded."""
    draw = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, 60, (batch, source), generator=draw)
    labels = torch.randint(4, 60, (batch, target), generator=draw)
    attention_mask = torch.ones_like(input_ids)
    for row in range(batch):
        attention_mask[row, source - row % 4 :] = 0
        labels[row, target - row % 3 :] = -100
    input_ids[attention_mask == 0] = pad
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def make_masks(model, pairs=tuple(PAIRS), k: float = 0.6, seed: int = 0) -> ns.NeuronMasks:
    """Masks selected from real counts of random batches, a different one for each pair."""
    batches = {pair: [make_batch(seed=seed + i, batch=2)] for i, pair in enumerate(pairs)}
    return ns.CumulativeThreshold(k).select(ns.record_activations(model, batches, progress=False))


def checkpoint_activations(model, use_reentrant: bool) -> None:
    """Switch gradient checkpointing on, by its name since transformers 5.23 or by the one before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def zero_masked_rows(model, masks: ns.NeuronMasks, pair: str):
    """The plain reference: a copy of `model` whose masked rows of W1 are zero."""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name in masks.rows:
            reference.get_submodule(name).weight[~masks.row(pair, name)] = 0
    return reference


@pytest.fixture
def run_here(monkeypatch, capfd):
    """Run a recipe as its own main program, but in this process: no seconds of imports."""
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(recipe: str, *arguments: str, fails: bool = False, stdin: str = "") -> str:
        script = str(RECIPES / recipe)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capfd.readouterr()
        with pytest.raises(SystemExit) if fails else nullcontext():
            runpy.run_path(script, run_name="__main__")
        return capfd.readouterr().err if fails else capfd.readouterr().out

    return run


@pytest.fixture
def model():
    return make_m2m100()


@pytest.fixture
def masks(model):
    return make_masks(model)


@pytest.fixture(scope="session")
def toy() -> ToyLanguages:
    return ToyLanguages(families=2, languages_per_family=1, seed=0)


@pytest.fixture(scope="session")
def toy_files(toy, tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy")
    for split, count in (("train", 300), ("validation", 40), ("test", 20)):
        toy.sentences(count, split).to_json(directory / f"{split}.jsonl")
    return directory


@pytest.fixture(scope="session")
def toy_data(toy, toy_files):
    return {
        split: load_parallel(str(toy_files / f"{split}.jsonl"), toy.language_pairs)
        for split in ("train", "validation", "test")
    }


@pytest.fixture(scope="session")
def toy_tokenizer(toy):
    text = toy.sentences(300, "train")
    return train_tokenizer((s for code in toy.languages for s in text[code]), toy.languages, 500, 64)


@pytest.fixture
def toy_model(toy_tokenizer):
    torch.manual_seed(0)
    return new_model(toy_tokenizer, layers=1, d_model=32, d_ff=64, heads=2, dropout=0.0, max_length=64)


@pytest.fixture(scope="session")
def toy_checkpoint(toy_tokenizer, tmp_path_factory):
    """A checkpoint directory of an untrained model with its tokenizer."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("checkpoint")
    model = new_model(toy_tokenizer, layers=1, d_model=32, d_ff=64, heads=2, dropout=0.0, max_length=64)
    model.save_pretrained(directory)
    toy_tokenizer.save_pretrained(directory)
    return directory
