"""Record mass as one of two processes, and start recipes that run as one, for tests/test_distributed.py."""

import runpy
import sys

from neuron_specialization.analysis.mass_recording import record_mass
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.data import load_parallel
from neuron_specialization.translation.processes import this_process
from neuron_specialization.translation.recording import corpus_batches


def main() -> None:
    recipes, checkpoint, data, output = sys.argv[1:]
    process = this_process()
    assert process.num_processes == 2
    for recipe in ("transfer_sequentially", "prune", "mass_activation"):
        needed = [] if recipe == "transfer_sequentially" else ["--transfer_dir", "none"]
        sys.argv = [recipe, "--output_dir", "none", *needed]
        try:
            runpy.run_path(f"{recipes}/{recipe}.py")["main"]()
        except ValueError as error:
            assert "runs as one process" in str(error), error
        else:
            raise AssertionError(f"{recipe} ran as two processes")
    model, tokenizer = load_checkpoint(checkpoint)
    text = {
        pair: rows.select(range(size))
        for (pair, rows), size in zip(load_parallel(data, ["Pv-Aa", "Pv-Ba"]).items(), (40, 6), strict=True)
    }
    batches = corpus_batches(model.double(), tokenizer, text, batch_size=8)
    assert process.is_main_process or not len(batches["Pv-Ba"]), "the second process has no share of a short text"
    mass = record_mass(model, batches, token_ids=range(100), progress=False).all_reduce()
    mass.save(f"{output}/{process.process_index}.safetensors")


if __name__ == "__main__":
    main()
