"""Training: the loss scale, rows that must not move, checkpoints, resuming."""

import copy
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM, PeftModel, get_peft_model
from transformers import TrainerCallback

import neuron_specialization as ns
from neuron_specialization.translation.batching import TranslationCollator, evaluation_batches
from neuron_specialization.translation.checkpoints import load_adapted, load_checkpoint
from neuron_specialization.translation.encoding import encode_parallel
from neuron_specialization.translation.identification import record_corpus
from neuron_specialization.translation.runs import last_complete_checkpoint
from neuron_specialization.translation.token_loss import token_losses
from neuron_specialization.translation.tokenization import resolve_tokens
from neuron_specialization.translation.trainer import SpecializationTrainer, SpecializationTrainingArguments
from neuron_specialization.translation.training import fit

from .conftest import PAIRS, make_batch, make_m2m100, make_masks


def arguments(directory, **changes) -> SpecializationTrainingArguments:
    options = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_steps": 100,
        "use_cpu": True,
        **changes,
    }
    return SpecializationTrainingArguments(output_dir=str(directory), **options)


def toy_masks(model, tokenizer, data, k=0.3) -> ns.NeuronMasks:
    counts = record_corpus(model, tokenizer, data["validation"])
    return ns.CumulativeThreshold(k).select(counts)


def adapted_toy(model, tokenizer, data, mode):
    masks = toy_masks(model, tokenizer, data)
    config = ns.NeuronSpecializationConfig(masks=masks, trainable=mode, task_type="SEQ_2_SEQ_LM")
    return get_peft_model(model, config)


def with_dropout(model):
    """Layers keep the probability that they were made with, whatever the config says later."""
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.1
    return model


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulation_does_not_change_the_update(toy_data, toy_tokenizer, toy_model, tmp_path, smoothing):
    """Sixteen sentences of different length at once, or in four batches of four."""
    data = {"Pv-Aa": toy_data["train"]["Pv-Aa"].select(range(16))}
    trained = []
    for batch_size, steps in ((16, 1), (4, 4)):
        model = copy.deepcopy(toy_model).double()
        args = arguments(
            tmp_path / str(steps),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            label_smoothing_factor=smoothing,
            optim="sgd",
            max_grad_norm=0,
        )
        fit(model, toy_tokenizer, data, None, args)
        trained.append(weights(model))
    moved = 0.0
    for name, weight in weights(toy_model.double()).items():
        torch.testing.assert_close(trained[0][name], trained[1][name], rtol=1e-6, atol=1e-8, msg=name)
        moved = max(moved, (trained[0][name] - weight).abs().max().item())
    assert moved > 1e-4


def test_the_training_loss_is_that_of_the_tokens(toy_data, toy_tokenizer, toy_model, tmp_path):
    data = {"Pv-Aa": toy_data["train"]["Pv-Aa"].select(range(16))}
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    args = arguments(tmp_path, **options, label_smoothing_factor=0.0, learning_rate=0.0)
    logged = fit(toy_model, toy_tokenizer, data, None, args)["log"][0]["loss"]
    tokens = resolve_tokens(toy_tokenizer, data)
    nll, count = 0.0, 0
    for example in encode_parallel(data, toy_tokenizer, tokens):
        labels = torch.tensor([example["labels"]])
        with torch.no_grad():
            loss = toy_model(input_ids=torch.tensor([example["input_ids"]]), labels=labels).loss.item()
        nll, count = nll + loss * labels.numel(), count + labels.numel()
    assert logged == pytest.approx(nll / count, rel=1e-4)


def test_every_batch_holds_one_direction_and_its_pair_ids(toy, toy_data, toy_tokenizer, toy_model, tmp_path):
    adapted = adapted_toy(toy_model, toy_tokenizer, toy_data, "delta")
    tokens = resolve_tokens(toy_tokenizer, toy.language_pairs)
    encoded = encode_parallel(toy_data["train"], toy_tokenizer, tokens)
    args = arguments(tmp_path, max_steps=12)
    trainer = SpecializationTrainer(adapted, args, toy_tokenizer, encoded, None, toy.language_pairs)
    seen = set()
    for batch in trainer.get_train_dataloader():
        (pair,) = {toy.language_pairs[i] for i in batch["language_pairs"].tolist()}
        source, target = pair.split("-")
        assert set(toy_tokenizer.convert_ids_to_tokens(batch["input_ids"][:, 0])) == {source}
        assert set(toy_tokenizer.convert_ids_to_tokens(batch["decoder_input_ids"][:, 1])) == {target}
        seen.add(pair)
    assert len(seen) > 1, "one run mixes directions"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_hold_unselected_rows_still_too(copied):
    model = make_m2m100()
    masks = make_masks(model, k=0.3)
    config = ns.NeuronSpecializationConfig(masks=masks, trainable="full", task_type="SEQ_2_SEQ_LM")
    adapted = copied(get_peft_model(model, config))
    before = weights(adapted)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05, weight_decay=0.1)
    adapted(**make_batch(), language_pairs=PAIRS).loss.backward()
    optimizer.step()
    for name, rows in masks.rows.items():
        key = f"base_model.model.{name}.base_layer.weight"
        assert weights(adapted)[key][~rows.any(0)].equal(before[key][~rows.any(0)]), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "trainer"])
def test_rows_that_no_pair_selects_never_move(optimizer, toy_data, toy_tokenizer, toy_model, tmp_path):
    """In spite of weight decay and of momentum from before the masks."""
    if optimizer == "trainer":
        adapted = adapted_toy(toy_model, toy_tokenizer, toy_data, "full")
        before = weights(adapted)
        fit(adapted, toy_tokenizer, toy_data["train"], None, arguments(tmp_path, weight_decay=0.1, max_steps=6))
        masks = adapted.peft_config["default"].masks
    else:
        model = make_m2m100()
        kinds = {"adamw": torch.optim.AdamW, "sgd": lambda p, **k: torch.optim.SGD(p, momentum=0.9, **k)}
        steps = kinds[optimizer](model.parameters(), lr=0.05, weight_decay=0.1)
        model(**make_batch()).loss.backward()
        steps.step()  # dense momentum in every row
        steps.zero_grad()
        masks = make_masks(model, k=0.3)
        adapted = get_peft_model(
            model, ns.NeuronSpecializationConfig(masks=masks, trainable="full", task_type="SEQ_2_SEQ_LM")
        )
        before = weights(adapted)
        for _ in range(4):
            adapted(**make_batch(), language_pairs=PAIRS).loss.backward()
            steps.step()
            steps.zero_grad()
    after = weights(adapted)
    for name, rows in masks.rows.items():
        key = f"base_model.model.{name}.base_layer.weight"
        unselected = ~rows.any(0)
        assert unselected.any() and not unselected.all()
        assert after[key][unselected].equal(before[key][unselected]), name
        assert (after[key][~unselected] != before[key][~unselected]).any(1).all(), name


def test_a_delta_stays_zero_where_no_pair_selects(toy_data, toy_tokenizer, toy_model, tmp_path):
    adapted = adapted_toy(toy_model, toy_tokenizer, toy_data, "delta")
    masks = adapted.peft_config["default"].masks
    base = {n: p for n, p in weights(adapted).items() if "neuron_specialization" not in n}
    fit(adapted, toy_tokenizer, toy_data["train"], None, arguments(tmp_path, weight_decay=0.1, max_steps=6))
    for name, rows in masks.rows.items():
        delta = adapted.base_model.model.get_submodule(name).neuron_specialization_delta["default"]
        assert not delta[~rows.any(0)].any() and delta[rows.any(0)].any()
    after = weights(adapted)
    assert all(after[name].equal(weight) for name, weight in base.items()), "the base stays intact"


@pytest.mark.parametrize("mode", ["delta", "low_rank", "full"])
def test_a_trainer_checkpoint_loses_nothing(toy_data, toy_tokenizer, toy_checkpoint, tmp_path, mode):
    model, tokenizer = load_checkpoint(str(toy_checkpoint))
    adapted = adapted_toy(model, tokenizer, toy_data, mode)
    fit(adapted, tokenizer, toy_data["train"], None, arguments(tmp_path / "run", save_steps=3))
    sentences = toy_data["test"]["Pv-Aa"]["source"][:]
    expected = ns.translate(adapted, tokenizer, sentences, "Pv-Aa", num_beams=2, max_new_tokens=8)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    base = load_checkpoint(str(toy_checkpoint))[0]
    untrained = ns.translate(base, tokenizer, sentences, "Pv-Aa", num_beams=2, max_new_tokens=8)
    for loaded in (PeftModel.from_pretrained(base, checkpoint), AutoPeftModelForSeq2SeqLM.from_pretrained(checkpoint)):
        assert ns.translate(loaded, tokenizer, sentences, "Pv-Aa", num_beams=2, max_new_tokens=8) == expected
    assert untrained != expected


class StopAfter(TrainerCallback):
    """Cut a run off as a crash would, after the checkpoint of a step was written."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["delta", "full"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    toy_data, toy_tokenizer, toy_checkpoint, tmp_path, mode, monkeypatch, capsys
):
    ends = []
    for interrupted in (False, True):
        model, tokenizer = load_checkpoint(str(toy_checkpoint))
        with_dropout(model)
        directory = tmp_path / f"run-{interrupted}"
        args = {"max_steps": 6, "save_steps": 2, "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2, "seed": 5}
        adapted = adapted_toy(model, tokenizer, toy_data, mode)
        if interrupted:
            with monkeypatch.context() as patch:
                original = SpecializationTrainer.__init__

                def stopping(self, *a, original=original, **k):
                    original(self, *a, **k)
                    self.add_callback(StopAfter(5))

                patch.setattr(SpecializationTrainer, "__init__", stopping)
                with pytest.raises(KeyboardInterrupt):
                    fit(adapted, tokenizer, toy_data["train"], None, arguments(directory, **args))
            (directory / "checkpoint-5").mkdir()  # a later one whose writing was cut off
            assert last_complete_checkpoint(str(directory)).endswith("checkpoint-4")
            adapted = adapted_toy(with_dropout(load_checkpoint(str(toy_checkpoint))[0]), tokenizer, toy_data, mode)
        capsys.readouterr()
        result = fit(adapted, tokenizer, toy_data["train"], None, arguments(directory, **args))
        assert result["updates"] == 6
        assert ("resuming from step 4\n" in capsys.readouterr().out) == interrupted
        ends.append(weights(adapted))
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=0, atol=0, msg=name)


def test_every_layer_trains_in_every_step(toy_data, toy_tokenizer, tmp_path):
    """Dropped layers would leave parameters without gradient, which DDP refuses."""
    model = make_m2m100(vocab_size=len(toy_tokenizer), encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    rows = {pair: rows.select(range(8)) for pair, rows in toy_data["train"].items()}
    fit(model, toy_tokenizer, rows, None, arguments(tmp_path, max_steps=1))
    stacks = model.get_encoder(), model.get_decoder()
    assert [stack.layerdrop for stack in stacks] == [0, 0] and model.config.encoder_layerdrop == 0


def test_the_best_model_by_validation_loss_is_kept(toy_data, toy_tokenizer, toy_model, tmp_path):
    """A learning rate that first helps and then destroys."""
    args = arguments(tmp_path, max_steps=30, eval_steps=3, learning_rate=0.5, warmup_steps=12, patience=2)
    args.lr_scheduler_type = "constant_with_warmup"
    result = fit(toy_model, toy_tokenizer, toy_data["train"], toy_data["validation"], args)
    losses = [entry["eval_loss"] for entry in result["log"] if "eval_loss" in entry]
    assert result["best_validation_loss"] == min(losses)
    assert losses[-1] > min(losses), "this run should get worse in the end, and be put back"
    assert result["updates"] < 30 and len(losses) - losses.index(min(losses)) - 1 == 2, "its patience ended it"
    tokens = resolve_tokens(toy_tokenizer, toy_data["validation"])
    encoded = encode_parallel(toy_data["validation"], toy_tokenizer, tokens)
    tags = toy_tokenizer.convert_tokens_to_ids(list(tokens.values()))
    options = toy_tokenizer, encoded, encoded, list(toy_data["validation"])
    trainer = SpecializationTrainer(toy_model, arguments(tmp_path / "again"), *options, target_tags=tags)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_the_validation_loss_leaves_out_the_languages_tag_as_the_losses_of_a_comparison_do(
    toy_data, toy_tokenizer, toy_model, tmp_path
):
    pair = "Pv-Aa"
    corpus = {pair: toy_data["validation"][pair].select(range(16))}
    args = arguments(tmp_path, max_steps=1, per_device_eval_batch_size=16, learning_rate=1e-9)
    found = fit(toy_model, toy_tokenizer, corpus, corpus, args)["base_validation_loss"]
    assert found == pytest.approx(token_losses(toy_model, toy_tokenizer, corpus)[pair], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_validation_loss_does_not_depend_on_the_batches(toy_data, toy_tokenizer, toy_model, tmp_path, batch_size):
    pairs = ["Pv-Aa", "Aa-Pv"]
    corpus = {pair: toy_data["validation"][pair].select(range(10)) for pair in pairs}
    encoded = encode_parallel(corpus, toy_tokenizer, resolve_tokens(toy_tokenizer, corpus))
    args = arguments(tmp_path, per_device_eval_batch_size=batch_size)
    trainer = SpecializationTrainer(toy_model, args, toy_tokenizer, encoded, encoded, pairs)
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for example in encoded:
            batch = trainer.data_collator([example])
            logits = toy_model.eval()(**batch).logits[0]
            nats += torch.nn.functional.cross_entropy(logits, batch["labels"][0], reduction="sum").item()
            tokens += len(example["labels"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert trainer.validation_loss() == pytest.approx(nats / tokens, rel=1e-5)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_evaluation_sees_every_sentence_once_in_batches_of_one_direction(processes):
    directions = np.repeat([0, 1, 2], [7, 1, 10])
    lengths = np.random.default_rng(0).integers(1, 30, len(directions))
    batches = evaluation_batches(directions, lengths, 4, processes)
    assert sorted(sum(batches, [])) == list(range(len(directions))) and max(map(len, batches)) <= 4
    assert all(len(set(directions[batch])) == 1 for batch in batches)
    assert len(batches) % processes == 0, "or some process would repeat a batch"
    if processes == 1:
        assert [list(lengths[batch]) for batch in batches] == [sorted(lengths[batch]) for batch in batches]


def test_ends_of_sentences_are_attended_to_where_padding_is_the_same_token(toy_tokenizer, toy_model):
    toy_tokenizer = copy.deepcopy(toy_tokenizer)
    toy_tokenizer.pad_token = toy_tokenizer.eos_token
    end = toy_tokenizer.eos_token_id
    examples = [{"input_ids": ids, "labels": [5, end]} for ids in ([5, 6, end], [5, 6, 7, 8, end])]
    batch = TranslationCollator(toy_tokenizer, toy_model)(examples)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_several_gpus_in_one_process_are_refused(toy_data, toy_tokenizer, toy_model, tmp_path):
    """transformers would copy the model to each of them, masks and their routes not included."""
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="One process sees 2 GPUs: start one for each with `accelerate launch`"):
        fit(toy_model, toy_tokenizer, toy_data["train"], None, args)


def test_bad_settings_are_refused_before_training(toy_data, toy_tokenizer, toy_model, tmp_path):
    with pytest.raises(ValueError, match="Set max_steps"):
        fit(toy_model, toy_tokenizer, toy_data["train"], None, arguments(tmp_path, max_steps=-1))
    one = {"Pv-Aa": toy_data["validation"]["Pv-Aa"]}
    with pytest.raises(ValueError, match="expected the same"):
        fit(toy_model, toy_tokenizer, toy_data["train"], one, arguments(tmp_path))
    masks = toy_masks(toy_model, toy_tokenizer, {"validation": one})
    adapted = get_peft_model(toy_model, ns.NeuronSpecializationConfig(masks=masks, task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(ValueError, match="no language pair 'Pv-Ba' in the adapter.*Known pairs: Pv-Aa"):
        fit(adapted, toy_tokenizer, toy_data["train"], None, arguments(tmp_path))


def test_directories_that_are_no_checkpoint_are_refused(tmp_path, toy_checkpoint):
    with pytest.raises(ValueError, match="not a checkpoint directory: it has no config.json"):
        load_checkpoint(str(tmp_path))
    make_masks(make_m2m100()).save_pretrained(tmp_path / "masks")
    with pytest.raises(ValueError, match="it is an adapter directory: pass it as --adapter"):
        load_checkpoint(str(tmp_path / "masks"))
    with pytest.raises(ValueError, match="Cannot load 'no/such/model'"):
        load_checkpoint("no/such/model")
    shutil.copytree(toy_checkpoint, tmp_path / "damaged")
    os.truncate(tmp_path / "damaged" / "model.safetensors", 500)
    with pytest.raises(ValueError, match="Cannot load .*damaged' .*deserializing header"):
        load_checkpoint(str(tmp_path / "damaged"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "NEURON_SPEC', "adapter_config.json is damaged: it is no JSON"),
        ("[1]", "adapter_config.json is damaged: expected a JSON object with a peft_type"),
        ("{}", "adapter_config.json is damaged: expected a JSON object with a peft_type"),
    ],
)
def test_adapters_with_a_damaged_config_are_refused(tmp_path, toy_checkpoint, text, message):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"Cannot load the adapter .*{message}"):
        load_adapted(str(toy_checkpoint), str(tmp_path))


def test_recipes_train_half_precision_checkpoints_in_float32(tmp_path, toy_checkpoint, toy_files, run_here):
    model, tokenizer = load_checkpoint(str(toy_checkpoint))
    for place in (model.to(torch.float16), tokenizer):
        place.save_pretrained(tmp_path / "half")
    assert load_checkpoint(str(tmp_path / "half"))[0].dtype == torch.float16
    files = ["--train_file", str(toy_files / "train.jsonl"), "--validation_file", str(toy_files / "validation.jsonl")]
    run_here(
        "specialize.py",
        *("--model_name_or_path", str(tmp_path / "half"), "--masks", "none", *files, "--language_pairs", "Pv-Aa"),
        *("--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--use_cpu", "true"),
    )
    assert load_checkpoint(str(tmp_path / "run" / "model"))[0].dtype == torch.float32


def test_an_adapter_and_its_base_stay_in_two_directories(tmp_path):
    """From one directory, transformers loads the adapter whenever it loads the model."""
    model = make_m2m100()
    model.save_pretrained(tmp_path)
    masks = make_masks(model)
    adapted = get_peft_model(model, ns.NeuronSpecializationConfig(masks=masks, task_type="SEQ_2_SEQ_LM"))
    for save in (masks.save_pretrained, lambda directory: ns.save_adapter(adapted, directory)):
        with pytest.raises(ValueError, match="holds a model"):
            save(tmp_path)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model and an adapter"):
        load_checkpoint(str(tmp_path))
