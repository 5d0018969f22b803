"""An engine's calls that fail, and what it refuses."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from engines import NEW, PROMPTS, SIZES, finish, greedy, make, make_engine, tokens
from jax.errors import JaxRuntimeError

from gdn_jax import Engine
from gdn_jax.generation import engine as engine_module
from gdn_jax.generation import sizes, steps

pytestmark = pytest.mark.usefixtures("exact_products")


def _fail(*_, **__):
    raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def test_out_of_memory_says_what_to_reduce(monkeypatch):
    engine = make_engine()
    requests = [engine.submit(x, max_tokens=NEW, stop=()) for x in PROMPTS]
    for name in ("prefill", "decode"):
        with monkeypatch.context() as patch:
            patch.setattr(steps, name, _fail)
            with pytest.raises(MemoryError, match=r"GB \(num_rows = 4, num_positions"):
                finish(engine)
    finish(engine)
    assert tokens(requests) == tokens(greedy(0)[0])
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "init_state", _fail)
        with pytest.raises(MemoryError, match="prefill_tokens = 16"):
            make_engine()


def test_a_state_larger_than_memory_is_not_made(monkeypatch):
    monkeypatch.setattr(engine_module, "init_state", pytest.fail)
    with pytest.raises(MemoryError, match=r"\(num_rows = 1000000000, num_positions"):
        make_engine(num_rows=10**9)


def test_memory_is_a_containers_where_that_is_less(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(sizes, "CONTAINER", limit)
    monkeypatch.setattr(engine_module, "init_state", lambda *_: None)
    for text, is_refused in (("max\n", False), ("1000\n", True)):
        limit.write_text(text)
        if is_refused:
            with pytest.raises(MemoryError, match="too little memory"):
                make_engine()
        else:
            make_engine()


def make_spoiled():
    """Token 7 is NaN."""
    model, params = make()
    table = params["embed"]["embedding"].at[7].set(jnp.nan)
    return model, params | dict(embed=dict(embedding=table))


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_text_ends_where_logits_are_no_numbers(drafts):
    """One prompt's rows are no other's: those go on."""
    model, params = make_spoiled()
    engine = Engine(model, params, **SIZES, speculative=drafts)
    bad = engine.submit([7, 1, 2], max_tokens=NEW, stop=())
    good = engine.submit([1, 2, 3], max_tokens=NEW, stop=())
    finish(engine)
    assert (bad.finish_reason, bad.tokens, bad.log_probabilities) == ("nan", [], [])
    assert good.finish_reason == "length" and len(good.tokens) == NEW
    assert not engine.requests and not np.asarray(engine.state.is_active).any()


@pytest.mark.parametrize("drafts", [0, 2])
def test_rows_that_held_nan_serve_the_next_texts(drafts):
    """As well as others: as many of their drafts are accepted."""
    model, params = make_spoiled()
    spoiled = Engine(model, params, **SIZES, speculative=drafts)
    bad = [spoiled.submit([1, 7, 2], max_tokens=NEW, stop=()) for _ in range(4)]
    finish(spoiled)
    assert [request.finish_reason for request in bad] == ["nan"] * 4
    held = jax.tree.leaves(spoiled.state.model.layers[0])
    assert any(np.isnan(x).reshape(4, -1).any(1).all() for x in held)

    fresh = Engine(model, params, **SIZES, speculative=drafts)
    texts = [[2, 1, 4], [5], [9, 3], [2, 8, 1]]
    before, of_each = spoiled.figures.accepted, []
    for engine in (spoiled, fresh):
        requests = [engine.submit(x, max_tokens=5, stop=()) for x in texts]
        finish(engine)
        assert {r.finish_reason for r in requests} == {"length"}
        of_each.append(tokens(requests))
    assert of_each[0] == of_each[1]
    assert spoiled.figures.accepted - before == fresh.figures.accepted


def test_a_block_is_no_longer_than_a_text():
    assert make_engine(steps_per_call=10**9).sizes.steps_per_call == 96


def test_a_lost_state_is_told(monkeypatch, tmp_path):
    engine = make_engine()
    request = engine.submit(PROMPTS[0], max_tokens=NEW, stop=())
    engine.step()
    decode = steps.decode

    def broken(*args):
        decode(*args)
        raise JaxRuntimeError("INTERNAL: something else")

    with monkeypatch.context() as patch:
        patch.setattr(steps, "decode", broken)
        with pytest.raises(JaxRuntimeError, match="something else"):
            engine.step()
    for call in (engine.step, lambda: engine.save(tmp_path / "engine")):
        with pytest.raises(RuntimeError, match="the engine's state was lost"):
            call()
    with pytest.raises(RuntimeError, match="the engine's state was lost"):
        engine.cancel(request)
    assert engine.requests == [request]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(num_rows=0), "num_rows must be an int >= 1; got 0"),
        (dict(num_positions=2.5), "num_positions must be an int >= 1; got 2.5"),
        (dict(max_stop=0), "max_stop must be an int >= 1"),
        (dict(steps_per_call=None), "steps_per_call must be an int >= 1"),
        (dict(prefill_tokens=15), "prefill_tokens must be >= 16; got 15"),
        (dict(speculative=-1), r"speculative must be in \[0, 8\]; got -1"),
        (dict(speculative=9), r"speculative must be in \[0, 8\]; got 9"),
        (dict(speculative=1.0), "speculative must be an int"),
        (dict(recurrent_dtype="int8"), "recurrent_dtype must be one of float32"),
    ],
)
def test_wrong_sizes_are_told(change, text, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=text):
        make_engine(**change)


def test_a_model_without_a_head_drafts_nothing():
    with pytest.raises(ValueError, match="0 for a model with 0 MTP layers"):
        Engine(*make(num_mtp_layers=0), speculative=1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(prompt=[]), "prompt must be one token at least"),
        (dict(prompt="Hello"), "prompt must be a list of token ids; got 'Hello'"),
        (dict(prompt=5), "prompt must be a list of token ids; got 5"),
        (dict(prompt=[1.5]), r"prompt must be a list of token ids; got \[1.5\]"),
        (dict(prompt=[[1], [2, 3]]), "prompt must be a list of token ids"),
        (dict(prompt=[1, 50, -1]), r"token ids in \[0, 50\); got \[50, -1\]"),
        (dict(prompt=[1] * 80), r"at most num_positions = 96 in all; got 80 tokens, "),
        (dict(max_tokens=0), "max_tokens must be an int >= 1; got 0"),
        (dict(max_tokens=9.0), "max_tokens must be an int >= 1"),
        (dict(temperature=-1.0), "temperature must be finite in float32, >= 0"),
        (dict(temperature=float("nan")), "temperature must be finite"),
        (dict(temperature=None), "temperature must be a number; got None"),
        (dict(top_p="abc"), "top_p must be a number; got 'abc'"),
        (dict(temperature=float("inf")), "temperature must be finite"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\]"),
        (dict(top_p=1.1), r"top_p must be in \(0, 1\]"),
        (dict(top_k=-1), "top_k must be in"),
        (dict(top_k=0.5), "top_k must be an int"),
        (dict(seed="1"), "seed must be an int; got '1'"),
        (dict(stop=7), "stop must be a list of token ids; got 7"),
        (dict(stop=[1, 2, 3, 4, 5]), "stop must be at most max_stop = 4; got 5 tokens"),
        (dict(stop=[50]), r"stop must be token ids in \[0, 50\)"),
    ],
)
def test_a_wrong_request_is_told(change, text, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    engine = make_engine()
    with pytest.raises(ValueError, match=text):
        engine.submit(**dict(prompt=[1], max_tokens=20) | change)
    assert not engine.queue


def test_attention_has_learned_so_many_positions():
    engine = Engine(*make(max_position_embeddings=64), **SIZES)
    engine.submit([1] * 44, max_tokens=20)
    told = "prompt must be at most max_position_embeddings = 64 tokens in all; got 45"
    with pytest.raises(ValueError, match=told):
        engine.submit([1] * 45, max_tokens=20)
    without = make(max_position_embeddings=64, layer_types=("linear_attention",))
    Engine(*without, **SIZES).submit([1] * 45, max_tokens=20)


@pytest.mark.parametrize(
    "kind", [tuple, np.array, jnp.array, lambda x: np.array(x, np.uint8)]
)
def test_prompts_of_any_kind(kind):
    engine = make_engine()
    request = engine.submit(kind([1, 2]), max_tokens=3, stop=kind([4]))
    assert (request.prompt, request.stop) == ((1, 2), (4,))
    assert {type(token) for token in request.prompt + request.stop} == {int}
