"""Tiny models of every encoder-decoder architecture, and how many FFN blocks each really has."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as tf
from tabulate import tabulate
from torch import nn

import neuron_specialization as ns

VOCABULARY = 64
TABLE_BEGINS = "<!-- support table: python -m tests.architectures -->"
TABLE_ENDS = "<!-- end of the support table -->"


@dataclass(frozen=True)
class Architecture:
    """One architecture of the contract test.

    Attributes:
        build: makes a tiny model with random weights.
        blocks: number of FFN blocks it really has.
        features: name and shape (without batch) of the encoder's input where that is not text.
        experts: whether it has mixture-of-experts layers.
        note: what a user should know about it, for the support table.
        use_cache: whether the library's own generation works with its cache.
    """

    build: Callable[[], nn.Module]
    blocks: int
    features: tuple[str, tuple[int, int]] | None = None
    experts: bool = False
    note: str = ""
    use_cache: bool = True


def _bart_like(config_class: type, model_class: type, **changes: object) -> Callable[[], nn.Module]:
    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 20,
        "decoder_ffn_dim": 28,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
        **changes,
    }
    return lambda: model_class(config_class(**sizes))


def _t5_like(config_class: type, model_class: type, **changes: object) -> Callable[[], nn.Module]:
    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 20,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "initializer_factor": 1.0,
        "decoder_start_token_id": 0,
        **changes,
    }
    return lambda: model_class(config_class(**sizes))


def _encoder_decoder() -> nn.Module:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
    }
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(tf.BertConfig(**sizes), tf.BertConfig(**sizes))
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 3
    model = tf.EncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 2, 1
    return model


def _prophetnet() -> nn.Module:
    return tf.ProphetNetForConditionalGeneration(
        tf.ProphetNetConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            encoder_ffn_dim=20,
            decoder_ffn_dim=28,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=2,
            num_decoder_attention_heads=2,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            init_std=0.3,
            pad_token_id=1,
            decoder_start_token_id=2,
            eos_token_id=2,
        )
    )


def _seamless(config_class: type, model_class: type) -> Callable[[], nn.Module]:
    sizes = {
        "vocab_size": VOCABULARY,
        "t2u_vocab_size": VOCABULARY,
        "hidden_size": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 20,
        "decoder_ffn_dim": 28,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "initializer_range": 0.3,
        "pad_token_id": 1,
    }
    return lambda: model_class(config_class(**sizes))


def _gemma_sizes() -> dict:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "query_pre_attn_scalar": 8,
        "initializer_range": 0.3,
        "attention_dropout": 0.0,
        "dropout_rate": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }


def _t5gemma() -> nn.Module:
    module = {**_gemma_sizes(), "layer_types": ["full_attention"] * 2}
    config = tf.T5GemmaConfig(
        encoder=module, decoder={**module, "intermediate_size": 28}, vocab_size=VOCABULARY, dropout_rate=0.0
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 1, 2, 3
    return tf.T5GemmaForConditionalGeneration(config)


def _t5gemma2() -> nn.Module:
    text = {**_gemma_sizes(), "layer_types": ["full_attention"] * 2}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    encoder = {"text_config": text, "vision_config": vision, "vocab_size": VOCABULARY}
    config = tf.T5Gemma2Config(
        encoder=encoder, decoder={**text, "intermediate_size": 28}, dropout_rate=0.0, image_token_index=60
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 1, 2, 3
    return tf.T5Gemma2ForConditionalGeneration(config)


def _whisper() -> nn.Module:
    build = _bart_like(
        tf.WhisperConfig,
        tf.WhisperForConditionalGeneration,
        init_std=0.3,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=64,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    return build()


ARCHITECTURES: dict[str, Architecture] = {
    "bart": Architecture(_bart_like(tf.BartConfig, tf.BartForConditionalGeneration, init_std=0.3), 4),
    "bigbird_pegasus": Architecture(
        _bart_like(
            tf.BigBirdPegasusConfig,
            tf.BigBirdPegasusForConditionalGeneration,
            init_std=0.3,
            attention_type="original_full",
            block_size=4,
            num_random_blocks=1,
        ),
        4,
    ),
    "blenderbot": Architecture(
        _bart_like(tf.BlenderbotConfig, tf.BlenderbotForConditionalGeneration, init_std=0.3), 4
    ),
    "blenderbot-small": Architecture(
        _bart_like(tf.BlenderbotSmallConfig, tf.BlenderbotSmallForConditionalGeneration, init_std=0.3), 4
    ),
    "encoder-decoder": Architecture(_encoder_decoder, 4),
    "fsmt": Architecture(
        _bart_like(
            tf.FSMTConfig,
            tf.FSMTForConditionalGeneration,
            init_std=0.3,
            langs=["en", "de"],
            src_vocab_size=VOCABULARY,
            tgt_vocab_size=VOCABULARY,
        ),
        4,
    ),
    "led": Architecture(
        _bart_like(
            tf.LEDConfig,
            tf.LEDForConditionalGeneration,
            init_std=0.3,
            attention_window=[4, 4],
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
        ),
        4,
    ),
    "longt5": Architecture(
        _t5_like(tf.LongT5Config, tf.LongT5ForConditionalGeneration, encoder_attention_type="local", local_radius=3), 4
    ),
    "m2m_100": Architecture(_bart_like(tf.M2M100Config, tf.M2M100ForConditionalGeneration, init_std=0.3), 4),
    "marian": Architecture(_bart_like(tf.MarianConfig, tf.MarianMTModel, init_std=0.3), 4),
    "mbart": Architecture(_bart_like(tf.MBartConfig, tf.MBartForConditionalGeneration, init_std=0.3), 4),
    "mt5": Architecture(_t5_like(tf.MT5Config, tf.MT5ForConditionalGeneration), 4),
    "mvp": Architecture(_bart_like(tf.MvpConfig, tf.MvpForConditionalGeneration, init_std=0.3), 4),
    "nllb-moe": Architecture(
        _bart_like(
            tf.NllbMoeConfig,
            tf.NllbMoeForConditionalGeneration,
            init_std=0.3,
            num_experts=2,
            expert_capacity=64,
            encoder_sparse_step=2,
            decoder_sparse_step=2,
            moe_token_dropout=0.0,
        ),
        2 * (1 + 2),
        experts=True,
        note="experts are counted over the tokens routed to them",
    ),
    "pegasus": Architecture(_bart_like(tf.PegasusConfig, tf.PegasusForConditionalGeneration, init_std=0.3), 4),
    "pegasus_x": Architecture(
        _bart_like(
            tf.PegasusXConfig, tf.PegasusXForConditionalGeneration, init_std=0.3, block_size=4, num_global_tokens=2
        ),
        4,
    ),
    "plbart": Architecture(_bart_like(tf.PLBartConfig, tf.PLBartForConditionalGeneration, init_std=0.3), 4),
    "prophetnet": Architecture(
        _prophetnet,
        4,
        note="transformers generates with it only when `use_cache=False`; activations are counted on the main stream",
        use_cache=False,
    ),
    "seamless_m4t": Architecture(_seamless(tf.SeamlessM4TConfig, tf.SeamlessM4TForTextToText), 4),
    "seamless_m4t_v2": Architecture(_seamless(tf.SeamlessM4Tv2Config, tf.SeamlessM4Tv2ForTextToText), 4),
    "switch_transformers": Architecture(
        _t5_like(
            tf.SwitchTransformersConfig,
            tf.SwitchTransformersForConditionalGeneration,
            num_experts=2,
            expert_capacity=64,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
        ),
        2 * (1 + 2),
        experts=True,
        note="experts are counted over the tokens routed to them",
    ),
    "t5": Architecture(_t5_like(tf.T5Config, tf.T5ForConditionalGeneration), 4),
    "t5gemma": Architecture(_t5gemma, 4),
    "t5gemma2": Architecture(_t5gemma2, 4),
    "umt5": Architecture(_t5_like(tf.UMT5Config, tf.UMT5ForConditionalGeneration), 4),
    "whisper": Architecture(_whisper, 4, ("input_features", (8, 24))),
    "speech_to_text": Architecture(
        _bart_like(
            tf.Speech2TextConfig,
            tf.Speech2TextForConditionalGeneration,
            init_std=0.3,
            input_feat_per_channel=8,
            input_channels=1,
            conv_channels=16,
            max_source_positions=64,
            max_target_positions=64,
        ),
        4,
        ("input_features", (24, 8)),
    ),
}


def make(name: str) -> nn.Module:
    """Build one architecture, seeded, in eval mode, with biases that are not zero."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def make_batch(name: str, batch: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch whose rows have different lengths, with everything the model's forward needs."""
    architecture = ARCHITECTURES[name]
    start, pad = 2, 1
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, 58, (batch, 6), generator=draw)
    rows = {"labels": labels.clone()}
    for row in range(batch):
        rows["labels"][row, 6 - row % 3 :] = -100
    decoder = torch.cat([torch.full((batch, 1), start), rows["labels"][:, :-1]], dim=1)
    rows["decoder_input_ids"] = decoder.masked_fill(decoder == -100, pad)  # as our collator does: FSMT never shifts
    if architecture.features is not None:
        key, shape = architecture.features
        rows[key] = torch.randn(batch, *shape, generator=draw)
        return rows
    rows["input_ids"] = torch.randint(4, 58, (batch, 9), generator=draw)
    rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    for row in range(batch):
        rows["attention_mask"][row, 9 - row % 4 :] = 0
    return rows


def double(name: str, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return model and batch in float64, except where the library's own masks overflow there."""
    if name in ("fsmt", "prophetnet"):
        return model, batch
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def support_table() -> str:
    """Return the README's table: what the contract test finds in each architecture, and passes with it."""
    rows = []
    for name, architecture in sorted(ARCHITECTURES.items()):
        blocks = ns.find_ffn_blocks(make(name))
        kind = "gated" if blocks[0].gate is not None else "plain"
        if architecture.experts:
            kind += ", experts"
        mixed = "one pair per batch" if architecture.experts else "several pairs"
        rows.append({"architecture": f"`{name}`", "FFN": kind, "a batch may hold": mixed, "note": architecture.note})
    return tabulate(rows, headers="keys", tablefmt="github")


if __name__ == "__main__":
    # python -m tests.architectures: rewrite the README's table
    readme = Path(__file__).parent.parent / "README.md"
    before, _, rest = readme.read_text().partition(TABLE_BEGINS)
    readme.write_text(f"{before}{TABLE_BEGINS}\n{support_table()}\n{TABLE_ENDS}{rest.partition(TABLE_ENDS)[2]}")
