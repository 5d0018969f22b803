"""Saving, cancelling, interrupting; what fails and what is refused."""

import dataclasses
import functools
import re
import signal
import threading

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from engines import (
    MIXED,
    NEW,
    PROMPTS,
    SIZES,
    finish,
    greedy,
    make,
    make_engine,
    mixed,
    tokens,
)
from jax.errors import JaxRuntimeError

from gdn_jax import Engine, generate, models
from gdn_jax.generation import engine as engine_module
from gdn_jax.generation import sizes, steps

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.mark.parametrize("speculative", [0, 2])
def test_a_saved_engine_goes_on_bit_for_bit(speculative, tmp_path):
    options = [dict(max_tokens=NEW, stop=()) | each for each in MIXED]
    engine = make_engine(speculative=speculative)
    texts = [
        engine.submit(text, **each) for text, each in zip(PROMPTS, options, strict=True)
    ]
    saved, seen = [], set()
    while engine.requests:
        unfinished = engine.requests
        path = tmp_path / f"{len(saved)}.safetensors"
        engine.save(path)
        saved.append((path, unfinished))
        seen |= {
            "part of a prompt"
            for request in unfinished
            if request.prefilled and request.unread
        }
        seen |= {"a queue"} if engine.queue else set()
        seen |= {"a text"} if any(request.tokens for request in unfinished) else set()
        engine.step()
    assert seen == {"part of a prompt", "a queue", "a text"}
    assert tokens(texts) == tokens(mixed(speculative))
    for path, unfinished in saved[::2]:
        restored = Engine.restore(path, *make())
        requests = restored.requests
        assert [r.number for r in requests] == [r.number for r in unfinished]
        finish(restored)
        assert [vars(r) for r in requests] == [vars(r) for r in unfinished]
        assert restored.figures == engine.figures
        assert restored.submit([1], max_tokens=1).number == len(PROMPTS)


def test_another_model_is_refused(tmp_path):
    path, (model, params) = tmp_path / "deep" / "engine", make()
    config = dataclasses.replace(model.config, eos_token_id=(8,))
    make_engine().save(path)
    with pytest.raises(ValueError, match=r"eos_token_id is \[8\], was \[48\]"):
        Engine.restore(path, models.Model(config), params)
    with pytest.raises(ValueError, match="dtype is 'bfloat16', was 'float32'"):
        Engine.restore(path, model.clone(dtype=jnp.bfloat16), params)
    with pytest.raises(FileNotFoundError, match="nothing was saved there"):
        Engine.restore(tmp_path / "none", *make())


def test_cancelling():
    engine = make_engine()
    requests = [engine.submit(x, max_tokens=NEW, stop=()) for x in PROMPTS]
    waiting, reading, growing = requests[4], requests[3], requests[0]
    engine.cancel(waiting)
    engine.step()
    assert reading.prefilled and reading.unread
    engine.cancel(reading)
    while not growing.tokens[1:]:
        engine.step()
    engine.cancel(growing)
    finish(engine)
    engine.cancel(requests[1])
    reasons = [request.finish_reason for request in requests]
    assert [i for i, reason in enumerate(reasons) if reason == "cancelled"] == [0, 3, 4]
    assert not engine.state.is_active.any()
    for i, (request, want) in enumerate(zip(requests, greedy(0)[0], strict=True)):
        count = {0: 6, 3: 0, 4: 0}.get(i, NEW)
        assert request.tokens == want.tokens[:count]


def _interrupting(engine, monkeypatch, times=1):
    step = engine.step

    def interrupted():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(engine, "step", interrupted)


def test_ctrl_c_waits_for_the_call_at_hand(monkeypatch, interruptible):
    engine = make_engine()
    before = signal.getsignal(signal.SIGINT)
    request = engine.submit(PROMPTS[0], max_tokens=NEW, stop=())
    with monkeypatch.context() as patch:
        _interrupting(engine, patch)
        run = engine.run()
        assert next(run) == [request] and len(request.tokens) == 1
        assert signal.getsignal(signal.SIGINT) == before
        with pytest.raises(KeyboardInterrupt):
            next(run)
    finish(engine)
    assert request.tokens == greedy(0)[0][0].tokens


def test_a_second_ctrl_c_does_not_wait(monkeypatch, interruptible):
    engine = make_engine()
    engine.submit(PROMPTS[0], max_tokens=NEW)
    _interrupting(engine, monkeypatch, times=2)
    with pytest.raises(KeyboardInterrupt):
        next(engine.run())


def test_ctrl_c_is_not_lost_where_the_loop_is_left(monkeypatch, interruptible):
    engine = make_engine()
    engine.submit(PROMPTS[0], max_tokens=NEW, stop=())
    with monkeypatch.context() as patch:
        _interrupting(engine, patch)
        for _ in engine.run():
            break
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    finish(engine)


def test_ctrl_c_while_tokens_are_given_loses_none(monkeypatch, interruptible):
    model, params = make()
    given = {}

    def give(index, new):
        given.setdefault(index, []).extend(new)
        if index == 0:
            signal.raise_signal(signal.SIGINT)

    call = functools.partial(generate, model, params, PROMPTS, stop=())
    with pytest.raises(KeyboardInterrupt):
        call(max_tokens=NEW, on_tokens=give)
    assert given == {i: [text[0]] for i, text in enumerate(call(max_tokens=1))}


def test_a_request_of_another_engine_is_told():
    engine = make_engine()
    request = engine.submit(PROMPTS[0], max_tokens=NEW, stop=())
    engine.step()
    other = make_engine()
    other.submit(PROMPTS[1], max_tokens=2, stop=())
    other.step()
    told = "a Request of this engine; got number 0 of another. Give what `submit` gave"
    for _ in range(2):
        with pytest.raises(ValueError, match=told):
            other.cancel(request)
        finish(engine)  # and so when it has ended
    finish(other)


def test_what_is_no_request_is_told(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for wrong in (None, 0, np.ones(1)):
        with pytest.raises(ValueError, match=f"engine; got {re.escape(repr(wrong))}. "):
            make_engine().cancel(wrong)


def test_a_restored_engine_cancels_its_requests(tmp_path):
    engine = make_engine()
    engine.submit(PROMPTS[0], max_tokens=NEW)
    engine.save(tmp_path / "engine")
    restored = Engine.restore(tmp_path / "engine", *make())
    [request] = restored.requests
    restored.cancel(request)
    assert not restored.requests and request.finish_reason == "cancelled"


def test_no_file_can_be_a_folder(tmp_path):
    engine = make_engine()
    with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a folder. Name a file"):
        engine.save(tmp_path)
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "deep" / "engine"
    with pytest.raises(NotADirectoryError, match=f"{path} can be no file, since"):
        engine.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_engine_keeps_the_parameters_it_was_given():
    model, params = make()
    assert Engine(model, params, **SIZES).params is params


def test_a_process_that_ignores_ctrl_c_goes_on(monkeypatch, interruptible):
    engine = make_engine()
    request = engine.submit(PROMPTS[0], max_tokens=2, stop=())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _interrupting(engine, monkeypatch, times=2)
    finish(engine)
    assert len(request.tokens) == 2
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_ctrl_c_goes_to_whom_it_is_for(monkeypatch):
    engine, came = make_engine(), []
    engine.submit(PROMPTS[0], max_tokens=2, stop=())
    before = signal.signal(signal.SIGINT, lambda *_: came.append(1))
    try:
        _interrupting(engine, monkeypatch)
        finish(engine)
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [1, 1]


def test_other_threads_may_run_an_engine():
    engine = make_engine()
    request = engine.submit(PROMPTS[0], max_tokens=NEW, stop=())
    thread = threading.Thread(target=finish, args=(engine,))
    thread.start()
    thread.join()
    assert request.tokens == greedy(0)[0][0].tokens


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


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_text_ends_where_logits_are_no_numbers(drafts):
    """One prompt's rows are no other's: those go on."""
    model, params = make()
    table = params["embed"]["embedding"].at[7].set(jnp.nan)
    params = params | dict(embed=dict(embedding=table))
    engine = Engine(model, params, **SIZES, speculative=drafts)
    bad = engine.submit([7, 1, 2], max_tokens=NEW, stop=())
    good = engine.submit([1, 2, 3], max_tokens=NEW, stop=())
    finish(engine)
    assert (bad.finish_reason, bad.tokens, bad.log_probabilities) == ("nan", [], [])
    assert good.finish_reason == "length" and len(good.tokens) == NEW
    assert not engine.requests and not np.asarray(engine.state.is_active).any()


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
