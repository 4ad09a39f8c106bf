"""What an accelerator does differently: other types, other kernels, host synchronization, NCCL.

Each test runs on the CPU too, so that what `make test-gpu` runs is known to work but for the device.
"""

import copy
import warnings

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from peft import get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import neuron_specialization as ns
from neuron_specialization.analysis.memory import step_peak
from neuron_specialization.analysis.timing import TrainingStep
from neuron_specialization.export.compaction import save_compact
from neuron_specialization.translation.sharding import shard
from neuron_specialization.translation.trainer import SpecializationTrainingArguments
from neuron_specialization.translation.training import fit

from .conftest import PAIRS, make_batch, make_m2m100, make_masks, make_t5

EIGHT_PAIRS = [*PAIRS, "de-fr", "fr-de", "en-es", "es-en"]
HAS_CUDA = torch.cuda.is_available()
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device, and there is none")]
)


@pytest.fixture(params=["cpu", CUDA])
def device(request) -> str:
    return request.param


def adapted(device, make=make_m2m100, pairs=PAIRS, **config):
    model = make()
    settings = {"masks": make_masks(model, pairs), "init_weights": False, "task_type": "SEQ_2_SEQ_LM", **config}
    return get_peft_model(model, ns.NeuronSpecializationConfig(**settings)).eval().to(device)


def batch_on(device, **sizes) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in make_batch(**sizes).items()}


def sources(device, **sizes) -> dict[str, torch.Tensor]:
    batch = batch_on(device, **sizes)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("mode", ["delta", "low_rank", "full"])
def test_autocast_trains_in_float32_under_the_masks(device, mode, dtype):
    model = adapted(device, trainable=mode).train()
    exact = model(**batch_on(device), language_pairs=PAIRS).loss.item()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer, scaler = torch.optim.AdamW(trained, lr=1e-2), torch.amp.GradScaler(device, init_scale=256.0)
    losses = []
    for _ in range(3):
        with torch.autocast(device, dtype=dtype):
            loss = model(**batch_on(device), language_pairs=PAIRS).loss
        scaler.scale(loss).backward()
        assert {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(exact, rel=0.02) and losses[-1] < losses[0]
    assert {p.dtype for p in trained} == {torch.float32}
    assert any(not p.equal(old) for p, old in zip(trained, before, strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_trainer_trains_in_mixed_precision(device, precision, toy_data, toy_tokenizer, toy_model, tmp_path):
    if device == "cpu" and precision == "fp16":
        pytest.skip("transformers trains in fp16 on accelerators only")
    counts = ns.record_corpus(toy_model, toy_tokenizer, toy_data["validation"])
    config = ns.NeuronSpecializationConfig(masks=ns.CumulativeThreshold(0.5).select(counts), task_type="SEQ_2_SEQ_LM")
    arguments = SpecializationTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,
        **{precision: True},
    )
    model = get_peft_model(toy_model, config)
    fit(model, toy_tokenizer, toy_data["train"], None, arguments)
    deltas = {name: p for name, p in model.named_parameters() if "delta" in name}
    assert all(p.dtype == torch.float32 and p.isfinite().all() and p.any() for p in deltas.values())
    for name, packed in model.get_base_model().named_buffers():
        if name.endswith("_mask.default"):
            assert packed.device.type == device


@pytest.mark.parametrize("make", [make_m2m100, make_t5], ids=["plain", "gated"])
def test_compact_execution_computes_what_masked_does(device, make):
    masked = adapted(device, make, trainable="full", execution="masked").train()
    compact = adapted(device, make, trainable="full", execution="compact").train()
    compact.load_state_dict(masked.state_dict())
    batch = batch_on(device, pad=masked.config.pad_token_id)
    outputs = [model(**batch, language_pairs="en-fr") for model in (masked, compact)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    reference = dict(masked.named_parameters())
    for name, parameter in compact.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_peak_of_a_step_is_measured_on_the_models_device(device):
    steps = [TrainingStep(make_m2m100().to(device), batch_on(device, batch=size)) for size in (2, 32)]
    small, large = (step_peak(step) for step in steps)
    assert large > small, "memory of another device would not grow with the batch"


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_eight_pairs_are_compiled_once(device, training):
    if device == "cpu" and not training:
        pytest.skip("on the CPU, tests/test_routing.py compiles for inference")
    model = adapted(device, lambda: make_m2m100(layers=1), EIGHT_PAIRS, trainable="delta").train(training)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if device == "cuda" else "eager")
    compiled = torch.compile(model, backend=counter)
    compilations = []
    with torch.set_grad_enabled(training):
        for pair in range(8):
            batch = batch_on(device, batch=8, seed=pair)
            for ids in (torch.tensor([pair]), torch.arange(8).roll(pair)):
                expected = model(**batch, language_pairs=ids)
                found = compiled(**batch, language_pairs=ids)
                torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-4)
                if training:
                    found.loss.backward()
            compilations.append(counter.frame_count)
    torch._dynamo.reset()
    assert compilations[0] > 0 and compilations[-1] == compilations[0], compilations


def test_mixed_batches_with_beams_equal_runs_of_one_pair(device):
    model = adapted(device, trainable="delta")
    inputs, options = sources(device), {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
    mixed = model.generate(**inputs, **options, language_pairs=PAIRS)
    for sample, pair in enumerate(PAIRS):
        alone = {name: tensor[sample : sample + 1] for name, tensor in inputs.items()}
        found = model.generate(**alone, **options, language_pairs=pair)
        rows = mixed[2 * sample : 2 * sample + 2, : found.shape[1]]
        assert rows.equal(found), pair
    assert mixed.device.type == device


@pytest.mark.parametrize("make", [make_m2m100, make_t5], ids=["plain", "gated"])
def test_counts_are_those_of_the_cpu(device, make):
    """In float64: in float32, rounding may move an activation that is next to zero across it."""
    model = make().double()
    pad = model.config.pad_token_id
    batches = {pair: [make_batch(seed=seed, pad=pad)] for seed, pair in enumerate(PAIRS)}
    expected = ns.record_activations(model, batches, progress=False)
    on_device = {pair: [{k: v.to(device) for k, v in batch.items()} for batch in b] for pair, b in batches.items()}
    found = ns.record_activations(copy.deepcopy(model).to(device), on_device, progress=False)
    for name, count in expected.counts.items():
        assert found.counts[name].cpu().equal(count), name


@pytest.fixture
def process_group(device):
    """A group of this one process: NCCL on a GPU, gloo on the CPU."""
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["delta", "full"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_one_distributed_process_has_the_gradients_of_a_plain_one(device, wrapper, mode, process_group, monkeypatch):
    plain = adapted(device, trainable=mode).train()
    model = wrapped = copy.deepcopy(plain)
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model, device_ids=[0] if device == "cuda" else None)
    else:
        monkeypatch.setenv("FSDP_VERSION", "2")
        mesh = torch.distributed.device_mesh.init_device_mesh(device, (1,))
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
        with mesh:
            shard(model, plugin)
    for language_pairs in (PAIRS, "en-fr"):
        plain(**batch_on(device), language_pairs=language_pairs).loss.backward()
        wrapped(**batch_on(device), language_pairs=language_pairs).loss.backward()
    reference = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and reference[name].grad is not None:
            found = parameter.grad.full_tensor() if wrapper == "fsdp2" else parameter.grad
            torch.testing.assert_close(found, reference[name].grad, rtol=1e-4, atol=1e-5, msg=name)


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for values from the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2")
        return function(*args, **(kwargs or {}))


def synchronizations(device, run) -> int:
    """How often `run` makes the host wait: CUDA's own count, or on the CPU that of the operations that would."""
    if device == "cpu":
        with HostReads() as reads:
            run()
        return reads.count
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("pairs", [PAIRS, "en-fr"], ids=["mixed", "single"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_masks_are_looked_up_without_waiting_for_the_device(device, pairs, num_beams):
    """What the adapter adds to the synchronizations of a `generate` does not grow with the number of decoder steps."""
    model, base = adapted(device, trainable="delta"), make_m2m100().to(device)
    inputs, added = sources(device), []
    for steps in (4, 4, 12):  # the first to warm up
        options = {"min_new_tokens": steps, "max_new_tokens": steps, "num_beams": num_beams}
        ours = synchronizations(device, lambda: model.generate(**inputs, **options, language_pairs=pairs))  # noqa: B023
        reference = synchronizations(device, lambda: base.generate(**inputs, **options))  # noqa: B023
        added.append(ours - reference)
    assert added[1] == added[2], added


def quantized_by_bitsandbytes(model, device):
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install -e '.[gpu]'")
    for name, linear in [(n, m) for n, m in model.named_modules() if n.endswith((".fc1", ".fc2"))]:
        small = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
        small.load_state_dict(linear.state_dict())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, small)
    return model.to(device)


def quantized_by_torchao(model, device):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install -e '.[gpu]'")
    model = model.to(device)
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith((".fc1", ".fc2"))
    )
    return model


@pytest.mark.parametrize("quantized", [quantized_by_bitsandbytes, quantized_by_torchao])
def test_eight_bit_base_layers_train_under_the_masks(device, quantized):
    model = make_m2m100()
    masks = make_masks(model)
    plain = adapted(device, masks=masks, trainable="delta", init_weights=True)
    config = ns.NeuronSpecializationConfig(masks=masks, trainable="delta", task_type="SEQ_2_SEQ_LM")
    small = get_peft_model(quantized(model, device), config).eval().to(device)
    batch = batch_on(device)
    mixed = small(**batch, language_pairs=PAIRS)
    exact = plain(**batch, language_pairs=PAIRS).logits
    assert (mixed.logits.float() - exact).norm() < 0.1 * exact.norm(), "int8 rounds to within a few percent"
    for sample, pair in enumerate(PAIRS):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FFN blocks run masked")
            alone = small(**batch, language_pairs=pair).logits[sample]
        torch.testing.assert_close(alone, mixed.logits[sample], rtol=1e-2, atol=1e-2)
    mixed.loss.backward()
    for name, parameter in small.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_exports_on_the_device_compute_the_same(device, tmp_path):
    model, batch = adapted(device, trainable="delta"), batch_on(device)
    small = ns.compact(model, "en-fr")
    assert next(small.parameters()).device.type == device
    expected = model(**batch, language_pairs="en-fr").logits
    torch.testing.assert_close(small(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    options = {**sources(device), "num_beams": 3, "max_new_tokens": 8}
    assert small.generate(**options).equal(model.generate(**options, language_pairs="en-fr"))
    save_compact(small, tmp_path)
    loaded = type(small).from_pretrained(tmp_path).to(device)
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)
