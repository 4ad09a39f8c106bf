"""Loss without logits: time and peak memory of a training step at the vocabulary of a multilingual model."""

from contextlib import nullcontext

from neuron_specialization.analysis.memory import step_peak
from neuron_specialization.analysis.shapes import ModelShape, random_batch
from neuron_specialization.analysis.timing import TrainingStep, compare
from neuron_specialization.translation.batching import label_shift
from neuron_specialization.translation.checkpoints import new_m2m100
from neuron_specialization.translation.loss import find_linear_head, logits_cross_entropy
from neuron_specialization.translation.processes import this_process

from .models import adapted

SMOOTHING = 0.1


class LossStep(TrainingStep):
    """One update by the smoothed loss, from logits or by the head without them."""

    def __init__(self, model, batch: dict, from_logits: bool) -> None:
        super().__init__(model, batch)
        self.head = None if from_logits else find_linear_head(model, batch)

    def __call__(self) -> None:
        labels = self.batch["labels"]
        inputs = {name: value for name, value in self.batch.items() if name != "labels"}
        with nullcontext() if self.head is None else self.head.computes_loss(labels, SMOOTHING):
            output = self.model.train()(**inputs)["logits"]
        from_logits = self.head is None
        loss = logits_cross_entropy(output.flatten(0, 1), labels.flatten(), SMOOTHING) if from_logits else output.sum()
        del output
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def loss_steps(shape: ModelShape, trainable: str, tokens: int, length: int, kept: float) -> dict[str, LossStep]:
    """Return steps of one model, without logits and from logits, that share optimizer states."""
    model = adapted(new_m2m100(**vars(shape)).to(this_process().device), trainable, kept)
    batch = random_batch(model, max(1, tokens // length), length)
    batch["decoder_input_ids"] = label_shift(model.get_base_model())(batch["labels"])
    steps = {name: LossStep(model, batch, name == "from logits") for name in ("without logits", "from logits")}
    steps["from logits"].optimizer = steps["without logits"].optimizer
    return steps


def loss_times(shape: ModelShape, tokens: int, length: int, kept: float, repeats: int) -> list[dict]:
    """Compare steps without logits with steps from logits: of `delta` (the head is frozen) and of `full`."""
    rows = []
    for trainable in ("delta", "full"):
        what = f"loss without logits, {trainable}, {tokens} tokens, {shape.vocab_size} entries"
        steps = loss_steps(shape, trainable, tokens, length, kept)
        rows += compare(what, steps, {"from logits": "<= 1.10"}, repeats)
    return rows


def loss_peaks(shape: ModelShape, tokens: int, length: int, kept: float) -> list[dict]:
    """Compare the peaks of memory of the same steps."""
    rows = []
    for trainable in ("delta", "full"):
        steps = loss_steps(shape, trainable, tokens, length, kept)
        steps["without logits"]()  # the optimizer makes its states
        ours, theirs = (step_peak(step) for step in steps.values())
        what = f"{trainable} without logits, {tokens} tokens, {shape.vocab_size} entries"
        row = {"peak of a step": what, "compared with": "from logits", "ratio": ours / theirs, "target": "<= 0.50"}
        rows.append({**row, "MB": ours / 1e6})
    return rows
