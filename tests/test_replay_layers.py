"""Replay in a layer, a model and an engine: what the other ways of decoding give."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from gdn_jax import ReplayState, _triton, models, testing
from gdn_jax.generation import sizes
from gdn_jax.nn import GatedDeltaNet
from gdn_jax.ops.gated_delta import replay_tuning as tuning

D, N, DRAFTS = 48, 3, 3
LAYER = GatedDeltaNet(D, 2, 4, 16, 16)
X = jax.random.normal(jax.random.key(0), (N, 60, D))
PARAMS = LAYER.init(jax.random.key(1), X[:, :4])


@functools.cache
def apply(**static):
    return jax.jit(functools.partial(LAYER.apply, PARAMS, **static), donate_argnums=1)


def alone(n, length):
    """y of the first tokens of a sequence, without a state."""
    return LAYER.apply(PARAMS, X[n : n + 1, :length])[0][0]


@pytest.mark.parametrize("implementation", ["interpret", None])
def test_prompts_steps_and_drafts_of_a_layer_are_its_whole_sequences(implementation):
    apply_it = apply(implementation=implementation)
    state = LAYER.init_state(8, columns=1 + DRAFTS, decode="replay")
    state = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if x.dtype.kind == "f" else x, state
    )
    slots, random = np.int32([5, 0, 7]), np.random.default_rng(0)
    lengths = np.array([9, 2, 20])  # of the prompts
    bounds = np.concatenate([[0], np.cumsum(lengths), [40]]).astype(np.int32)
    tokens = [X[n, :length] for n, length in enumerate(lengths)]
    tokens.append(jnp.full((40 - lengths.sum(), D), jnp.nan))
    y, state = apply_it(
        jnp.concatenate(tokens),
        state,
        slots=np.append(slots, np.int32(-1)),
        cu_seqlens=bounds,
        has_state=np.zeros(4, bool),
    )
    for n, length in enumerate(lengths):
        own = y[bounds[n] : bounds[n + 1]]
        assert testing.relative_error(own, alone(n, length)) < 1e-5
    y, state = apply_it(take(lengths, 1), state, slots=slots)  # a plain step
    lengths = lengths + 1
    check_last(y, lengths, 1)

    accepted = np.ones(N, np.int32)
    for step in range(6):
        given = np.where(step == 2, [-1, 0, -1], slots)  # two rows sit one step out
        y, state = apply_it(
            take(lengths, 1 + DRAFTS),
            state,
            slots=given.astype(np.int32),
            num_accepted=accepted,
        )
        drawn = random.integers(1, 2 + DRAFTS, N).astype(np.int32)
        for n in range(N):
            if given[n] < 0:
                assert not y[n].any()
            else:
                check_one(y[n], n, lengths[n], 1 + DRAFTS)
                accepted[n] = drawn[n]
                lengths[n] += drawn[n]
    assert isinstance(state.recurrent, ReplayState)


def take(lengths, count):
    return jnp.stack([X[n, at : at + count] for n, at in enumerate(lengths)])


def check_one(y, n, length, count):
    want = alone(n, length + count)[-count:]
    assert testing.relative_error(y, want) < 1e-4


def check_last(y, lengths, count):
    for n, length in enumerate(lengths):
        check_one(y[n], n, length - count, count)


def test_a_row_whose_count_is_above_what_is_pending_is_null_in_both_states():
    state = LAYER.init_state(N, columns=1 + DRAFTS, decode="replay")
    ones = np.ones(N, np.int32)
    _, state = apply()(X[:, :2], state, num_accepted=ones)
    before = jax.tree.map(np.array, state)
    y, state = apply()(X[:, 2:4], state, num_accepted=np.int32([2, 3, 0]))
    assert y[0].any() and not y[1:].any()
    for x, z in zip(*map(jax.tree.leaves, (before, state)), strict=True):
        assert np.array_equal(x[1:], np.asarray(z)[1:])


def check_rows_kept(before, state, rows):
    for x, z in zip(*map(jax.tree.leaves, (before, state)), strict=True):
        assert np.array_equal(x[rows], np.asarray(z)[rows], equal_nan=True)


def begun(length, columns=1 + DRAFTS):
    state = LAYER.init_state(N, columns=columns, decode="replay")
    return apply()(X[:, :length], state)[1]


def test_a_row_that_is_null_behind_a_prompt_goes_on_where_it_was():
    state = begun(6)
    before = jax.tree.map(np.array, state)
    y, state = apply()(X[:, 6:10], state, num_accepted=np.int32([1, 0, 3]))
    assert y[0].any() and not y[1:].any()
    check_rows_kept(before, state, [1, 2])
    y, _ = apply()(X[:, 6:10], state, num_accepted=np.ones(N, np.int32))
    check_one(y[1], 1, 6, 4)


@pytest.mark.parametrize("count", [1, 5])
def test_without_a_count_one_token_of_the_last_step_is_taken_to_stand(count):
    state = begun(6)
    _, state = apply()(X[:, 6:10], state, num_accepted=np.ones(N, np.int32))
    y, state = apply()(X[:, 7 : 7 + count], state)
    for n in range(N):
        check_one(y[n], n, 7, count)
    y, _ = apply()(
        X[:, 7 + count : 11 + count], state, num_accepted=np.ones(N, np.int32)
    )
    for n in range(N):
        check_one(y[n], n, 7 + count, 4)


@pytest.mark.parametrize("length", [5, 20])
def test_rows_of_more_tokens_than_a_step_has_are_null_in_both_states(length):
    state = begun(6)
    before = jax.tree.map(np.array, state)
    bounds = np.int32([0, length, length + 2, length + 4])
    y, state = apply()(
        X.reshape(-1, D)[: length + 4],
        state,
        slots=np.arange(N, dtype=np.int32),
        cu_seqlens=bounds,
        num_accepted=np.ones(N, np.int32),
    )
    assert not y[:length].any() and y[length:].any()
    check_rows_kept(before, state, [0])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (dict(path="fused"), "path must be 'chunk' without num_accepted"),
        (dict(null_slot=0), "null_slot must be given with slots"),
        (dict(x=X[:2, :4]), "state must be one state per row where slots is None"),
    ],
)
def test_a_wrong_call_is_told(call, text):
    call = dict(x=X[:, :4]) | call
    with pytest.raises(ValueError, match=text):
        LAYER.apply(PARAMS, state=begun(2), **call)


def test_the_ring_holds_a_step():
    assert begun(2, columns=17).recurrent.window == 32
    with pytest.raises(ValueError, match="columns must be at most 32 with decode"):
        LAYER.init_state(N, columns=33, decode="replay")


@pytest.mark.parametrize(
    ("decode", "columns", "text"),
    [
        ("forks", 1, "decode must be None or one of in_place, checkpoints, replay"),
        ("in_place", 4, "decode must be 'checkpoints' or 'replay' with 3 drafts"),
    ],
)
def test_a_wrong_way_of_decoding_is_told(decode, columns, text):
    with pytest.raises(ValueError, match=text):
        LAYER.init_state(N, columns=columns, decode=decode)


@functools.cache
def small():
    return models.load(models.SMALL, dtype="float32", progress=False)


PROMPTS = [list(b"def read"), list(b"class"), list(b"Return the ")]


@functools.cache
def plain_texts():
    options = dict(max_tokens=2000, stop=(), num_rows=2, decode="in_place")
    return gdn_jax.generate(*small(), PROMPTS, **options)


@pytest.mark.once
@pytest.mark.parametrize("drafts", [0, 3])
def test_an_engine_writes_the_texts_of_plain_decoding(drafts):
    options = dict(max_tokens=2000, stop=(), num_rows=2, speculative=drafts)
    texts = gdn_jax.generate(*small(), PROMPTS, decode="replay", **options)
    assert texts == plain_texts()


@pytest.mark.parametrize(
    ("rows", "drafts", "dtype", "decode"),
    [
        (1, 0, "float32", "in_place"),
        (3, 0, "float32", "replay"),
        (1, 1, "float32", "checkpoints"),
        (1, 3, "float32", "replay"),
        (1, 8, "float32", "replay"),
        (3, 0, "bfloat16", "in_place"),
        (3, 0, "float16", "in_place"),
        (3, 3, "float16", "replay"),
    ],
)
def test_an_engine_decodes_by_what_was_measured(
    rows, drafts, dtype, decode, monkeypatch
):
    plain, _ = small()
    model, config = dataclasses.replace(plain, dtype=jnp.bfloat16), plain.config
    heads = config.linear_num_value_heads
    dims = config.linear_key_head_dim, config.linear_value_head_dim
    group = heads // config.linear_num_key_heads
    rows_of = [
        (1, "float32", 2),
        (2, "float32", None),
        (4, "float32", 1),
        (3, "bfloat16", 2),
    ]
    measured = {
        "NVIDIA H200": (
            *(
                tuning.Crossover(*dims, group, tokens, name, n and n * heads, "")
                for tokens, name, n in rows_of
            ),
            tuning.Crossover(1, 1, 1, 1, "bfloat16", 1, ""),  # of other sizes
        )
    }
    monkeypatch.setattr(tuning, "crossovers", lambda kind: measured.get(kind, ()))

    def chosen(model):
        options = dict(recurrent_dtype=dtype, decode=None, speculative=drafts)
        options |= dict(num_positions=64, steps_per_call=1, prefill_tokens=16)
        return sizes.check_sizes(model, num_rows=rows, max_stop=1, **options).decode

    otherwise = "checkpoints" if drafts else "in_place"
    assert chosen(model) == otherwise  # no kernel runs on a CPU
    monkeypatch.setattr(_triton, "device_kind", lambda arrays: "NVIDIA H200")
    assert chosen(model) == decode
    assert chosen(dataclasses.replace(model, implementation="xla")) == otherwise
    assert chosen(plain) == otherwise  # float32 activations were not measured


@pytest.mark.once
def test_where_replay_pays_was_measured_on_an_h200():
    """For each way that models of Qwen3.5 decode; the more tokens, the sooner."""
    found = {
        (row.state_dtype, row.tokens): row.heads
        for row in tuning.crossovers("NVIDIA H200")
        if (row.K, row.V, row.group) == (128, 128, 2)
    }
    for dtype in ("float32", "bfloat16"):
        heads = [found[dtype, tokens] for tokens in (1, 2, 4)]
        assert heads == sorted(heads, reverse=True) and min(heads) > 32
        state = jax.ShapeDtypeStruct((1, 32, 128, 128), dtype)
        least = heads[2] // 32
        assert tuning.replay_pays("NVIDIA H200", 4, state, 16, least)
        assert not tuning.replay_pays("NVIDIA H200", 4, state, 16, least - 1)


@pytest.mark.once
def test_an_engine_that_replays_is_saved_and_goes_on(tmp_path):
    model, params = small()
    engine = gdn_jax.Engine(
        model, params, num_rows=2, num_positions=128, speculative=2, decode="replay"
    )
    requests = [engine.submit(prompt, max_tokens=40, stop=()) for prompt in PROMPTS]
    engine.step()
    engine.save(tmp_path / "engine")
    for _ in engine.run():
        pass
    again = gdn_jax.Engine.restore(tmp_path / "engine", model, params)
    assert again.sizes.decode == "replay"
    restored = {request.number: request for request in again.requests}
    for _ in again.run():
        pass
    for number, request in restored.items():
        assert request.tokens == requests[number].tokens
