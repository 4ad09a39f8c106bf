r"""Compare what models make of the same sentences, layer by layer, and the singular values of their weights.
Of mBART-50 before and after it was fine-tuned on translation:

python recipes/compare_representations.py --config recipes/configs/compare_representations/mbart50.yaml \
    --models source=facebook/mbart-large-50 after=facebook/mbart-large-50-many-to-many-mmt \
    --test_file data/bible/test.parquet --output_dir build/representations-mbart50

The first model is the source of the others. A name that is given several times is one condition with several seeds:
--models source=build/denoised/model cp=build/cp-0/model cp=build/cp-1/model. Measured are CKA to the source, CKA and
retrieval between translations inside each model, and singular values; the control `random` is an untrained model.
"""

import dataclasses
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuron_specialization.analysis import representation_report as report
from neuron_specialization.analysis.figures import check_figures
from neuron_specialization.analysis.representations import language_similarity, layer_similarity, source_similarity
from neuron_specialization.analysis.seeds import compare, summarize
from neuron_specialization.analysis.spectrum_change import spectra, spectrum_changes
from neuron_specialization.translation import representations as states_of
from neuron_specialization.translation.arguments import as_mapping
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.data import load_multiparallel
from neuron_specialization.translation.processes import check_single_process
from neuron_specialization.translation.representations import token_states
from neuron_specialization.translation.results import table, write_results
from neuron_specialization.translation.transfer import RANDOM, Checkpoint, named_checkpoints

SENTENCES, TOKENS = "sentences", "tokens"


@dataclass
class RepresentationArguments:
    """Models, sentences, and what is compared."""

    output_dir: str = field(metadata={"help": "Where results.json, tables.md and the figures go."})
    models: list[str] = field(metadata={"help": "name=checkpoint, directories or Hub ids; the first is the source."})
    test_file: str = field(metadata={"help": "Multi-parallel text: one column, or one file, per language."})
    languages: list[str] = field(metadata={"help": "Languages to compare."})
    seen: list[str] = field(
        default_factory=list, metadata={"help": "Those that the continued training saw; others are reported apart."}
    )
    language_tokens: list[str] = field(default_factory=list, metadata={"help": "code=token, or code=token,token."})
    columns: list[str] = field(default_factory=list, metadata={"help": "code=column, where they differ."})
    split: str = field(default="test", metadata={"help": "Rows to take where the file has a column split."})
    level: str = field(
        default=SENTENCES, metadata={"help": "What CKA to the source compares: sentences (mean-pooled) or tokens."}
    )
    max_sentences: int | None = field(default=None, metadata={"help": "Take at most this many rows."})
    max_length: int = field(default=128, metadata={"help": "Text is truncated to this many tokens."})
    batch_size: int = field(default=64, metadata={"help": "Sentences per batch; changes speed only."})


def main() -> None:
    (args,) = parse(RepresentationArguments)
    check_single_process()
    check_figures()
    if args.level not in (SENTENCES, TOKENS) or not set(args.seen) <= set(args.languages):
        raise ValueError(f"Expected --level {SENTENCES} or {TOKENS}, and --seen among --languages.")
    limits = {"columns": as_mapping(args.columns), "max_sentences": args.max_sentences}
    sentences, counts = load_multiparallel(args.test_file, args.languages, split=args.split, **limits)
    print(table([counts]))
    found = measure(args, sentences)
    values = report.source_values(found["source_similarity"], args.seen)
    values += report.language_values(found["language_similarity"], args.seen)
    values += report.spectrum_values(found["spectra"])
    source = args.models[0].partition("=")[0]
    summary = summarize(values)
    tests = compare([row for row in values if not row["measure"].endswith(report.MISALIGNED)], source)
    tables = {**report.report_tables(summary, source), "Paired tests over seeds (of spectra: of log ratios)": tests}
    text = "\n\n".join(f"{title}\n\n{table(rows, 3)}" for title, rows in tables.items() if rows)
    print(text)
    results = {"sentences": counts, "summary": summary, "tests": tests, **found}
    write_results(args.output_dir, {**results, "arguments": [dataclasses.asdict(args)]})
    (Path(args.output_dir) / "tables.md").write_text(f"{text}\n", encoding="utf-8")
    report.draw(summary, source, args.output_dir)
    print(f"wrote {args.output_dir}")


def measure(args: RepresentationArguments, sentences: dict[str, list[str]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every measure, one model after another; the states of two are on disk at a time."""
    checkpoints = named_checkpoints(args.models)
    checkpoints.append(Checkpoint(RANDOM, 0, RANDOM, checkpoints[0].location))
    options = as_mapping(args.language_tokens), args.max_length
    states_of.check_shapes(checkpoints)
    states_of.check_tokenizers(checkpoints, sentences, *options, same=args.level == TOKENS)
    found: dict[str, list[dict[str, Any]]] = {"source_similarity": [], "language_similarity": [], "spectra": []}
    source: Any = None
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir) as directory:
        for checkpoint, model, tokenizer in states_of.load_each(checkpoints):
            about = {"model": checkpoint.name, "seed": checkpoint.seed}
            encoder = model.get_encoder()
            encoded = states_of.encode_languages(encoder, tokenizer, sentences, *options)
            pooled = {
                code: states_of.pooled_states(encoder, rows, f"{directory}/{source is None}-{code}", args.batch_size)
                for code, rows in encoded.items()
            }
            matrices = None if checkpoint.is_control else spectra(model)
            source = source or (encoder, pooled, matrices)
            if args.level == TOKENS:
                encoders = [source[0], encoder]
                similar = [
                    {"language": code, "layer": layer, "cka": cka}
                    for code, rows in encoded.items()
                    for layer, cka in enumerate(layer_similarity(token_states(encoders, rows, args.batch_size)))
                ]
            else:
                similar = source_similarity(source[1], pooled)
            found["source_similarity"] += [{**about, **row} for row in similar]
            found["language_similarity"] += [{**about, **row} for row in language_similarity(pooled)]
            if matrices is not None:
                found["spectra"] += [{**about, **row} for row in spectrum_changes(source[2], matrices)]
    return found


if __name__ == "__main__":
    run(main)
