"""Cross-lingual transfer: tasks and their faults, heads on encoder states, controls, statistics."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from neuron_specialization.analysis import seeds
from neuron_specialization.translation import transfer as transfer_module
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.encoder_heads import EncoderHead, HeadTraining, train_and_predict
from neuron_specialization.translation.encoders import cache_states, collate, encode_examples, language_tag
from neuron_specialization.translation.transfer import (
    Checkpoint,
    Predictions,
    bag_of_subwords,
    named_checkpoints,
    transfer,
)
from neuron_specialization.translation.transfer_statistics import (
    ItemCounts,
    _macro_f1,
    by_condition,
    compare,
    condition_values,
    language_values,
    score_rows,
    summarize,
    uninformative,
)
from neuron_specialization.translation.understanding import Examples, Task, load_tasks

ROOT = Path(__file__).parent.parent
QUICK = HeadTraining(epochs=2, learning_rate=1e-2, batch_size=8)
LANGUAGES = ["Pv", "Aa", "Ba"]
SPLITS = ("train", "test")


def topic_rows(toy, count: int, split: str) -> dict[str, list[dict]]:
    """A task that a bag of subwords solves in every language: the topic is a word that is the same in all."""
    sentences, draw = toy.sentences(count, split), random.Random(split)
    topics = [draw.choice(["ba", "ku"]) for _ in range(count)]
    return {
        code: [
            {"id": f"{split} {i}", "split": split, "text": f"{topic} {text}", "topic": topic}
            for i, (text, topic) in enumerate(zip(sentences[code], topics, strict=True))
        ]
        for code in LANGUAGES
    }


@pytest.fixture(scope="module")
def files(toy, tmp_path_factory):
    """Topics and tags, a file per language: each word's tag is its last letter."""
    directory = tmp_path_factory.mktemp("tasks")
    splits = [topic_rows(toy, 40, "train"), topic_rows(toy, 12, "test")]
    for code in LANGUAGES:
        rows = [row for split in splits for row in split[code]]
        Dataset.from_list(rows).to_json(directory / f"topics.{code}.jsonl")
        tagged = [{**row, "words": row["text"].split()} for row in rows]
        tagged = [{**row, "tags": [str(len(word) % 2) for word in row["words"]]} for row in tagged]
        Dataset.from_list(tagged).to_parquet(directory / f"tags.{code}.parquet")
    return directory


TOPICS = {
    "kind": "classification",
    "train": "topics.{language}.jsonl",
    "test": "topics.{language}.jsonl",
    "text": "text",
    "label": "topic",
    "id": "id",
    "languages": LANGUAGES,
}
TAGS = {**TOPICS, "kind": "tagging", "text": "words", "label": "tags"}
TAGS |= {"train": "tags.Pv.parquet", "test": "tags.{language}.parquet"}


@pytest.fixture(scope="module")
def tasks(files):
    return load_tasks({"topics": TOPICS, "tags": TAGS}, "Pv", directory=str(files))


@pytest.fixture(scope="module")
def loaded(toy_checkpoint):
    model, tokenizer = load_checkpoint(str(toy_checkpoint))
    return model.get_encoder().eval(), tokenizer


def rows_of(task: Task, tokenizer, code: str, max_length: int = 64) -> list[dict]:
    return encode_examples(tokenizer, task.test[code], task.kind == "tagging", code, max_length)


def test_tasks_are_loaded_with_the_source_language_first(tasks):
    topics, tags = tasks
    assert list(topics.test) == LANGUAGES and topics.labels == ["ba", "ku"]
    assert len(topics.train.items) == 40 and topics.test["Aa"].items == topics.test["Pv"].items
    assert topics.test["Aa"].texts != topics.test["Pv"].texts and topics.test["Aa"].labels == topics.test["Pv"].labels
    assert all(len(w) == len(t) for w, t in zip(tags.test["Ba"].texts, tags.test["Ba"].labels, strict=True))


def test_samples_are_the_same_items_in_every_language(files):
    (task,) = load_tasks({"t": TOPICS}, "Pv", directory=str(files), max_train_examples=9, max_test_items=5)
    assert len(task.train.items) == 9 and len(task.test["Pv"].items) == 5
    assert task.test["Pv"].items == task.test["Ba"].items
    with pytest.warns(UserWarning, match="none of the 1 examples drawn has the label"):
        (few,) = load_tasks({"t": TOPICS}, "Pv", directory=str(files), max_train_examples=1)
    assert few.labels == task.labels and len(few.labels) > 1, "a label that is drawn from, but not drawn"
    (only,) = load_tasks({"t": TOPICS}, "Pv", directory=str(files), languages=["Ba"])
    assert list(only.test) == ["Pv", "Ba"]


def test_sections_from_verse_ids_and_texts_missing_in_a_language(tmp_path):
    config = yaml.safe_load((ROOT / "recipes/configs/transfer_cross_lingually/small.yaml").read_text())
    described = {**config["tasks"]["bible_sections"], "train": "b.jsonl", "test": "b.jsonl", "languages": ["en", "sa"]}
    verses = ["GEN 1:1", "1SA 2:3", "PSA 23:1", "ISA 1:1", "JHN 3:16", "JUD 1:1", "REV 1:1"]
    rows = [
        {"id": verse, "split": split, "en": verse.lower(), "sa": None if i < 4 else "x"}
        for split in ("train", "test")
        for i, verse in enumerate(verses)
    ]
    Dataset.from_list(rows).to_json(tmp_path / "b.jsonl")
    (task,) = load_tasks({"sections": described}, "en", directory=str(tmp_path))
    sections = [task.labels[label] for (label,) in task.test["en"].labels]
    assert sections == ["Law", "History", "Poetry", "Prophets", "Gospels", "Letters", "Prophets"]
    assert task.test["sa"].items == verses[4:]


def test_pairs_of_sentences_have_two_columns_and_rows_that_correspond(tmp_path, toy_tokenizer):
    rows = [{"premise": "ba bu", "hypothesis": "ku", "label": i % 2, "split": s} for s in SPLITS for i in range(4)]
    for code in ("Pv", "Aa"):
        Dataset.from_list(rows).to_json(tmp_path / f"{code}.jsonl")
    described = {**TOPICS, "train": "{language}.jsonl", "test": "{language}.jsonl", "label": "label", "id": None}
    described |= {"text": ["premise", "hypothesis"], "languages": ["Pv", "Aa"]}
    (task,) = load_tasks({"nli": described}, "Pv", directory=str(tmp_path))
    assert task.labels == ["0", "1"] and task.test["Aa"].items[2] == "row 2"
    ids = encode_examples(toy_tokenizer, task.train, False, "Pv")[0]["input_ids"]
    tokens = toy_tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == "Pv" and tokens.count("</s>") == 2 and tokens[-1] == "</s>"


def test_xnli_and_paws_x_are_read_in_the_form_they_have_on_the_hub(tmp_path):
    config = yaml.safe_load((ROOT / "recipes/configs/transfer_cross_lingually/pairs.yaml").read_text())
    features = Features({"label": ClassLabel(names=["no", "yes"]), **dict.fromkeys(("a", "b"), Value("string"))})
    for name, described in config["tasks"].items():
        directory, card = tmp_path / name, "---\nconfigs:\n"
        for code in ("en", "de"):
            for split in SPLITS:
                rows = Dataset.from_list([{"label": i % 2, "a": "ba bu", "b": "ku"} for i in range(4)], features)
                rows = rows.rename_columns(dict(zip("ab", described["text"], strict=True)))
                rows.to_parquet(directory / code / f"{split}.parquet")
            card += f"- config_name: {code}\n  data_files: [{{split: train, path: {code}/train.parquet}}, "
            card += f"{{split: test, path: {code}/test.parquet}}]\n"
        (directory / "README.md").write_text(card + "---\n")
        described |= {"train": str(directory), "test": str(directory)}
    for task in load_tasks(config["tasks"], languages=["de"]):
        assert task.test["de"].texts[0] == ["ba bu", "ku"] and task.labels == ["0", "1"] and len(task.test) == 2
    config["tasks"]["xnli"]["config"] = "nowhere"
    with pytest.raises(ValueError, match="Task xnli: cannot load .* name of a dataset on the Hub"):
        load_tasks(config["tasks"], languages=["de"])


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"label": "category"}, {}, r"has no column 'category'; it has id, split, text, topic"),
        ({"lable": "topic"}, {}, r"unknown 'lable'"),
        ({"kind": "regression"}, {}, r"expected `kind: classification`"),
        ({"kind": "tagging"}, {}, r"expected lists of words"),
        ({"languages": ["Aa", "Ba"]}, {}, r"no test data in the source language 'Pv'"),
        ({"test_split": "dev"}, {}, r"no rows of the split 'dev'"),
        ({"label_groups": {"x": "ba"}}, {}, r"'ku' belongs to no group"),
        ({"test": "new.jsonl"}, {"topic": "new"}, r"the label 'new' of the Pv test data does not occur in the train"),
        ({"test": "{language}.jsonl"}, {"id": "other"}, r"test data of Aa and Pv do not align: 'other'"),
        ({"test": "{language}.jsonl"}, {"topic": "other"}, r"Aa and Pv do not align: 'test 0' has the label 'other'"),
    ],
)
def test_faults_of_the_data_are_found_before_training(files, tmp_path, changes, rows, message):
    text = (files / "topics.Pv.jsonl").read_text()
    for code in LANGUAGES:
        (tmp_path / f"topics.{code}.jsonl").write_text(text)
        (tmp_path / f"{code}.jsonl").write_text(text)
    changed = [json.loads(line) for line in text.splitlines()]
    changed[40] |= rows
    for name in ("new", "Aa"):
        Dataset.from_list(changed).to_json(tmp_path / f"{name}.jsonl")
    with pytest.raises(ValueError, match=message):
        load_tasks({"topics": {**TOPICS, **changes}}, "Pv", directory=str(tmp_path))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"languages": ["Aa", "Bx"]}, "No task has the language 'Bx'; they have Aa, Ba, Pv"),
        ({"apart": ["Bx"]}, "No task has the language 'Bx'"),
        ({"languages": ["Pv"]}, "expected a language to test on besides 'Pv'.*got none"),
        ({"languages": ["Aa"], "apart": ["Aa"]}, "one that is not set apart; got Aa"),
    ],
)
def test_languages_that_cannot_be_compared_are_an_error(files, chosen, message):
    with pytest.raises(ValueError, match=message):
        load_tasks({"topics": TOPICS}, "Pv", directory=str(files), **chosen)


def test_training_data_is_not_tested_on(files, tmp_path):
    for code in LANGUAGES:
        rows = [json.loads(line) for line in (files / f"topics.{code}.jsonl").read_text().splitlines()]
        Dataset.from_list([{k: v for k, v in row.items() if k != "split"} for row in rows]).to_json(
            tmp_path / f"topics.{code}.jsonl"
        )
    with pytest.raises(ValueError, match="is both training and test data, and has no column 'split'"):
        load_tasks({"topics": TOPICS}, "Pv", directory=str(tmp_path))


def test_words_and_tags_that_differ_in_number_are_an_error(files, tmp_path):
    rows = [
        {"id": str(i), "split": s, "words": ["a", "b"], "tags": ["x"] * (2 - i)} for s in ("train",) for i in (0, 1)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "tags.Pv.parquet")
    with pytest.raises(ValueError, match="1 has 2 words but 1 tags"):
        load_tasks({"tags": TAGS}, "Pv", directory=str(tmp_path))


def test_padding_does_not_change_pooled_states(tasks, loaded):
    encoder, tokenizer = loaded
    for task in tasks:
        rows = rows_of(task, tokenizer, "Aa")
        assert len({len(row["input_ids"]) for row in rows}) > 1
        for pooling in ("mean", "sum"):
            together = cache_states(encoder, rows, pooling)
            alone = [cache_states(encoder, [row], pooling)[0] for row in rows]
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a["states"], b["states"], rtol=1e-5, atol=1e-6)


def test_pooled_states_are_means_and_sums_of_the_encoders_and_words_have_their_first_subwords(tasks, loaded):
    encoder, tokenizer = loaded
    topics, tags = (rows_of(task, tokenizer, "Aa")[0] for task in tasks)
    with torch.no_grad():
        states = encoder(torch.tensor([topics["input_ids"]])).last_hidden_state[0]
        word_states = encoder(torch.tensor([tags["input_ids"]])).last_hidden_state[0]
    torch.testing.assert_close(cache_states(encoder, [topics], "mean")[0]["states"][0], states.mean(0))
    torch.testing.assert_close(cache_states(encoder, [topics], "sum")[0]["states"][0], states.sum(0))
    torch.testing.assert_close(cache_states(encoder, [tags], "mean")[0]["states"], word_states[tags["positions"]])
    first = [tokenizer.convert_ids_to_tokens(tags["input_ids"][position]) for position in tags["positions"]]
    words = tasks[1].test["Aa"].texts[0]
    assert all(f"▁{word}".startswith(piece) for piece, word in zip(first, words, strict=True))


def test_words_beyond_the_longest_input_count_as_wrong(tasks, loaded):
    encoder, tokenizer = loaded
    task = tasks[1]
    rows = rows_of(task, tokenizer, "Pv", max_length=5)
    assert all(len(row["input_ids"]) <= 5 for row in rows) and any(-100 in row["labels"] for row in rows)
    train = encode_examples(tokenizer, task.train, True, "Pv", 5)
    predicted = train_and_predict(encoder, train, {"Pv": rows}, 2, QUICK, 0)["Pv"]
    beyond = np.concatenate([row["labels"] for row in rows]) == -100
    assert ((predicted == -1) == beyond).all()


@pytest.mark.parametrize("number", [0, 1])
def test_probing_cached_states_equals_computing_them_every_time(tasks, loaded, number):
    encoder, tokenizer = loaded  # it has no dropout
    task = tasks[number]
    rows = rows_of(task, tokenizer, "Pv")
    cached = cache_states(encoder, rows, "mean")
    heads = []
    for kind in ("cached", "on the fly"):
        set_seed(0)
        head = EncoderHead(encoder.config.hidden_size, 2, encoder.requires_grad_(False), dropout=0.0)
        optimizer = torch.optim.Adam(head.head.parameters(), 1e-2)
        for start in range(0, 12, 4):
            optimizer.zero_grad()
            head(**collate((cached if kind == "cached" else rows)[start : start + 4]))["loss"].backward()
            optimizer.step()
        heads.append(head.head)
    for a, b in zip(*(head.parameters() for head in heads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_fine_tuning_trains_a_copy_of_the_encoder(tasks, loaded):
    encoder, tokenizer = loaded
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    task = tasks[0]
    train = encode_examples(tokenizer, task.train, False, "Pv")
    tests = {"Pv": train}
    how = HeadTraining(epochs=12, learning_rate=5e-3, batch_size=8)
    labels = np.concatenate(task.train.labels)
    assert (train_and_predict(encoder, train, tests, 2, how, 0)["Pv"] == labels).mean() > 0.9
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())


def test_a_bag_of_subwords_solves_what_it_can_see(tasks, loaded):
    topics, tags = tasks
    for code, labels in bag_of_subwords(topics, loaded[1]).items():
        assert (labels == np.concatenate(topics.test[code].labels)).mean() > 0.9, code
    found = bag_of_subwords(tags, loaded[1])["Pv"]
    assert len(found) == sum(map(len, tags.test["Pv"].labels))


def test_languages_without_a_token_take_the_source_languages(toy_tokenizer):
    assert language_tag(toy_tokenizer, "Aa", "Pv", {}) == "Aa"
    assert language_tag(toy_tokenizer, "zz", "Pv", {}) == "Pv"
    assert language_tag(toy_tokenizer, "x", "Pv", {"x": "x_XX,Ba"}) == "Ba"
    for language, source in (("Aa", "Pv"), ("zz", "xx")):
        with pytest.raises(ValueError, match="Not a language token"):
            language_tag(toy_tokenizer, language, source, {"Aa": "aa_Latn"})


def test_a_finished_head_is_not_trained_again(tasks, toy_checkpoint, tmp_path, monkeypatch):
    models, training = {"one": str(toy_checkpoint)}, {"probing": QUICK}
    run = dict(seeds=1, max_length=64)
    first = transfer(models, tasks[:1], training, tmp_path, **run)
    trained = []

    def count(*args):
        trained.append(args[-1])
        return train_and_predict(*args)

    monkeypatch.setattr(transfer_module, "train_and_predict", count)
    again = transfer(models, tasks[:1], training, tmp_path, **run)
    assert trained == []
    assert score_rows(tasks, first) == score_rows(tasks, again)
    transfer(models, tasks[:1], training, tmp_path, seeds=2, max_length=64)
    assert trained == [1, 1], "the model's and the random encoder's second head"
    with pytest.raises(ValueError, match="made with other settings .max_length."):
        transfer(models, tasks[:1], training, tmp_path, seeds=1, max_length=32)


def test_models_that_cannot_be_compared_are_refused_before_training(tmp_path, tasks, toy_checkpoint):
    with pytest.raises(ValueError, match="Not a language token"):
        wrong = {"Ba": "ba_Latn"}
        transfer({"one": str(toy_checkpoint)}, tasks, {"probing": QUICK}, tmp_path / "out", language_tokens=wrong)
    GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=4, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a gpt2 checkpoint, which has no encoder"):
        transfer({"one": str(tmp_path)}, tasks, {"probing": QUICK}, tmp_path / "out")
    with pytest.raises(ValueError, match="'random' cannot name a model"):
        transfer({"random": str(tmp_path)}, tasks, {"probing": QUICK}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def a_task(items: int = 100, languages=("en", "de", "sa")) -> Task:
    examples = Examples([str(i) for i in range(items)], [["x"]] * items, [[i % 4] for i in range(items)])
    return Task("t", "classification", "en", list("abcd"), examples, dict.fromkeys(languages, examples))


def guesses(model: str, seed: int, mode: str = "probing", **right: float) -> Predictions:
    """Predictions with a given share of correct ones per language, drawn from the seed."""
    draw, truth = np.random.default_rng(seed), np.arange(100) % 4
    labels = {
        code: np.where(draw.permutation(100) < 100 * share, truth, (truth + 1) % 4) for code, share in right.items()
    }
    return Predictions(model, "t", mode, seed, {code: found.astype(np.int16) for code, found in labels.items()})


MAJORITY = guesses("majority", 0, "control", en=0.25, de=0.25, sa=0.25)


def test_summary_gives_gap_interval_and_apart_apart():
    found = [guesses("one", seed, en=0.9, de=0.7, sa=0.3) for seed in range(3)]
    task = a_task()
    (row, _) = summarize([task], [*found, MAJORITY], apart=["sa"])
    assert (row["source"], row["zero_shot"], row["gap"]) == pytest.approx((90, 70, 20))
    assert row["apart"] == pytest.approx(30)
    low, high = row["gap_interval"]
    assert low < 20 < high and 5 < high - low < 25
    rows = score_rows([task], found)
    assert len(rows) == 9 and rows[0] == {
        **{"model": "one", "task": "t", "mode": "probing", "language": "en", "seed": 0, "items": 100},
        **{"accuracy": pytest.approx(90), "f1": rows[0]["f1"]},
    }
    truth, guess = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2])  # F1 of 2/3, 1/2; no text is of the class 2
    assert _macro_f1(truth, guess) == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)


def test_intervals_draw_items_so_that_copies_of_a_head_do_not_narrow_them():
    one = guesses("one", 0, en=0.9, de=0.7)
    task = a_task(languages=("en", "de"))
    widths = []
    for heads in ([one], [one] * 20):
        low, high = summarize([task], heads)[0]["zero_shot_interval"]
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1]) and widths[0] == pytest.approx(2 * 1.96 * 4.58, rel=0.15)


def test_intervals_and_tests_draw_whole_texts_where_items_come_from_texts():
    task = a_task(languages=("en", "de"))
    names = [f"GEN {i // 25}:{i}" for i in range(100)]
    examples = replace(task.train, items=names)
    in_texts = replace(task, test=dict.fromkeys(task.test, examples), text_end=":")
    right = np.repeat([True, True, True, False], 25)  # all of the last text is wrong
    truth = np.arange(100) % 4
    labels = dict.fromkeys(task.test, np.where(right, truth, (truth + 1) % 4).astype(np.int16))
    all_right = dict.fromkeys(task.test, truth.astype(np.int16))
    one, perfect = (Predictions(name, "t", "probing", 0, of) for name, of in (("one", labels), ("two", all_right)))
    found = {}
    for name, each in (("items", task), ("texts", in_texts)):
        low, high = summarize([each], [one])[0]["zero_shot_interval"]
        (row,) = compare([each], [one, perfect], "one")
        found[name] = high - low, row["p"], row["difference"], row["interval"]
    assert found["texts"][0] > 2 * found["items"][0]
    assert found["items"][1] < 0.001 and found["texts"][1] == 1, "one text of four may be better by chance"
    assert found["items"][2] == found["texts"][2] == 25 and found["texts"][3][0] == 0


def test_a_language_that_lacks_items_is_compared_on_those_it_has():
    task = a_task(4, ("en", "sa"))
    half = Examples(task.train.items[2:], task.train.texts[2:], task.train.labels[2:])
    task = Task("t", "classification", "en", task.labels, task.train, {"en": task.train, "sa": half})
    labels = {
        "en": np.array([0, 1, 2, 0], np.int16),
        "sa": np.array([2, 3], np.int16),
    }  # en: right, right, right, wrong
    counts = ItemCounts.of(task, [Predictions("one", "t", "probing", 0, labels)])
    found = counts.statistics(np.ones((1, 4)), ["sa"])
    assert (found["source"][0], found["zero_shot"][0], found["gap"][0]) == (75, 100, -50)
    assert counts.text_scores(["sa"]).sum() == 100


def test_conditions_are_compared_with_each_other_and_the_untrained_encoder_does_not_soften_their_tests():
    task = a_task(languages=("en", "de"))
    checkpoints = [Checkpoint("source", 0, "source", "x")]
    checkpoints += [Checkpoint(name, i, f"{name}-{i}", "x") for name in ("mt", "denoise") for i in (0, 1)]
    shares = {"source": 0.6, "mt-0": 0.75, "mt-1": 0.77, "denoise-0": 0.7, "denoise-1": 0.72, "random": 0.2}
    found = [guesses(label, i, en=0.9, de=share) for i, (label, share) in enumerate(shares.items())]
    rows = compare([task], by_condition(found, checkpoints), "source")
    assert [(row["model"], row["compared_with"]) for row in rows] == [
        *(("mt", "source"), ("denoise", "source"), ("denoise", "mt"), ("random", "source")),
    ]
    differences = {row["model"]: row for row in rows if row["compared_with"] == "source"}
    assert differences["mt"]["difference"] == pytest.approx(16) and differences["mt"]["interval"][0] < 16
    assert differences["mt"]["p_adjusted"] > differences["mt"]["p"]
    without = compare([task], by_condition(found[:-1], checkpoints), "source")
    adjusted = {(row["model"], row["compared_with"]): row["p_adjusted"] for row in without}
    assert adjusted["mt", "source"] == differences["mt"]["p_adjusted"]


def test_models_are_compared_item_by_item():
    task = a_task(languages=("en", "de"))
    one = [guesses("one", seed, en=0.9, de=0.7) for seed in (0, 1)]
    better = [guesses("better", seed + 5, en=0.9, de=0.95) for seed in (0, 1)]
    same = [Predictions("same", "t", "probing", each.seed, each.labels) for each in one]
    rows = compare([task], [*one, *better, *same, MAJORITY], "one")
    rows = {row["model"]: row for row in rows if row["compared_with"] == "one"}
    assert set(rows) == {"better", "same"} and rows["same"]["languages"] == "zero_shot"
    assert rows["better"]["difference"] == pytest.approx(25) and rows["better"]["p_adjusted"] < 0.01
    assert rows["same"]["difference"] == 0 and rows["same"]["p"] == 1


@pytest.mark.parametrize(
    ("en", "de", "reason"),
    [(0.9, 0.7, None), (0.9, 0.29, "mean of the other"), (0.34, 0.7, "the source language is 9.0 points")],
)
def test_uninformative_tasks_are_named(en, de, reason):
    task = a_task(languages=("en", "de"))
    summary = summarize([task], [guesses("one", 0, en=en, de=de), MAJORITY])
    found = uninformative(summary, "one")
    assert ([] if reason is None else [True]) == [reason in each["reason"] for each in found]


def test_each_mode_trains_what_it_says(files, toy_checkpoint, tmp_path, monkeypatch):
    (task, *_) = load_tasks({"topics": TOPICS}, "Pv", directory=str(files))
    seen = set()

    def recorded(encoder, train, tests, labels, training, seed):
        seen.add(("states" in train[0], training.learning_rate))
        return train_and_predict(encoder, train, tests, labels, training, seed)

    monkeypatch.setattr(transfer_module, "train_and_predict", recorded)
    training = {"probing": HeadTraining(1, 1e-3), "fine_tuning": HeadTraining(1, 1e-5)}
    transfer({"one": str(toy_checkpoint)}, [task], training, tmp_path, seeds=1, max_length=64)
    assert seen == {(True, 1e-3), (False, 1e-5)}, "probing reads cached states, fine-tuning trains the encoder"


def test_the_recipe_prints_tables_and_writes_rows(files, toy_checkpoint, tmp_path, run_here):
    config = {"tasks": {"topics": TOPICS, "tags": TAGS}, "source_language": "Pv", "apart": ["Ba"], "seeds": 1}
    config |= {"probing_epochs": 1, "fine_tuning_epochs": 1, "data_dir": str(files), "max_length": 64}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    options = ["--config", tmp_path / "config.yaml", "--output_dir", tmp_path / "out", "--models"]
    options += [f"one={toy_checkpoint}", f"two={toy_checkpoint}"]
    printed = run_here("transfer_cross_lingually.py", *map(str, options))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    cells = {(row["model"], row["mode"]) for row in results["rows"]}
    assert cells == {(m, mode) for m in ("one", "two", "random") for mode in ("probing", "fine_tuning")} | {
        ("majority", "control"),
        ("bag_of_subwords", "control"),
    }
    assert {row["language"] for row in results["rows"]} == set(LANGUAGES) and results["environment"]["torch"]
    assert "tags, fine_tuning: accuracy" in printed and "apart" in printed
    (two, *_) = [row for row in results["comparisons"] if row["model"] == "two"]
    assert two["difference"] == 0 and two["p"] == 1, "the same checkpoint twice"
    assert (tmp_path / "out" / "transfer.svg").is_file()


def test_seeds_of_a_condition_are_summarized_and_tested(toy_checkpoint):
    checkpoints = named_checkpoints([f"source={toy_checkpoint}", *[f"cp={toy_checkpoint}"] * 3])
    assert [each.label for each in checkpoints] == ["source", "cp-0", "cp-1", "cp-2"]
    found = [guesses("source", 0, en=0.9, de=0.5, sa=0.3), MAJORITY]
    found += [guesses(f"cp-{i}", 0, en=0.9, de=share, sa=0.3) for i, share in enumerate((0.6, 0.61, 0.65))]
    values = condition_values(summarize([a_task()], found, apart=["sa"]), checkpoints)
    (row,) = [row for row in seeds.summarize(values) if row["measure"] == "zero_shot" and row["model"] == "cp"]
    assert row["mean"] == pytest.approx(62) and row["deviation"] == pytest.approx(2.6458, abs=1e-3)
    languages = seeds.summarize(language_values(score_rows([a_task()], found), checkpoints))
    (row,) = [row for row in languages if row["place"] == "de" and row["model"] == "cp"]
    assert (row["measure"], row["group"], row["seeds"]) == ("t", "probing", 3) and row["mean"] == pytest.approx(62)
    tests = {row["measure"]: row for row in seeds.compare(values, "source")}
    assert tests.keys() == {"zero_shot", "gap"}, "in the other measures the seeds do not differ"
    assert tests["zero_shot"]["difference"] == pytest.approx(12) and tests["zero_shot"]["p"] < 0.02
    with pytest.raises(ValueError, match="the first, the source, is one checkpoint"):
        named_checkpoints([f"cp={toy_checkpoint}"] * 2)
