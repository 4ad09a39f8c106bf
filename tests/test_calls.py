"""The pair of a call is its own: recomputed, nested, interrupted, and in several threads."""

import copy
import inspect
import sys
import threading
import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import LogitsProcessor, LogitsProcessorList

import neuron_specialization as ns
from neuron_specialization.adapter import routing

from .conftest import PAIRS, checkpoint_activations, make_batch, make_m2m100, make_masks
from .test_adapter import adapt, gradients
from .test_routing import DE, START, TOKENS, adapted, tagged

GENERATE = {"max_new_tokens": 6, "num_beams": 2}


def routed(**config):
    """A model that knows no language tokens: its pair is passed or selected."""
    return adapted(language_token_ids=None, **config)


def inputs_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def in_thread(function):
    """Run a function in another thread; return its result, or raise its error here."""
    results, errors = [], []

    def run():
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


# --- gradient checkpointing ---------------------------------------------------------------------------------------


def two_calls(model):
    return [model(**make_batch(seed=i), language_pairs=pairs).loss for i, pairs in enumerate((PAIRS, PAIRS[::-1]))]


def evaluation_in_between(model):
    loss = model(**make_batch(), language_pairs=PAIRS).loss
    with torch.no_grad():
        model.eval()(**make_batch(seed=3), language_pairs="fr-en")
    model.train()
    return [loss]


def one_pair_per_batch(model):
    return [model(**make_batch(seed=i), language_pairs=pair).loss for i, pair in enumerate(("en-de", "fr-en"))]


def selected_for_a_while(model):
    with ns.language_pair(model, "en-de"):
        return [model(**make_batch()).loss]


def selected_anew(model):
    ns.set_language_pair(model, "en-de")
    loss = model(**make_batch()).loss
    ns.set_language_pair(model, "fr-en")
    return [loss]


def encoder_by_itself(model):
    states = [
        model.get_base_model().get_encoder()(**inputs_of(make_batch(seed=i)), language_pairs=pair).last_hidden_state
        for i, pair in enumerate(("en-de", "fr-en"))
    ]
    return [state.square().mean() for state in states]


STEPS = (two_calls, evaluation_in_between, one_pair_per_batch, selected_for_a_while, selected_anew, encoder_by_itself)


@pytest.mark.usefixtures("each_batch_size")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_recomputation_runs_under_the_call_that_made_it(step, use_reentrant):
    model = routed().train()
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            checkpoint_activations(model.get_base_model(), use_reentrant)
            model.enable_input_require_grads()
        torch.stack(step(model)).sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_recomputation_in_another_thread():
    """As autograd does it on GPUs."""
    model = routed().train()
    model(**make_batch(), language_pairs=PAIRS).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    checkpoint_activations(model.get_base_model(), False)
    loss = model(**make_batch(), language_pairs=PAIRS).loss
    in_thread(loss.backward)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_recomputation_that_carries_no_call_is_refused():
    """torch's own checkpointing of a part of the model: its call is over, and nothing says which it was."""
    model = routed().train()
    layer = model.get_base_model().model.encoder.layers[0]
    whole = layer.forward
    layer.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
        whole, *args, use_reentrant=False, **kwargs
    )
    loss = model(**make_batch(), language_pairs=PAIRS).loss
    ns.set_language_pair(model, "fr-en")
    with pytest.raises(RuntimeError, match="activation_checkpointing_enable"):
        loss.backward()


# --- parts of a model ---------------------------------------------------------------------------------------------


def test_an_encoder_by_itself_does_not_run_under_the_call_before():
    model, batch = routed(), make_batch()
    encoder = model.get_base_model().get_encoder()
    expected = {pair: model(**batch, language_pairs=pair).encoder_last_hidden_state for pair in PAIRS}
    with pytest.raises(ValueError, match="several language pairs and none was chosen"):
        encoder(**inputs_of(batch))
    with ns.language_pair(model, "en-fr"):
        assert encoder(**inputs_of(batch)).last_hidden_state.equal(expected["en-fr"])
    assert encoder(**inputs_of(batch), language_pairs="de-en").last_hidden_state.equal(expected["de-en"])


def test_stacks_by_themselves_read_the_tokens_they_see():
    """An encoder sees the source's language only: enough where the pairs that fit share the encoder row."""
    batch = tagged(["en-de", "de-en"], "nllb")
    model = adapted(["en-de", "de-en"])
    whole = model(**batch)
    base = model.get_base_model()
    encoded = base.get_encoder()(batch["input_ids"]).last_hidden_state
    assert encoded.equal(whole.encoder_last_hidden_state)
    decoded = base.get_decoder()(input_ids=batch["decoder_input_ids"], encoder_hidden_states=encoded.clone())
    assert base.lm_head(decoded.last_hidden_state).equal(whole.logits)
    with pytest.raises(ValueError, match="Sample 0 of the batch is from en.*rows differ: en-de, en-fr"):
        adapted().get_base_model().get_encoder()(batch["input_ids"])


def test_a_decoder_goes_on_from_the_encoder_that_ran_before():
    """Its own tokens say no more than the target, and there are two pairs into English."""
    model, batch = adapted(), tagged(["de-en", "fr-en"], "nllb")
    base, whole = model.get_base_model(), model(**batch)
    encoded = base.get_encoder()(batch["input_ids"], language_pairs=["de-en", "fr-en"])
    for decoded in (
        base.get_decoder()(input_ids=batch["decoder_input_ids"], encoder_hidden_states=encoded.last_hidden_state),
        base.get_decoder()(
            input_ids=batch["decoder_input_ids"], encoder_hidden_states=whole.encoder_last_hidden_state
        ),
    ):
        torch.testing.assert_close(base.lm_head(decoded.last_hidden_state), whole.logits)
    again = model(encoder_outputs=(whole.encoder_last_hidden_state,), decoder_input_ids=batch["decoder_input_ids"])
    torch.testing.assert_close(again.logits, whole.logits)


@pytest.mark.parametrize("default_pair", [None, "base"])
def test_cached_steps_of_an_own_decoding_loop(default_pair):
    """They see one token each, and no tag in it."""
    model = adapted(default_pair=default_pair)
    sources = tagged(["en-de", "en-fr"], "nllb")["input_ids"]
    starts = torch.tensor([[START, TOKENS["de"]], [START, TOKENS["fr"]]])
    tokens = starts
    out = model(input_ids=sources, decoder_input_ids=starts, use_cache=True)
    for _ in range(3):
        tokens = torch.cat([tokens, out.logits[:, -1].argmax(-1, keepdim=True)], 1)
        out = model(
            encoder_outputs=(out.encoder_last_hidden_state,),
            decoder_input_ids=tokens[:, -1:],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        whole = model(input_ids=sources, decoder_input_ids=tokens, language_pairs=["en-de", "en-fr"])
        torch.testing.assert_close(out.logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("default_pair", [None, "base"])
def test_cached_steps_of_unknown_origin_ask_for_the_pair(default_pair):
    model = adapted(default_pair=default_pair)
    batch = tagged(["en-de", "en-fr"], "nllb")
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], decoder_input_ids=batch["decoder_input_ids"][:, :2], use_cache=True)
    step = {
        "encoder_outputs": (out.encoder_last_hidden_state.clone(),),
        "decoder_input_ids": batch["decoder_input_ids"][:, 2:3],
        "past_key_values": copy.deepcopy(out.past_key_values),
    }
    with pytest.raises(ValueError, match="cached.*language_pairs"):
        model(**step)
    model(**step, language_pairs=["en-de", "en-fr"])


# --- calls inside calls -------------------------------------------------------------------------------------------


class During(LogitsProcessor):
    """Runs a function at every decoding step."""

    def __init__(self, function):
        self.function = function
        self.results = []

    def __call__(self, input_ids, scores):
        self.results.append(self.function())
        return scores


@pytest.mark.usefixtures("each_batch_size")
def test_calls_inside_generate_have_their_own_pair_and_give_the_outer_one_back():
    model, batch = routed(), make_batch()
    other = make_batch(seed=5)
    inner = {
        "forward": lambda: model(**other, language_pairs="fr-en").logits,
        "generate": lambda: model.generate(**inputs_of(other), language_pairs="fr-en", **GENERATE),
        "encoder": lambda: (
            model.get_base_model().get_encoder()(**inputs_of(other), language_pairs="fr-en").last_hidden_state
        ),
    }
    expected = model.generate(**inputs_of(batch), language_pairs="en-de", **GENERATE)
    for name, function in inner.items():
        alone = function()
        during = During(function)
        found = model.generate(
            **inputs_of(batch), language_pairs="en-de", **GENERATE, logits_processor=LogitsProcessorList([during])
        )
        assert found.equal(expected), name
        assert during.results and all(result.equal(alone) for result in during.results), name


@pytest.mark.parametrize("source", ["input_ids", "inputs_embeds", "encoder_outputs", "by position"])
def test_a_pair_chosen_inside_generate_holds_for_the_call_made_there(source):
    """However that call is given its source: it is none of generate's own."""
    model, batch, other = routed(), make_batch(), make_batch(seed=5)
    base = model.get_base_model()
    with torch.no_grad():
        encoded = base.get_encoder()(**inputs_of(other), language_pairs="fr-en").last_hidden_state.clone()
        embedded = base.get_input_embeddings()(other["input_ids"])
    given = {
        "input_ids": {"input_ids": other["input_ids"]},
        "inputs_embeds": {"inputs_embeds": embedded},
        "encoder_outputs": {"encoder_outputs": (encoded,)},
        "by position": {},
    }[source]
    position = (other["input_ids"],) if source == "by position" else ()
    rest = {"attention_mask": other["attention_mask"], "labels": other["labels"]}

    def inside():
        with ns.language_pair(model, "fr-en"), torch.no_grad():
            return base(*position, **given, **rest).logits

    alone, expected = inside(), model.generate(**inputs_of(batch), language_pairs="en-de", **GENERATE)
    during = During(inside)
    found = model.generate(
        **inputs_of(batch), language_pairs="en-de", **GENERATE, logits_processor=LogitsProcessorList([during])
    )
    assert found.equal(expected) and all(logits.equal(alone) for logits in during.results)


def test_a_forward_inside_generate_reads_its_own_tokens():
    model = adapted()
    batch, other = tagged(["en-de"], "nllb"), tagged(["fr-en", "de-en"], "nllb")
    alone = model(**other).logits
    during = During(lambda: model(**other).logits)
    options = {"forced_bos_token_id": DE, **GENERATE, "logits_processor": LogitsProcessorList([during])}
    model.generate(input_ids=batch["input_ids"], **options)
    assert all(logits.equal(alone) for logits in during.results)


def test_a_forward_inside_a_hook_gives_the_outer_call_its_pair_back():
    model, batch, other = routed(), make_batch(), make_batch(seed=5)
    expected, alone = model(**batch, language_pairs="en-de").logits, model(**other, language_pairs="fr-en").logits
    found = []

    def inside(module, args):
        handle.remove()
        found.append(model(**other, language_pairs="fr-en").logits)

    handle = model.get_base_model().get_decoder().register_forward_pre_hook(inside)
    assert model(**batch, language_pairs="en-de").logits.equal(expected)
    assert found[0].equal(alone)


def test_selecting_a_pair_does_not_change_a_call_under_way():
    model, batch = routed(), make_batch()
    expected = model.generate(**inputs_of(batch), language_pairs="en-de", **GENERATE)
    ns.set_language_pair(model, "en-de")
    during = During(lambda: ns.set_language_pair(model, "fr-en"))
    found = model.generate(**inputs_of(batch), **GENERATE, logits_processor=LogitsProcessorList([during]))
    assert found.equal(expected)
    during = During(lambda: in_thread(lambda: ns.set_language_pair(model, "fr-en")))
    ns.set_language_pair(model, "en-de")
    found = model.generate(**inputs_of(batch), **GENERATE, logits_processor=LogitsProcessorList([during]))
    assert found.equal(expected)


# --- threads ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_batch_size")
def test_a_second_thread_has_pairs_of_its_own():
    model, batch, other = routed(), make_batch(), make_batch(seed=5)
    expected = model.generate(**inputs_of(batch), language_pairs="en-de", **GENERATE)
    calls = {
        "forward": lambda: model(**other, language_pairs="fr-en").logits,
        "generate": lambda: model.generate(**inputs_of(other), language_pairs="fr-en", **GENERATE),
    }
    for name, function in calls.items():
        alone = function()
        during = During(lambda function=function: in_thread(function))
        found = model.generate(
            **inputs_of(batch), language_pairs="en-de", **GENERATE, logits_processor=LogitsProcessorList([during])
        )
        assert found.equal(expected) and all(result.equal(alone) for result in during.results), name
    during = During(lambda: in_thread(lambda: model(**other)))
    with pytest.raises(ValueError, match="none was chosen"):  # not under the pairs of the thread that is generating
        model.generate(
            **inputs_of(batch), language_pairs="en-de", **GENERATE, logits_processor=LogitsProcessorList([during])
        )


def test_with_blocks_of_two_threads_do_not_mix():
    model, batch = routed(), make_batch()
    expected = {pair: model(**batch, language_pairs=pair).logits for pair in PAIRS}
    inside, done = threading.Barrier(2, timeout=20), threading.Barrier(2, timeout=20)

    def run():
        with ns.language_pair(model, "fr-en"):
            inside.wait()
            found = model(**batch).logits
            done.wait()
        return found

    results = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    with ns.language_pair(model, "en-de"):
        inside.wait()
        assert model(**batch).logits.equal(expected["en-de"])
        done.wait()
        thread.join()
        assert results[0].equal(expected["fr-en"])
        assert in_thread(lambda: model(**batch).logits).equal(expected["en-de"]), "a worker started inside the block"
    with pytest.raises(ValueError, match="none was chosen"):
        model(**batch)


# --- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_interrupted_call_leaves_nothing_behind(call, error):
    model, batch = routed(), make_batch()

    def interrupt(module, args):
        handle.remove()
        raise error

    handle = model.get_base_model().get_decoder().register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        if call == "forward":
            model(**batch, language_pairs="en-de")
        else:
            model.generate(**inputs_of(batch), language_pairs="en-de")
    with pytest.raises(ValueError, match="none was chosen"):
        model.get_base_model().get_encoder()(**inputs_of(batch))
    expected = routed()(**batch, language_pairs="fr-en").logits
    assert model(**batch, language_pairs="fr-en").logits.equal(expected)
    assert in_thread(lambda: model(**batch, language_pairs="fr-en").logits).equal(expected)


def test_an_interruption_while_a_pair_is_chosen_leaves_none_chosen():
    """Ctrl-C may arrive before any line that opens the `with` block."""
    model, line, interrupted = routed(), 0, True

    def trace(frame, event, _):
        nonlocal passed
        if frame.f_code.co_filename != routing.__file__:
            return None
        passed += event == "line"
        if passed > line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    while interrupted:
        passed, interrupted = 0, False
        sys.settrace(trace)
        try:
            with ns.language_pair(model, "en-de"):
                sys.settrace(None)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(None)
        assert not routing._with_blocks, f"before line {line}"
        line += 1
    assert line > 5


def test_an_abandoned_generation_leaves_nothing_behind():
    """A `generate` of the model's own may yield as it goes; it runs under its pair, and nothing else does."""
    model, batch = make_m2m100(), make_batch()

    def stream(self, **inputs):
        for length in (2, 4):
            yield type(self).generate(self, **inputs, max_new_tokens=length)

    model.generate = types.MethodType(stream, model)
    model = adapt(model, make_masks(model), init_weights=False).eval()
    expected = list(routed().generate(**inputs_of(batch), language_pairs="en-de", max_new_tokens=4))
    steps = model.get_base_model().generate(**inputs_of(batch), language_pairs="en-de")
    next(steps)
    with pytest.raises(ValueError, match="none was chosen"):
        model(**batch)
    assert all(a.equal(b) for a, b in zip(next(steps), expected, strict=True))
    abandoned = model.get_base_model().generate(**inputs_of(batch), language_pairs="en-de")
    next(abandoned)
    del abandoned
    with pytest.raises(ValueError, match="none was chosen"):
        model(**batch)


def test_a_with_block_in_an_abandoned_generator_takes_back_its_own_choice_only():
    model = routed()
    batch = make_batch()

    def steps():
        with ns.language_pair(model, "en-de"):
            yield model(**batch).logits

    generator = steps()
    next(generator)
    ns.set_language_pair(model, "fr-en")
    generator.close()
    assert model(**batch).logits.equal(model(**batch, language_pairs="fr-en").logits)


# --- models -------------------------------------------------------------------------------------------------------


def test_two_models_that_share_an_encoder_do_not_share_a_pair():
    model, batch = routed(), make_batch()
    plain = make_m2m100()
    plain.model.encoder = model.get_base_model().model.encoder
    model(**batch, language_pairs="en-de")
    with pytest.raises(ValueError, match="none was chosen"):
        plain(**batch)
    with pytest.raises(ValueError, match="another model's"):
        adapt(plain, make_masks(make_m2m100()))
    model(**batch, language_pairs="en-de")


def test_an_instances_own_generate_is_used_and_put_back():
    model, batch = make_m2m100(), make_batch()
    seen = []

    def generate(self, *args, **kwargs):
        seen.append(kwargs)
        return type(self).generate(self, *args, **kwargs)

    own = model.generate = types.MethodType(generate, model)
    forward = model.forward
    adapted_model = adapt(model, make_masks(model), init_weights=False).eval()
    found = adapted_model.generate(**inputs_of(batch), language_pairs="en-de", max_new_tokens=3)
    assert len(seen) == 1 and "language_pairs" not in seen[0]
    assert found.equal(routed().generate(**inputs_of(batch), language_pairs="en-de", max_new_tokens=3))
    copied = copy.deepcopy(adapted_model)
    assert copied.generate(**inputs_of(batch), language_pairs="en-de", max_new_tokens=3).equal(found)
    unloaded = adapted_model.unload()
    assert unloaded.generate is own and unloaded.forward == forward
    assert not {"forward"} & {key for module in unloaded.modules() for key in vars(module)}


def test_signatures_stay_those_of_the_model():
    """Trainer and generate look at them: what the model takes beside, Trainer leaves in its batches."""
    plain, model = make_m2m100(), routed().get_base_model()
    assert inspect.signature(model.generate) == inspect.signature(plain.generate)
    found, expected = inspect.signature(model.forward).parameters, inspect.signature(plain.forward).parameters
    assert {name: each for name, each in found.items() if name != "language_pairs"} == dict(expected)
    assert list(found)[-2:] == ["language_pairs", "kwargs"] and found["language_pairs"].default is None
    for stack in ("get_encoder", "get_decoder"):
        found, expected = getattr(model, stack)().forward, getattr(plain, stack)().forward
        assert inspect.signature(found) == inspect.signature(expected)


def test_a_model_that_was_hooked_and_adapted_again_has_a_signature():
    """accelerate's wrapper leads to the forward that it wrapped, which names the pairs already."""
    model = routed()
    add_hook_to_module(model.get_base_model(), ModelHook())
    again = adapt(model.unload(), make_masks(make_m2m100())).get_base_model()
    assert list(inspect.signature(again.forward).parameters).count("language_pairs") == 1


def test_a_copy_made_during_a_call_is_outside_of_it():
    model, batch = routed(), make_batch()
    copies = []
    handle = (
        model.get_base_model()
        .get_decoder()
        .register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(model.get_base_model())))
    )
    model(**batch, language_pairs="en-de")
    handle.remove()
    copies[0].get_decoder()._forward_pre_hooks.clear()
    with pytest.raises(ValueError, match="none was chosen"):
        copies[0].get_encoder()(**inputs_of(batch))
    assert copies[0](**batch, language_pairs="fr-en").logits.equal(model(**batch, language_pairs="fr-en").logits)


def test_two_pairs_for_four_samples_are_refused():
    model = routed()
    for pairs in (PAIRS[:2], torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="2 samples, but a batch of 4"):
            model(**make_batch(), language_pairs=pairs)
        with pytest.raises(ValueError, match="2 samples, but a batch of 4"):
            model.generate(**inputs_of(make_batch()), language_pairs=pairs)
