import dataclasses

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import neuron_specialization as ns
from neuron_specialization.neurons.ffn import sample_weights

from .conftest import make_m2m100, make_t5


def test_plain_blocks_are_found_with_their_stack_layer_and_width():
    model = make_m2m100()
    blocks = ns.find_ffn_blocks(model)
    assert [(b.name, b.stack, b.layer, b.d_ff) for b in blocks] == [
        ("model.encoder.layers.0.fc1", "encoder", 0, 20),
        ("model.encoder.layers.1.fc1", "encoder", 1, 20),
        ("model.decoder.layers.0.fc1", "decoder", 0, 28),
        ("model.decoder.layers.1.fc1", "decoder", 1, 28),
    ]
    assert blocks[0].up is model.model.encoder.layers[0].fc1 and blocks[0].down is model.model.encoder.layers[0].fc2
    assert blocks[0].gate is None


def test_gated_blocks_are_named_by_the_gate():
    model = make_t5("gated-gelu")
    block = ns.find_ffn_blocks(model)[0]
    dense = model.encoder.block[0].layer[1].DenseReluDense
    assert block.name.endswith("wi_0")
    assert block.gate is dense.wi_0 and block.up is dense.wi_1 and block.down is dense.wo
    assert len(ns.find_ffn_blocks(model)) == 4


def test_weights_of_large_layers_are_sampled_to_their_end():
    """The last place of 41,943,040 is beyond the end in float32 (MADLAD-10B, mT5-XXL)."""
    down = nn.Linear(10240, 4096, bias=False, dtype=torch.float16, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        down.weight.zero_()
        down.weight[-1, -1] = 3
    block = dataclasses.replace(ns.find_ffn_blocks(make_m2m100())[0], down=down)
    assert sample_weights([block]) == [0, 0, 0, 0, 0, 0, 0, 3] * 3


@pytest.mark.parametrize("d_ff", [8, 16])
def test_widths_do_not_matter(d_ff):
    """Also where an FFN is as wide as the model, or narrower."""
    model = make_m2m100(encoder_ffn_dim=d_ff, decoder_ffn_dim=d_ff)
    blocks = ns.find_ffn_blocks(model)
    assert [b.d_ff for b in blocks] == [d_ff] * 4
    assert all(b.name.endswith("fc1") for b in blocks)


def test_decoder_only_model_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    with pytest.raises(ValueError, match="not an encoder-decoder model.*AutoModelForSeq2SeqLM"):
        ns.find_ffn_blocks(model)


def test_model_without_ffn_is_refused():
    model = make_m2m100()
    for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
        layer.fc1 = nn.Identity()
    with pytest.raises(ValueError, match="No FFN block found.*target_modules"):
        ns.find_ffn_blocks(model)


def test_blocks_of_an_adapted_model_keep_their_names(model, masks):
    from peft import get_peft_model

    before = [b.name for b in ns.find_ffn_blocks(model)]
    adapted = get_peft_model(model, ns.NeuronSpecializationConfig(masks=masks))
    assert [b.name for b in ns.find_ffn_blocks(adapted)] == before
    assert isinstance(torch.compile(model, backend="eager"), nn.Module)
    assert [b.name for b in ns.find_ffn_blocks(torch.compile(model, backend="eager"))] == before
