"""Load and create checkpoints; errors are raised early."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbTokenizer,
    set_seed,
)

from ..neurons.adapter_file import CONFIG_NAME, fetch, read_config_file
from ..neurons.files import complete_writing
from ..neurons.language_pairs import split_pair
from .arguments import ShapeArguments
from .messages import in_one_line
from .tokenization import train_tokenizer

# what reading a missing, foreign or cut-off file raises: safetensors, pickled weights, weights of other shapes
_DAMAGES = (OSError, ValueError, SafetensorError, UnpicklingError, EOFError, RuntimeError)


def load_checkpoint(location: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Load a seq2seq model and its tokenizer.

    Args:
        location: checkpoint directory, or Hub id.
        dtype: of the weights, by default as they are stored. To train, load "float32": half precision has no room for
            small updates, and mixed precision (`--bf16`) computes in it all the same.

    Raises:
        ValueError: if a directory holds no checkpoint, or an adapter beside it, or the model is not a seq2seq model.
    """
    directory = Path(location)
    with suppress(OSError):  # of a read-only directory; loading then reports what is missing
        complete_writing(directory)
    if directory.is_dir() and not (directory / "config.json").is_file():
        hint = (
            "it is an adapter directory: pass it as --adapter, and its base as --model_name_or_path"
            if (directory / "adapter_config.json").is_file()
            else "expected what a transformers save_pretrained writes"
        )
        raise ValueError(f"{location} is not a checkpoint directory: it has no config.json; {hint}.")
    if (directory / "config.json").is_file() and (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{location} holds a model and an adapter, and transformers would load both. Keep them in two directories."
        )
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(location, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(location)
    except _DAMAGES as error:
        raise ValueError(
            f"Cannot load {location!r} as a seq2seq checkpoint: expected a directory or Hub id of an encoder-decoder "
            f"model with its tokenizer ({in_one_line(error)})."
        ) from error
    return model, tokenizer


def load_adapted(location: str, adapter: str | None) -> tuple[Any, Any]:
    """Load a checkpoint, and an adapter onto it where one is named.

    Raises:
        ValueError: if there is no such checkpoint or adapter, or the two do not fit (see `load_checkpoint`).
    """
    model, tokenizer = load_checkpoint(location)
    if adapter is not None:
        if not Path(adapter).is_dir() and Path(adapter).exists():
            raise ValueError(f"{adapter} is not an adapter directory.")
        try:
            read_config_file(fetch(adapter, CONFIG_NAME))  # PEFT does not say which file is damaged, or how
            model = PeftModel.from_pretrained(model, adapter)
        except _DAMAGES as error:
            raise ValueError(f"Cannot load the adapter {adapter!r}: {in_one_line(error)}") from error
    return model, tokenizer


def untrained_model(location: str, seed: int) -> Any:
    """Return a model with the architecture of a checkpoint and weights drawn from `seed`: the control for what a
    trained model shows. It bears no name, so that nothing made from it is taken for something of the checkpoint."""
    set_seed(seed)
    config = AutoConfig.from_pretrained(location)
    config.name_or_path = ""
    return AutoModelForSeq2SeqLM.from_config(config)


def new_m2m100(
    *, layers: int, d_model: int, d_ff: int, heads: int, vocab_size: int, dropout: float = 0.1, **config: Any
) -> M2M100ForConditionalGeneration:
    """Return an untrained model of NLLB's architecture (ReLU, pre-norm, tied embeddings), without layer drop.

    Args:
        layers: encoder layers, and as many decoder layers.
        d_model: width.
        d_ff: neurons per layer.
        heads: attention heads.
        vocab_size: entries of the vocabulary.
        dropout: of attention weights and of each sublayer's output; there is none between the FFN's projections.
        **config: any other field of `M2M100Config`; overrides what follows from the arguments above.
    """
    settings = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_ffn_dim": d_ff,
        "decoder_ffn_dim": d_ff,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_layerdrop": 0.0,  # dropped layers are unused parameters, which DistributedDataParallel refuses
        "decoder_layerdrop": 0.0,
        "dropout": dropout,
        "attention_dropout": dropout,
        "activation_dropout": 0.0,
        "init_std": d_model**-0.5,  # as in fairseq; with 0.02, the default, small models learn to align far later
    }
    model = M2M100ForConditionalGeneration(M2M100Config(**{**settings, **config}))
    freeze_unused_embedding(model)
    return model


def freeze_unused_embedding(model: Any) -> None:
    """Freeze a model's input embedding where neither stack nor the output uses it: M2M100 has one more, to be shared,
    beside those of its stacks, when its embeddings are not tied."""
    readers = (model.get_encoder(), model.get_decoder())
    used = [reader.get_input_embeddings() for reader in readers] + [model.get_output_embeddings()]
    shared = model.get_input_embeddings().weight
    if not any(module is not None and module.weight is shared for module in used):
        shared.requires_grad_(False)


def new_model(
    tokenizer: Any,
    layers: int,
    d_model: int,
    d_ff: int,
    heads: int,
    dropout: float,
    max_length: int,
    activation: str = "relu",
    tie_embeddings: bool = True,
) -> M2M100ForConditionalGeneration:
    """Return an untrained model for `tokenizer` (see `new_m2m100`) that generates with five beams.

    Args:
        tokenizer: gives the vocabulary and the special tokens.
        layers: encoder layers, and as many decoder layers.
        d_model: width.
        d_ff: neurons per layer.
        heads: attention heads.
        dropout: see `new_m2m100`.
        max_length: positions, and the longest generation, in tokens.
        activation: of the FFNs, such as "relu" or "gelu".
        tie_embeddings: whether encoder, decoder and output share one embedding.
    """
    model = new_m2m100(
        layers=layers,
        d_model=d_model,
        d_ff=d_ff,
        heads=heads,
        vocab_size=len(tokenizer),
        dropout=dropout,
        activation_function=activation,
        tie_word_embeddings=tie_embeddings,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    model.generation_config.max_length = max_length
    model.generation_config.num_beams = 5
    return model


def new_checkpoint(
    train: Mapping[str, Dataset],
    language_tokens: Mapping[str, str],
    shape: ShapeArguments,
    max_length: int,
    mask_token: str | None = None,
) -> tuple[M2M100ForConditionalGeneration, NllbTokenizer]:
    """Return an untrained model, and its tokenizer, trained on both sides of the training data.

    Args:
        train: pair → Dataset with columns "source" and "target".
        language_tokens: language code → language token, where codes are not to be tokens themselves.
        shape: of the model.
        max_length: positions, and the longest generation, in tokens.
        mask_token: see `train_tokenizer`.
    """
    languages = dict.fromkeys(code for pair in train for code in split_pair(pair))
    tags = [language_tokens.get(code, code) for code in languages]
    text = (sentence for rows in train.values() for side in ("source", "target") for sentence in rows[side])
    tokenizer = train_tokenizer(text, tags, shape.vocab_size, max_length, mask_token)
    sizes = (shape.layers, shape.d_model, shape.d_ff, shape.heads, shape.dropout)
    return new_model(tokenizer, *sizes, max_length, shape.activation, shape.tie_embeddings), tokenizer
