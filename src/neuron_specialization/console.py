"""The command `neuron-specialization`: what the recipes do, and what an adapter holds."""

import sys
from argparse import ArgumentParser

from .neurons.adapter_file import read_config
from .neurons.masks import NeuronMasks
from .neurons.selector_description import describe_selector

RECIPES = {
    "identify": "Find the neurons that each language pair uses.",
    "specialize": "Train under the masks of each pair; without masks, fine-tune.",
    "translate": "Translate a file.",
    "score": "BLEU and chrF++ of a model on test data.",
    "export": "One pair as a smaller model, for transformers or CTranslate2.",
    "publish": "Put an adapter on the Hub, with its model card.",
    "merge_masks": "Merge adapters that different people made.",
    "pretrain": "Train a multilingual baseline, or a denoiser.",
    "continue_pretraining": "Continue a checkpoint on translation, or on denoising as the control.",
    "prepare_text": "Gather the text of a continued pre-training run.",
    "compare_representations": "Compare checkpoints layer by layer, and the singular values of their weights.",
    "compare_methods": "The paper's comparison, in stages.",
    "compare_sizes": "The comparison over models of several sizes, against measured interference.",
    "analyze": "Overlap of masks against the distance of languages.",
    "explain": "Gradients of language pairs, and the words that their neurons are active on.",
    "reidentify": "Identify masks again, on other data and other checkpoints.",
    "transfer_cross_lingually": "Compare encoders by cross-lingual transfer.",
    "transfer_sequentially": "Learn one language pair after another, and measure what is forgotten.",
    "prune": "Prune neurons of these models, and measure what that costs.",
    "mass_activation": "Look into these models: the mass of their neurons from step to step.",
    "demo": "The whole method on artificial languages, in minutes.",
    "toy_data": "Write artificial languages.",
    "benchmark": "Time the method against its alternatives.",
    "benchmark_data": "Time reading, checking and encoding data.",
    "memory": "Compute and measure the memory of training.",
}


def main() -> None:
    """Run the command line of this process."""
    parser = ArgumentParser("neuron-specialization", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("recipes", help="what the scripts in recipes/ do")
    commands.add_parser("info", help="what an adapter holds").add_argument("adapter", help="directory, or Hub id")
    args = parser.parse_args()
    try:
        print(list_recipes() if args.command == "recipes" else describe(args.adapter))
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def list_recipes() -> str:
    """Return a line per recipe."""
    width = max(map(len, RECIPES))
    lines = [f"{name:<{width}}  {job}" for name, job in RECIPES.items()]
    return "\n".join([*lines, "", "Each is a script in recipes/ of the repository; --help shows its options."])


def describe(adapter: str) -> str:
    """Return what an adapter holds: its base, pairs, selector and kept shares, and what was trained."""
    config, masks = read_config(adapter), NeuronMasks.from_pretrained(adapter)
    base = masks.base_model_name_or_path or "not recorded"
    fingerprint = ", ".join(f"{name} {value}" for name, value in masks.fingerprint.items())
    tokens = ", ".join(f"{code}={token}" for code, token in (masks.language_token_ids or {}).items())
    of_low_rank = ("r",) if config.get("trainable") == "low_rank" else ()
    settings = {key: config.get(key) for key in (*of_low_rank, "update_only", "protected_pairs", "default_pair")}
    told = ", ".join(f"{key}={value}" for key, value in settings.items() if value)
    facts = {
        "base model": f"{base} ({fingerprint})" if fingerprint else base,
        "trained": config.get("trainable", "not recorded") + (f" ({told})" if told else ""),
        "pairs": f"{len(masks.language_pairs)}: {', '.join(masks.language_pairs)}",
        "selector": describe_selector(masks.selector) or "not recorded",
        "token ids": tokens or "not recorded",
    }
    return "\n".join([*(f"{name:<12}{value}" for name, value in facts.items()), "", repr(masks)])
