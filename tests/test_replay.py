"""Replay over long schedules against float64, call by call."""

import functools

import aot
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import gdn_jax
from gdn_jax import ReplayState, replay_update, testing
from gdn_jax.testing.replays import Host, Schedule, dense_call

SCHEDULES = [
    Schedule("window of 16"),
    Schedule("window of 32", window=32, longest=9, tokens=20),
    Schedule("single tokens", longest=1, calls=120),
    Schedule("odd sizes, float32", K=24, V=20, H=1, HV=3, act_dtype="float32"),
    Schedule("little decay", gate_spread=8.0, act_dtype="float16"),
]
KDA = Schedule("a decay for each K", kda=True)


@functools.cache
def update(path, config=None):
    options = dict(implementation=path, config=config)
    return jax.jit(functools.partial(replay_update, **options), donate_argnums=0)


def tolerance(what, dtype, path):
    """The kernel's products are of bfloat16 parts, as those of chunks are."""
    what = f"chunked {what}" if path in ("interpret", "triton") else what
    return testing.TOLERANCE[what, dtype]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda x: x.name)
def test_every_call_of_a_schedule_agrees_with_float64(schedule, path):
    agree(schedule, path)


@pytest.mark.parametrize("way", ["reference", "xla"])
def test_so_it_does_with_a_decay_for_each_k(way):
    agree(KDA, way)


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    window=st.sampled_from([16, 32]),
    longest=st.integers(1, 16),
    rows=st.integers(1, 6),
    heads=st.sampled_from([(1, 1), (1, 3), (2, 4)]),
    sizes=st.sampled_from([(16, 16), (8, 40), (33, 5)]),
)
def test_any_schedule_agrees(seed, window, longest, rows, heads, sizes):
    (H, HV), (K, V) = heads, sizes
    schedule = Schedule(
        "any", 15, window, longest, rows, 7, 4 * longest, H, HV, K, V,
        act_dtype="float32",
    )  # fmt: skip
    agree(schedule, "xla", seed, least_folds=0)


@pytest.mark.parametrize("steps_v", [1, 2])
def test_so_it_does_in_blocks_along_k_and_spans_of_v(steps_v):
    config = gdn_jax.ReplayConfig(block_v=16, block_k=16, steps_v=steps_v)
    agree(Schedule("blocks", K=48, V=40), "interpret", config=config)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("T", [1, 3, 6, 8, 12])
@pytest.mark.parametrize(
    "kernel", ["interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
def test_so_do_the_launches_of_dense_rows(kernel, T, state_dtype):
    """Each number of tokens has one of its own; three heads fill four places."""
    sizes = dict(H=1, HV=3, K=48, V=40, state_dtype=state_dtype)
    state, _ = dense_call(2, T, **sizes)
    wanted, random = jax.tree.map(jnp.copy, state), np.random.default_rng(0)
    for step in range(5):
        _, tokens = dense_call(2, T, seed=step, **sizes)
        accepted = random.integers(1, T + 1, 2).astype(np.int32)
        state, out = update(kernel)(state, *tokens, num_accepted=accepted)
        wanted, want = update("reference")(wanted, *tokens, num_accepted=accepted)
        assert np.array_equal(state.committed, wanted.committed)
        error = testing.relative_error(state.to_dense(), wanted.to_dense())
        assert error < tolerance("state", state_dtype, kernel)
        error = testing.relative_error(out, want)
        assert error < tolerance("out", "bfloat16", kernel)


def test_tokens_that_forget_everything_leave_the_others_exact(path):
    """Log-decays down to -inf, of which float32's running sums would know no more."""
    state, tokens = dense_call(3, 8, act_dtype="float32")
    tokens[4] = tokens[4].at[0, 2:4].set(1e5).at[1, 5].set(300).at[2, 0].set(jnp.inf)
    for _ in range(3):
        pool = state.to_dense()
        want_state, want, _ = testing.oracle((pool, *tokens), {})
        state, out = update(path)(state, *tokens)
        assert testing.relative_error(out, want) < tolerance("out", "float32", path)
        error = testing.relative_error(state.to_dense(), want_state)
        assert error < tolerance("state", "float32", path)


def agree(schedule, path, seed=0, least_folds=1, config=None):
    host = Host(schedule, seed)
    state, outs, folds = host.replay_state(), [], np.zeros(schedule.slots, int)
    for _ in range(schedule.calls):
        call = host.draw()
        before = jax.tree.map(np.array, state)
        state, out = update(path, config)(state, *call.args, **call.kwargs)
        want = host.take(call)
        outs.append((np.asarray(out).astype(np.float64), want))
        assert not np.asarray(out)[want == 0].any()
        assert np.array_equal(state.pending, host.pending)
        error = testing.relative_error(state.to_dense(), host.latest)
        assert error < tolerance("state", schedule.state_dtype, path)
        folds += np.any(state.checkpoint != before.checkpoint, axis=(1, 2, 3))
        _check_others_keep_their_bits(before, state, call)
    assert folds.min() >= least_folds
    # of all calls: some have so few values that their rounding is no average
    got, want = map(np.stack, zip(*outs, strict=True))
    error = testing.relative_error(got, want)
    assert error < tolerance("out", schedule.act_dtype, path)


def _check_others_keep_their_bits(before, after, call):
    named = set(call.kwargs["slots"].tolist())
    others = [slot for slot in range(len(before.start)) if slot not in named]
    for x, y in zip(before, after, strict=True):
        x, y = (np.ascontiguousarray(np.asarray(z)[others]) for z in (x, y))
        assert np.array_equal(x.view(np.uint8), y.view(np.uint8))


def test_it_equals_verification_with_checkpoints(path):
    """Step by step, with the same tokens and the same number accepted."""
    (N, T), random = (3, 4), np.random.default_rng(0)
    state, _ = dense_call(N, T, act_dtype="float32")
    table = jnp.arange(N * T, dtype=jnp.int32).reshape(N, T)
    pool = jnp.zeros((N * T, *state.checkpoint.shape[1:]))
    pool = pool.at[table[:, 0]].set(state.checkpoint)
    accepted = np.ones(N, np.int32)
    checkpoints = jax.jit(functools.partial(gdn_jax.fused_update, implementation=path))
    for step in range(12):
        _, tokens = dense_call(N, T, seed=step, act_dtype="float32")
        state, out = update(path)(state, *tokens, num_accepted=accepted)
        pool, want = checkpoints(pool, *tokens, slots=table, num_accepted=accepted)
        assert testing.relative_error(out, want) < tolerance("out", "float32", path)
        accepted = random.integers(1, T + 1, N).astype(np.int32)
        want = pool[table[np.arange(N), accepted - 1]]
        error = testing.relative_error(state.to_dense(accepted), want)
        assert error < tolerance("state", "float32", path)


def test_null_rows_of_a_dense_call_are_zero_whatever_their_tokens(path):
    state, tokens = dense_call()
    state, _ = update(path)(state, *tokens)
    before = jax.tree.map(np.array, state)
    tokens = [x.at[1:].set(jnp.nan) if x.ndim > 1 else x for x in tokens]
    slots, accepted = np.int32([2, -1, 1]), np.int32([4, 1, 5])
    state, out = update(path)(state, *tokens, slots=slots, num_accepted=accepted)
    assert np.isfinite(out).all() and not out[1:].any() and out[0].any()
    for x, y in zip(before, state, strict=True):
        assert np.array_equal(x[:2], np.asarray(y)[:2])
    assert state.pending.tolist() == [4, 4, 4]
    assert state.committed.tolist() == [0, 0, 4]


def test_num_accepted_counts_only_where_tokens_are_pending(path):
    state, tokens = dense_call()
    plain, out = update(path)(jax.tree.map(jnp.copy, state), *tokens)
    given, same = update(path)(state, *tokens, num_accepted=np.int32([0, 9, -3]))
    assert np.array_equal(out, same)
    assert np.array_equal(given.pending, plain.pending)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_state_drifts_less_than_one_that_every_token_rounds(dtype, path):
    """One sequence of single tokens, each of which stands."""
    sizes = dict(state_dtype=dtype, act_dtype="float32")
    state, _ = dense_call(2, 1, **sizes)
    in_place = jnp.copy(state.checkpoint)
    exact = np.asarray(in_place).astype(np.float64)
    each = jax.jit(functools.partial(gdn_jax.fused_update, implementation=path))
    for step in range(60):
        _, tokens = dense_call(2, 1, seed=step, **sizes)
        state, _ = update(path)(state, *tokens)
        in_place, _ = each(in_place, *tokens)
        exact, *_ = testing.oracle((exact, *tokens), {})
    drift, most = (
        testing.relative_error(x, exact) for x in (state.to_dense(), in_place)
    )
    assert drift < most


@pytest.mark.parametrize(
    ("way", "parts", "most"),
    [("xla", None, 2), ("interpret", 3, 2), ("interpret", 2, 4)],
)
def test_a_float32_state_drifts_little_more_than_token_by_token(way, parts, most):
    """Over many steps of which some tokens stand, with gates that forget little."""
    N, T, steps, random = 2, 4, 300, np.random.default_rng(0)
    state, tokens = dense_call(N, T, act_dtype="float32")
    tokens[3] = tokens[3] - 4  # A_log
    config = None if parts is None else gdn_jax.ReplayConfig(parts=parts)
    exact = np.asarray(state.checkpoint).astype(np.float64)
    each = state.checkpoint

    @jax.jit
    def advance(state, *tokens, num_accepted):
        return replay_update(
            state, *tokens, num_accepted=num_accepted, implementation=way, config=config
        )[0]

    @jax.jit
    def one_by_one(pool, *tokens, num_accepted):
        bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(num_accepted)])
        return gdn_jax.fused_update(pool, *tokens, cu_seqlens=bounds)[0]

    accepted = np.ones(N, np.int32)
    for step in range(steps):
        _, drawn = dense_call(N, T, seed=step, act_dtype="float32")
        drawn[3] = tokens[3]
        state = advance(state, *drawn, num_accepted=accepted)
        accepted = random.integers(1, T + 1, N).astype(np.int32)
        kept = [
            jnp.concatenate([x[n, : accepted[n]] for n in range(N)])
            if x.ndim > 1
            else x
            for x in drawn
        ]
        bounds = np.concatenate([[0], np.cumsum(accepted)]).astype(np.int32)
        exact, *_ = testing.oracle((exact, *kept), dict(cu_seqlens=bounds))
        padded = [
            jnp.pad(x, ((0, N * T - len(x)),) + ((0, 0),) * (x.ndim - 1))
            if x.ndim > 1
            else x
            for x in kept
        ]
        each = one_by_one(each, *padded, num_accepted=accepted)
    drift = testing.relative_error(state.to_dense(accepted), exact)
    assert drift < most * testing.relative_error(each, exact)


def test_states_come_from_a_pool_and_go_back(path):
    state, tokens = dense_call()
    pool = jnp.array(state.checkpoint)
    assert np.array_equal(state.to_dense(), pool)
    state, _ = update(path)(state, *tokens)
    want, *_ = testing.oracle((pool, *tokens), {})
    error = testing.relative_error(state.to_dense(), want)
    assert error < tolerance("state", "float32", path)
    again = ReplayState.from_dense(state.to_dense(), num_key_heads=2)
    assert np.array_equal(again.to_dense(), state.to_dense())


def test_a_slot_that_is_reset_begins_from_zeros(path):
    state, tokens = dense_call()
    state, _ = update(path)(state, *tokens)
    state = jax.jit(ReplayState.reset, donate_argnums=0)(state, np.int32([1, -1, 7]))
    dense = np.asarray(state.to_dense())
    assert not dense[1].any() and dense[[0, 2]].any()
    _, out = update(path)(state, *tokens)
    empty = ReplayState.from_dense(jnp.zeros_like(dense), num_key_heads=2)
    _, want = update(path)(empty, *tokens)
    assert np.array_equal(out[1], want[1])


@pytest.mark.parametrize("way", ["interpret", "triton"])
def test_without_a_kernel_for_a_decay_for_each_k_it_says_so(way):
    state, tokens = dense_call(kda=True)
    with pytest.raises(NotImplementedError, match=r"KDA.*'xla'|needs an NVIDIA GPU"):
        replay_update(state, *tokens, implementation=way)


def test_nothing_to_do_changes_nothing():
    state, tokens = dense_call()
    tokens = [x[:0] if x.ndim > 1 else x for x in tokens]
    after, out = replay_update(state, *tokens, slots=np.zeros(0, np.int32))
    assert out.shape == (0, 4, 4, 32)
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, state, after))


def test_vmap_is_a_loop(path):
    state, tokens = dense_call()
    calls = [(state, tokens)]
    calls.append(jax.tree.map(lambda x: x[::-1] if x.ndim > 2 else x, calls[0]))
    update = functools.partial(replay_update, implementation=path)
    axes = [0 if x.ndim > 1 else None for x in tokens]
    states, (first, second) = zip(*calls, strict=True)
    both = [
        x if axis is None else jnp.stack([x, y])
        for axis, x, y in zip(axes, first, second, strict=True)
    ]
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    got = jax.vmap(update, in_axes=(0, *axes))(many, *both)
    for i, (state, tokens) in enumerate(calls):
        mine, want = jax.tree.map(lambda x: x[i], got), update(state, *tokens)  # noqa: B023
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(want), strict=True):
            assert testing.relative_error(x, y) < 1e-6


@pytest.mark.parametrize(("window", "T"), [(16, 1), (16, 4), (32, 1), (32, 4)])
def test_rows_fold_at_every_place_of_the_ring(window, T, path):
    """A slot for each: its state stays that of writing every token."""
    state, tokens = dense_call(window, T, act_dtype="float32")
    start = jnp.arange(window, dtype=jnp.int32)
    state = ReplayState.from_dense(
        state.checkpoint,
        num_key_heads=state.k.shape[1],
        window=window,
        key_dtype=jnp.float32,
    )._replace(start=start)
    pool, step = jnp.array(state.checkpoint), update(path)
    every = jax.jit(functools.partial(gdn_jax.fused_update, implementation="xla"))
    places = set()
    for number in range(window // T + 2):
        _, tokens = dense_call(window, T, seed=number, act_dtype="float32")
        before = np.array(state.committed)
        state, out = step(state, *tokens)
        pool, want = every(pool, *tokens)
        error = testing.relative_error(state.to_dense(), pool)
        assert error < tolerance("state", "float32", path)
        error = testing.relative_error(out, want)
        assert error < tolerance("out", "float32", path)
        places |= set(np.asarray(state.start)[state.committed < before].tolist())
    assert places == set(range(window))


@pytest.mark.parametrize("way", ["reference", "xla", "interpret"])
def test_it_has_no_gradient_and_says_so(way):
    state, tokens = dense_call(2, 3, act_dtype="float32")

    def total(v):
        call = *tokens[:2], v, *tokens[3:]
        return replay_update(state, *call, implementation=way)[1].sum()

    with pytest.raises(NotImplementedError, match="Train with chunk_update"):
        jax.grad(total)(tokens[2])


def _over_heads(mesh, implementation):
    """Of the counters every part has all."""
    heads, last = P(None, "h"), P(None, None, "h")
    leaves = dict.fromkeys(("start", "committed", "pending"), P())
    of_state = ReplayState(*[leaves.get(name, heads) for name in ReplayState._fields])
    return jax.shard_map(
        functools.partial(replay_update, implementation=implementation),
        mesh=mesh,
        in_specs=(of_state, last, last, last, P("h"), last, last, P("h")),
        out_specs=(of_state, last),
    )


def test_heads_shard():
    state, tokens = dense_call(2, 3, H=2, HV=4, act_dtype="float32")
    mesh = jax.make_mesh((2,), ("h",), axis_types=(jax.sharding.AxisType.Auto,))
    got = jax.jit(_over_heads(mesh, "xla"))(state, *tokens)
    want = replay_update(state, *tokens)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert testing.relative_error(x, y) < 1e-6


def test_the_kernels_lower_for_cuda_where_heads_shard():
    mesh = AbstractMesh(
        (2,),
        ("h",),
        axis_types=(jax.sharding.AxisType.Auto,),
        abstract_device=aot.ABSTRACT_H200.abstract_device,
    )
    state, tokens = dense_call(2, 3, H=2, HV=4, act_dtype="float32")
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(_over_heads(mesh, "triton")).trace(state, *tokens)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(aot.KERNEL_CALL) == 2
