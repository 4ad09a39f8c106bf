"""Find, share, train and deploy the neurons that each language pair uses in a multilingual translation model.

Importing this package registers the method with PEFT.
"""

from .adapter.adding_pairs import add_pairs
from .adapter.config import NeuronSpecializationConfig
from .adapter.language_tokens import language_token_ids
from .adapter.loading import check_loaded_adapters
from .adapter.model import NeuronSpecializationModel
from .adapter.registration import register
from .adapter.routing import language_pair, set_language_pair
from .adapter.storage import described_saving, described_training, described_upload, save_adapter
from .export.compaction import compact
from .neurons.activations import ActivationCounts, record_activations
from .neurons.attribution import record_attribution
from .neurons.controls import Pooled, RandomOverlap, WrongPair
from .neurons.ffn import FfnBlock, find_ffn_blocks
from .neurons.masks import NeuronMasks
from .neurons.selection import LAPE, CumulativeThreshold, RandomMatched, TopShare
from .neurons.specificity import GeneralSpecific, Specificity
from .translation.data import load_parallel
from .translation.identification import record_corpus
from .translation.translate import translate

register(NeuronSpecializationConfig, NeuronSpecializationModel, described_upload, described_training, described_saving)
check_loaded_adapters()

__version__ = "0.1.0"
__all__ = [
    "ActivationCounts",
    "CumulativeThreshold",
    "FfnBlock",
    "GeneralSpecific",
    "LAPE",
    "NeuronMasks",
    "NeuronSpecializationConfig",
    "NeuronSpecializationModel",
    "Pooled",
    "RandomMatched",
    "RandomOverlap",
    "Specificity",
    "TopShare",
    "WrongPair",
    "add_pairs",
    "compact",
    "find_ffn_blocks",
    "language_pair",
    "language_token_ids",
    "load_parallel",
    "record_activations",
    "record_attribution",
    "record_corpus",
    "save_adapter",
    "set_language_pair",
    "translate",
]
