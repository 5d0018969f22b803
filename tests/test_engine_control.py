"""Saving, cancelling, interrupting."""

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

from gdn_jax import Engine, generate, models

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
    _in_a_thread(finish, engine)
    assert request.tokens == greedy(0)[0][0].tokens


def test_threads_may_run_an_engine_in_turn():
    engine, before = make_engine(), signal.getsignal(signal.SIGINT)
    requests = [engine.submit(PROMPTS[0], max_tokens=NEW, stop=()) for _ in range(3)]
    steps = engine.run()
    next(steps)
    assert _in_a_thread(next, steps) == []
    for _ in steps:
        pass
    assert signal.getsignal(signal.SIGINT) is before
    assert {len(request.tokens) for request in requests} == {NEW}


def _in_a_thread(function, *args):
    """What it raised."""
    raised = []

    def run():
        try:
            function(*args)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised
