"""The models that are compared: copies of one base under random masks, or with LoRA."""

import copy

from peft import LoraConfig, get_peft_model

import neuron_specialization as ns
from neuron_specialization.analysis.shapes import random_masks
from neuron_specialization.neurons.language_pairs import Routes

PAIRS = [f"l{i}-en" for i in range(8)]
LORA = LoraConfig(r=16, target_modules=["fc1"], task_type="SEQ_2_SEQ_LM")


def adapted(base, trainable: str, kept: float):
    """Return a copy of the base under random masks, with one of their pairs set."""
    masks = random_masks(base, Routes.per_pair(PAIRS), kept)
    config = ns.NeuronSpecializationConfig(masks=masks, trainable=trainable, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    model.set_language_pair(PAIRS[0])
    return model


def lora(base):
    """Return a copy of the base with LoRA on every fc1."""
    return get_peft_model(copy.deepcopy(base), LORA)
