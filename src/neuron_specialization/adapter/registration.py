"""Register the method with PEFT from outside. Only this module touches PEFT's enum and mappings."""

from collections.abc import Callable
from enum import Enum
from typing import Any

from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers import Trainer
from transformers.utils import PushToHubMixin

from ..neurons.adapter_file import PEFT_TYPE, PREFIX


class NeuronSpecializationPeftType(str, Enum):  # noqa: UP042 - as PEFT defines its own
    """The type of this method: PEFT's own enum is closed, and transformers reads `.value`."""

    NEURON_SPECIALIZATION = PEFT_TYPE


_Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
_UPLOAD = PushToHubMixin._upload_modified_files
_CREATE_CARD = Trainer.create_model_card
_UPDATE_CARD = PeftModel.create_or_update_model_card
NATIVE_OR_OWN: Any = getattr(PeftType, PEFT_TYPE, NeuronSpecializationPeftType.NEURON_SPECIALIZATION)


def register(
    config_class: type,
    tuner_class: type,
    described_upload: _Wrapper,
    described_training: _Wrapper,
    described_saving: _Wrapper,
) -> None:
    """Register the method with PEFT; registering it again changes nothing.

    Args:
        config_class: the method's config.
        tuner_class: its tuner.
        described_upload: wraps the upload of transformers' `push_to_hub`, which puts an empty card over the adapter's.
        described_training: wraps the card of transformers' `Trainer`, which puts it over the adapter's.
        described_saving: wraps the card of PEFT's `PeftModel`, which puts its front matter into the adapter's.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[NATIVE_OR_OWN] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[NATIVE_OR_OWN] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[NATIVE_OR_OWN] = PREFIX
    PushToHubMixin._upload_modified_files = described_upload(_UPLOAD)  # type: ignore[method-assign]
    Trainer.create_model_card = described_training(_CREATE_CARD)  # type: ignore[method-assign]
    PeftModel.create_or_update_model_card = described_saving(_UPDATE_CARD)  # type: ignore[method-assign]
