"""Find, share, train and deploy the neurons that each language pair uses in a multilingual translation model.

Importing this package registers the method with PEFT.
"""

from .adapter.config import NeuronSpecializationConfig
from .adapter.language_tokens import language_tokens
from .adapter.model import NeuronSpecializationModel
from .adapter.registration import register
from .adapter.routing import language_pair, set_language_pair
from .adapter.storage import save_adapter
from .neurons.activations import ActivationCounts, record_activations
from .neurons.ffn import FfnBlock, find_ffn_blocks
from .neurons.masks import NeuronMasks
from .neurons.selection import LAPE, CumulativeThreshold, RandomMatched, TopShare

register(NeuronSpecializationConfig, NeuronSpecializationModel)

__version__ = "0.1.0"
__all__ = [
    "ActivationCounts",
    "CumulativeThreshold",
    "FfnBlock",
    "LAPE",
    "NeuronMasks",
    "NeuronSpecializationConfig",
    "NeuronSpecializationModel",
    "RandomMatched",
    "TopShare",
    "compact",
    "find_ffn_blocks",
    "language_pair",
    "language_tokens",
    "record_activations",
    "save_adapter",
    "set_language_pair",
    "translate",
]


def __getattr__(name: str) -> object:
    # data, Trainer and metrics are heavy; load them when they are first used
    if name == "translate":
        from .translation.translate import translate

        return translate
    if name == "compact":
        from .export.compaction import compact

        return compact
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
