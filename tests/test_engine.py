"""Texts are the model's own, whatever runs beside them, saved and restored."""

import dataclasses
import functools
import signal
import threading

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from chi_squared import surprise
from engines import SIZES, finish, make, make_engine, prompts, tokens, write
from jax.errors import JaxRuntimeError

from gdn_jax import Engine, models
from gdn_jax.generation import engine as engine_module
from gdn_jax.generation import sampling, steps

PROMPTS = prompts(3, 20, 1, 50, 7, 16)
NEW = 30
MIXED = [  # options of each
    dict(),
    dict(temperature=1.0),
    dict(temperature=1.5, top_k=9, seed=3),
    dict(temperature=0.7, top_p=0.8, seed=2**64 + 5),
    dict(temperature=1.0, top_p=0.9, top_k=20, seed=-1, stop=(3, 9)),
    dict(temperature=2.0, seed=1, max_tokens=11),
]


@pytest.fixture(autouse=True, scope="module")
def exact():
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_default_matmul_precision", before)


@functools.cache
def _greedy(speculative):
    engine = make_engine(speculative=speculative)
    return write(engine, PROMPTS, max_tokens=NEW, stop=()), engine.figures


@functools.cache
def _mixed(speculative):
    engine = make_engine(speculative=speculative)
    return write(engine, PROMPTS, MIXED, **dict(max_tokens=NEW, stop=()))


@functools.cache
def _log_probabilities(dtype=jnp.float32):
    model, _ = make(dtype=dtype)

    @jax.jit
    def apply(params, rows):
        logits = model.apply({"params": params}, rows).astype(jnp.float32)
        return jax.nn.log_softmax(logits)

    return apply


def _of_whole_texts(requests):
    """[prompt][new token, A]: the model's, from whole texts without any state."""
    rows = np.zeros((len(requests), 96), np.int32)
    for row, request in zip(rows, requests, strict=True):
        whole = [*request.prompt, *request.tokens]
        row[: len(whole)] = whole
    every = _log_probabilities()(make()[1], rows)
    for each, request in zip(np.asarray(every), requests, strict=True):
        begin = len(request.prompt) - 1
        yield each[begin : begin + len(request.tokens)]


def test_greedy_takes_the_models_most_likely_token():
    requests, figures = _greedy(0)
    for request, each in zip(requests, _of_whole_texts(requests), strict=True):
        assert request.tokens == each.argmax(-1).tolist()
        assert request.finish_reason == "length"
    assert figures.prefilled == sum(map(len, PROMPTS))
    assert figures.decoded == figures.row_steps == len(PROMPTS) * (NEW - 1)
    assert figures.steps < figures.decoded / 2  # rows went together
    texts = {tuple(text) for text in tokens(requests)}
    assert len(texts) == len(PROMPTS) and min(len(set(x)) for x in texts) > 5


@pytest.mark.parametrize("speculative", [1, 2, 3, 4])
def test_speculative_greedy_is_plain_greedy(speculative):
    requests, figures = _greedy(speculative)
    assert tokens(requests) == tokens(_greedy(0)[0])
    assert 1.3 < figures.mean_accepted < 0.9 * (1 + speculative)


@pytest.mark.parametrize("speculative", [0, 2])
def test_log_probabilities_are_the_models_own(speculative):
    requests = _mixed(speculative)
    for request, each in zip(requests, _of_whole_texts(requests), strict=True):
        want = np.take_along_axis(each, np.array(request.tokens)[:, None], 1)[:, 0]
        np.testing.assert_allclose(request.log_probabilities, want, atol=2e-4)


@pytest.mark.parametrize("speculative", [0, 2])
def test_a_text_depends_on_no_other(speculative):
    for i, want in enumerate(_mixed(speculative)):
        engine = make_engine(speculative=speculative)
        for _ in range(i % 3):  # another row of the engine
            engine.submit(PROMPTS[0], max_tokens=20, temperature=1.0, seed=9)
        [got] = write(engine, [PROMPTS[i]], [MIXED[i]], **dict(max_tokens=NEW, stop=()))
        assert got.tokens == want.tokens
        assert got.finish_reason == want.finish_reason


def test_rows_that_fill_a_batch_are_left_alone():
    """Three prompts are read as a batch of four, beside a text amid its drafts."""
    engine = make_engine(speculative=2, prefill_tokens=64)
    texts = prompts(3, 9, 1, 7, 16, 2, 11)
    options = [
        dict(max_tokens=limit, temperature=1.0, seed=i, stop=())
        for i, limit in enumerate((NEW, 3, 3, 3, 9, 9, 9))
    ]
    requests = [
        engine.submit(text, **each) for text, each in zip(texts, options, strict=True)
    ]
    engine.step()
    engine.step()
    assert [request.unread for request in engine.requests] == [0, 16, 2, 11]
    assert engine.state.num_accepted[0] > 1
    finish(engine)
    for text, each, request in zip(texts, options, requests, strict=True):
        [alone] = write(make_engine(speculative=2), [text], [each])
        assert alone.tokens == request.tokens


CUT = [  # of each prompt
    dict(temperature=1.0),
    dict(temperature=1.0),
    dict(temperature=1.5),
    dict(temperature=0.8, top_k=9),
    dict(temperature=1.5, top_p=0.9),
    dict(temperature=1.2, top_p=0.95, top_k=20),
]


@pytest.mark.parametrize("speculative", [0, 2])
def test_samples_are_distributed_as_the_models(speculative):
    """Given the text before it, a token's place in the model's running sum of
    probabilities is uniform, and independent of the places before. Two on end: a
    chi-squared test of 4 x 4 cells."""
    engine = Engine(*_another_head(), speculative=speculative, **SIZES)
    rng, counts = np.random.default_rng(0), np.zeros((4, 4))
    columns = (
        jnp.array([options.get(name, off) for options in CUT], dtype)
        for name, off, dtype in (
            ("temperature", 0, jnp.float32),
            ("top_p", 1, jnp.float32),
            ("top_k", 0, jnp.int32),
        )
    )
    choose = jax.jit(sampling.probabilities)
    of_rows = sampling.Options(*columns)
    for round in range(20):
        options = [dict(seed=6 * round + i) | each for i, each in enumerate(CUT)]
        requests = write(engine, PROMPTS, options, max_tokens=44, stop=())
        every = choose(np.stack(list(_of_whole_texts(requests))), of_rows)
        drawn = np.array(tokens(requests))[..., None]
        places = _places(np.asarray(every, np.float64), drawn, rng)
        pairs = np.minimum(places * 4, 3).astype(int).reshape(-1, 2)
        np.add.at(counts, tuple(pairs.T), 1)
    assert surprise(counts, np.full((4, 4), 1 / 16)) < 1
    assert 1.2 < engine.figures.mean_accepted < 2.5 or not speculative


def _another_head():
    """Drafts by a chain of its own."""
    model, params = make()
    kernel = jnp.flip(params["mtp"]["fc"]["kernel"])
    return model, params | dict(mtp=params["mtp"] | dict(fc=dict(kernel=kernel)))


def _places(p, drawn, rng):
    """Of tokens in the order of their probabilities; within a token's, anywhere."""
    order = np.argsort(-p, axis=-1)
    rank = np.argmax(order == drawn, axis=-1)[..., None]
    p = np.take_along_axis(p, order, axis=-1)
    up_to = np.take_along_axis(np.cumsum(p, axis=-1), rank, axis=-1)
    share = np.take_along_axis(p, rank, axis=-1)
    assert (share > 0).all()
    return (up_to - rng.uniform(size=share.shape) * share)[..., 0]


@pytest.mark.parametrize("speculative", [0, 2])
def test_texts_end_where_they_should(speculative):
    """At the first token, within a block and within a step's drafts."""
    texts = tokens(_greedy(0)[0])
    ends = [
        (dict(max_tokens=1, stop=()), "length", 1),
        (dict(max_tokens=NEW, stop=[texts[1][0]]), "stop", 1),
        (dict(max_tokens=1, stop=[texts[2][0]] * 9), "stop", 1),
        *((dict(max_tokens=n, stop=()), "length", n) for n in (2, 7, 8)),
    ]
    requests = write(
        make_engine(speculative=speculative), PROMPTS, [x for x, *_ in ends]
    )
    for request, text, (_, reason, count) in zip(requests, texts, ends, strict=True):
        assert (request.tokens, request.finish_reason) == (text[:count], reason)
    for place in (5, 6, 7):
        stop = [[text[place], 49, 49] for text in texts]
        options = [dict(stop=each, max_tokens=NEW) for each in stop]
        requests = write(make_engine(speculative=speculative), PROMPTS, options)
        for request, text, each in zip(requests, texts, stop, strict=True):
            end = min(text.index(x) for x in each if x in text)
            assert request.tokens == text[: end + 1]
            assert request.finish_reason == "stop"


def test_the_configs_end_of_text_is_the_default():
    requests = write(make_engine(), PROMPTS, max_tokens=NEW)
    wanted = tokens(_greedy(0)[0])
    ended = [x[: x.index(48) + 1] if 48 in x else x for x in wanted]
    assert tokens(requests) == ended != wanted


def test_seeds_are_any_ints():
    seeds = [0, 1, 2**32, 2**64 - 1, -1, 2**64]
    options = [dict(seed=seed) for seed in seeds]
    texts = tokens(
        write(
            make_engine(),
            [PROMPTS[0]] * 6,
            options,
            **dict(max_tokens=9, temperature=1.0, stop=()),
        )
    )
    assert texts[3] == texts[4] and texts[5] == texts[0]
    assert len({tuple(text) for text in texts}) == 4


def test_texts_go_on_between_prompts():
    """One of a long text, and prompts without end whose texts are one token."""
    engine = make_engine()
    long = engine.submit(PROMPTS[0], max_tokens=NEW, stop=())
    short = [engine.submit(PROMPTS[2], max_tokens=1) for _ in range(60)]
    for _ in engine.run():
        if long.finish_reason:
            break
    assert long.tokens == _greedy(0)[0][0].tokens
    assert sum(request.finish_reason is None for request in short) > 30
    finish(engine)
    assert all(request.finish_reason for request in short)
    assert engine.step() == []


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
    assert tokens(texts) == tokens(_mixed(speculative))
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
    for i, (request, want) in enumerate(zip(requests, _greedy(0)[0], strict=True)):
        count = {0: 6, 3: 0, 4: 0}.get(i, NEW)
        assert request.tokens == want.tokens[:count]


def _interrupting(engine, monkeypatch, times=1):
    step = engine.step

    def interrupted():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(engine, "step", interrupted)


def test_ctrl_c_waits_for_the_call_at_hand(monkeypatch):
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
    assert request.tokens == _greedy(0)[0][0].tokens


def test_a_second_ctrl_c_does_not_wait(monkeypatch):
    engine = make_engine()
    engine.submit(PROMPTS[0], max_tokens=NEW)
    _interrupting(engine, monkeypatch, times=2)
    with pytest.raises(KeyboardInterrupt):
        next(engine.run())


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
    assert request.tokens == _greedy(0)[0][0].tokens


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
    assert tokens(requests) == tokens(_greedy(0)[0])
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "init_state", _fail)
        with pytest.raises(MemoryError, match="prefill_tokens = 16"):
            make_engine()


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


def test_bfloat16_diverges_only_where_tokens_are_as_likely(record_property):
    """The first token at which plain and speculative texts differ is reported."""
    model, params = make(dtype=jnp.bfloat16)
    plain, drafted = (
        write(
            Engine(model, params, **SIZES | dict(speculative=speculative)),
            PROMPTS,
            max_tokens=NEW,
            stop=(),
        )
        for speculative in (0, 2)
    )
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    for i, (one, other) in enumerate(zip(plain, drafted, strict=True)):
        pairs = enumerate(zip(one.tokens, other.tokens, strict=True))
        place = next((n for n, (x, y) in pairs if x != y), None)
        record_property(f"first divergence of prompt {i}", place)
        if place is None:
            continue
        context = [*one.prompt, *one.tokens[:place]]
        row = np.zeros((1, 96), np.int32)
        row[0, : len(context)] = context
        want = _log_probabilities()(exact, row)[0, len(context) - 1]
        got = _log_probabilities(jnp.bfloat16)(params, row)[0, len(context) - 1]
        error = jnp.abs(got - want).max()
        print(f"prompt {i}: token {place}", error)
        for request in (one, other):
            assert want.max() - want[request.tokens[place]] < 4 * error


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(num_rows=0), "num_rows must be an int >= 1; got 0"),
        (dict(num_positions=2.5), "num_positions must be an int >= 1; got 2.5"),
        (dict(max_stop=0), "max_stop must be an int >= 1"),
        (dict(steps_per_call=None), "steps_per_call must be an int >= 1"),
        (dict(prefill_tokens=15), "prefill_tokens must be >= 16; got 15"),
        (dict(speculative=-1), "speculative must be >= 0"),
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
        (dict(temperature=-1.0), "temperature must be finite, >= 0"),
        (dict(temperature=float("nan")), "temperature must be finite"),
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


@pytest.mark.parametrize(
    "kind", [tuple, np.array, jnp.array, lambda x: np.array(x, np.uint8)]
)
def test_prompts_of_any_kind(kind):
    engine = make_engine()
    request = engine.submit(kind([1, 2]), max_tokens=3, stop=kind([4]))
    assert (request.prompt, request.stop) == ((1, 2), (4,))
    assert {type(token) for token in request.prompt + request.stop} == {int}


def test_the_state_can_be_looked_at():
    engine = make_engine(speculative=2)
    engine.submit(PROMPTS[0], max_tokens=NEW, stop=())
    engine.step()
    state = engine.state
    assert state.position[0] == len(PROMPTS[0]) + 1
    assert state.is_active.tolist() == [True, False, False, False]
    assert state.drafts.tokens.shape == (4, 2)
    assert engine.state_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
