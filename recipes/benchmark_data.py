r"""Time what is done with data before the first step, and extrapolate to the 61 million pairs of EC30.

python recipes/benchmark_data.py --config recipes/configs/benchmark_data/bible.yaml --train_file data/train.parquet \
    --validation_file data/validation.parquet --test_file data/test.parquet --output_dir build/benchmark-data
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, config

from neuron_specialization.translation.arguments import DataArguments
from neuron_specialization.translation.arrow import numpy_column
from neuron_specialization.translation.batching import DirectionBatchSampler
from neuron_specialization.translation.check import check_parallel
from neuron_specialization.translation.checkpoints import new_model
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.encoding import encode_parallel
from neuron_specialization.translation.processes import check_single_process
from neuron_specialization.translation.results import table, write_results
from neuron_specialization.translation.tokenization import train_tokenizer

EC30, EC30_DIRECTIONS = 61_000_000, 60


@dataclass
class BenchmarkArguments:
    """Output and processes."""

    output_dir: str = field(metadata={"help": "Where results.json goes."})
    preprocessing_num_workers: int = field(default=1, metadata={"help": "Processes that tokenize."})


def main() -> None:
    args, data = parse(BenchmarkArguments, DataArguments, unused=("pivot", "drop_faulty", "source_tag", "splits"))
    check_single_process()
    memory = sampler_memory()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"] = f"{directory}/cache"  # nothing is cached yet

        def timed(what: str, function: Callable[[], Any]) -> Any:
            wall, cpu = time.perf_counter(), sum(os.times()[:4])  # with the processes it starts
            result = function()
            wall, cpu = time.perf_counter() - wall, sum(os.times()[:4]) - cpu
            rows.append({"what": what, "seconds": wall, "CPU seconds": cpu})
            print(f"{what}: {wall:.1f} s", flush=True)
            return result

        timed("read the files", lambda: data.load("train"))
        train = timed("read again", lambda: data.load("train"))
        held_out = [data.load("validation"), data.load("test")]
        timed("data check", lambda: check_parallel(train, held_out))
        languages = sorted({code for pair in train for code in pair.split("-")})
        tokens = {code: f"__{code}__" for code in languages}
        text = (sentence for pair in train.values() for sentence in pair["source"][:2000])
        tokenizer = train_tokenizer(text, list(tokens.values()), 8000, data.max_length)
        options = {"max_length": data.max_length, "num_workers": args.preprocessing_num_workers}
        timed("encode", lambda: encode_parallel(train, tokenizer, tokens, **options))
        encoded = timed("encode again", lambda: encode_parallel(train, tokenizer, tokens, **options))
        timed("sampler, first batch", lambda: next(iter(sampler_of(encoded))))
        for row in rows:
            row["CPU seconds per million"] = row["CPU seconds"] / len(encoded) * 1e6
            row["EC30, CPU minutes"] = row["CPU seconds per million"] * EC30 / 1e6 / 60
        new_model(tokenizer, 1, 16, 16, 2, 0.0, data.max_length).save_pretrained(f"{directory}/model")
        tokenizer.save_pretrained(f"{directory}/model")
        # little validation data, because only the start of training is timed
        Dataset.from_dict({code: ["a b", "c d"] for code in languages}).to_parquet(f"{directory}/validation.parquet")
        command = training_command(data, tokens, directory)
        timed("training run of one step", lambda: subprocess.run(command, check=True))
    print(table(rows))
    print(f"The sampler's arrays for {EC30:,} pairs in {EC30_DIRECTIONS} directions: {memory / 1e9:.2f} GB resident")
    results = {"sentence_pairs": len(encoded), "times": rows, "sampler_bytes": memory, "load": os.getloadavg()}
    print(f"wrote {write_results(args.output_dir, {**results, 'arguments': [vars(args), vars(data)]})}")


def sampler_of(encoded: Dataset) -> DirectionBatchSampler:
    columns = (numpy_column(encoded, name) for name in ("language_pair", "length"))
    return DirectionBatchSampler(*columns, batch_size=32, num_batches=100_000, temperature=5.0)


def training_command(data: DataArguments, tokens: dict[str, str], directory: str) -> list[str]:
    """Return the command of a whole training run of one step, whose text was encoded before."""
    return [
        *(sys.executable, str(Path(__file__).parent / "specialize.py"), "--masks", "none", "--max_steps", "1"),
        *("--model_name_or_path", f"{directory}/model", "--train_file", str(data.train_file)),
        *("--validation_file", f"{directory}/validation.parquet", "--test_file", str(data.test_file)),
        *("--language_pairs", *data.language_pairs, "--output_dir", f"{directory}/run"),
        *("--language_tokens", *(f"{code}={token}" for code, token in tokens.items())),
        *("--max_length", str(data.max_length), "--eval_steps", "1", "--report_to", "none"),
    ]


def sampler_memory() -> int:
    """Return the bytes that a sampler of EC30's size keeps resident while it draws from every direction."""
    before = resident()
    directions = np.repeat(np.arange(EC30_DIRECTIONS, dtype=np.int32), EC30 // EC30_DIRECTIONS)
    lengths = np.full(len(directions), 60, np.int32)
    sampler = DirectionBatchSampler(directions, lengths, batch_size=32, num_batches=1000, temperature=5.0)
    batches = iter(sampler)
    drawn = {directions[batch[0]] for batch in islice(batches, 999)}  # after the last one, all of it is freed
    assert len(drawn) == EC30_DIRECTIONS
    return resident() - before


def resident() -> int:
    """Return the anonymous memory of this process; memory-mapped files are not in it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    run(main)
