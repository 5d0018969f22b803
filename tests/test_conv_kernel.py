"""The convolution's kernel: launches, what it leaves of a state, transformations."""

import functools
import itertools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import gdn_jax
from gdn_jax import ConvConfig, ConvState, testing

KERNELS = pytest.mark.parametrize(
    "kernel", ["interpret", pytest.param("triton", marks=pytest.mark.gpu)]
)
CONFIGS = [
    ConvConfig(tokens=4, ahead=2),
    ConvConfig(tokens=4, ahead=4, each=2),
    ConvConfig(tokens=8, ahead=4, parts=2),
    ConvConfig(tokens=32, ahead=8, each=2, parts=2, num_warps=2),
]


def _make(lengths, cu_seqlens=None, *, C=70, W=4, S=1, dtypes=("float32",) * 3):
    """A state with NaN in every slot that no row has, and packed tokens of rows that
    are plain, fresh and null in turn; NaN wherever nothing may be read."""
    random = np.random.default_rng(sum(lengths))
    N, ring = len(lengths), W - 1 + S
    P = 2 * N + 1
    slots = random.permutation(P)[:N].astype(np.int32)
    buffer = np.full((P, C, ring), np.nan)
    buffer[slots] = random.standard_normal((N, C, ring))
    buffer[slots[1::4]] = np.nan
    start = random.integers(0, ring, P).astype(np.int32)
    slots[2::4] = P
    begin = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    cu_seqlens = begin if cu_seqlens is None else np.array(cu_seqlens, np.int32)
    x = random.standard_normal((begin[-1] + 3, C))
    owned = np.zeros(len(x), bool)
    for n, (first, end) in enumerate(itertools.pairwise(cu_seqlens)):
        owned[first:end] |= n % 4 != 2
    x[~owned] = np.nan
    weight = random.standard_normal((C, W))
    x, weight, buffer = (
        jnp.asarray(a, d) for a, d in zip((x, weight, buffer), dtypes, strict=True)
    )
    kwargs = {
        "slots": slots,
        "cu_seqlens": cu_seqlens,
        "has_state": np.arange(N) % 4 != 1,
    }
    if S > 1:
        kwargs["num_accepted"] = random.integers(1, S + 1, N).astype(np.int32)
    return (ConvState(buffer, jnp.asarray(start)), x, weight), kwargs


def _agrees(args, kwargs, kernel, config=None):
    """With the oracle; its state to the bit, in slots that are not written as well."""
    call = functools.partial(gdn_jax.causal_conv1d, *args, **kwargs)
    state, y = call(implementation=kernel, config=config)
    want, want_y = call(implementation="reference")
    want = want.turned(args[0].start)
    assert np.array_equal(state.start, want.start)
    bits = (np.asarray(part.buffer).view(np.uint8) for part in (state, want))
    assert np.array_equal(*bits)
    assert testing.relative_error(y, want_y) < testing.TOLERANCE["out", y.dtype.name]
    assert not np.asarray(y)[np.asarray(want_y) == 0].any()


@KERNELS
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("S", [1, 4])
def test_any_launch_agrees_with_the_oracle(config, S, kernel):
    """Several blocks of tokens and of channels, the last of them not full."""
    _agrees(*_make((3, 1, 2, 0, 19, 33, 4, 1, 8), S=S), kernel, config)


@KERNELS
@pytest.mark.parametrize("config", [None, *CONFIGS], ids=str)
@pytest.mark.parametrize("split", [(32, 16, 22), (33, 1, 36)], ids=str)
def test_any_launch_writes_parts_as_it_does_the_whole(split, config, kernel):
    """Borders at multiples of a block's channels and within one."""
    args, kwargs = _make((3, 1, 2, 0, 19, 33, 4), S=2)
    call = functools.partial(
        gdn_jax.causal_conv1d, *args, **kwargs, implementation=kernel, config=config
    )
    (state, parts), (want, y) = call(split=split), call()
    assert tuple(part.shape[1] for part in parts) == split
    assert np.array_equal(jnp.concatenate(parts, axis=1), y)
    bits = (np.asarray(each.buffer).view(np.uint8) for each in (state, want))
    assert np.array_equal(*bits)


@KERNELS
@pytest.mark.parametrize("T", [1, 2, 9])
def test_any_launch_of_dense_rows_gives_the_same(T, kernel):
    """Blocks shorter than the filter too, where they hold a row."""
    random = np.random.default_rng(T)
    x = jnp.asarray(random.standard_normal((2, T, 70)), jnp.float32)
    weight = jnp.asarray(random.standard_normal((70, 4)), jnp.float32)
    state = ConvState.from_dense(jnp.asarray(random.standard_normal((2, 70, 3))))
    call = functools.partial(
        gdn_jax.causal_conv1d, state, x, weight, implementation=kernel
    )
    short = [ConvConfig(T, ahead=1), ConvConfig(T, T, each=4)] if T < 3 else []
    want = call()
    for config in CONFIGS + short:
        got = call(config=config)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.array_equal(a, b)


@KERNELS
@pytest.mark.parametrize(
    "cu_seqlens",
    [[0, 9, 9, 5, 5], [9, 0, 9, 0, 0], [4, 9, 1, 3, 3], [7, 9, 9, 9, 12], [0] * 5],
    ids=str,
)
def test_any_boundaries_agree_with_the_oracle(cu_seqlens, kernel):
    """Tokens before, between and behind the rows; boundaries that fall."""
    _agrees(*_make((3, 0, 4, 5), cu_seqlens), kernel, CONFIGS[1])


@KERNELS
@pytest.mark.parametrize(
    "dtypes",
    [
        ("bfloat16", "float32", "float16"),
        ("float16", "bfloat16", "bfloat16"),
        ("float32", "float16", "bfloat16"),
        ("bfloat16", "bfloat16", "float32"),
    ],
    ids=str,
)
def test_any_dtypes_agree_with_the_oracle(dtypes, kernel):
    _agrees(*_make((1, 1, 5, 0, 9), dtypes=dtypes), kernel)


@KERNELS
@pytest.mark.parametrize(("W", "C"), [(1, 7), (2, 256), (3, 100), (4, 1), (6, 48)])
def test_any_width_and_channels_agree_with_the_oracle(W, C, kernel):
    _agrees(*_make((1, 4, 2, 11, 40), C=C, W=W, S=2), kernel)


@KERNELS
def test_many_rows_are_searched_piece_by_piece(kernel, monkeypatch):
    monkeypatch.setattr("gdn_jax.ops.ragged.ROWS_AT_ONCE", 4)
    monkeypatch.setattr("gdn_jax.ops.ragged.PAIRS_AT_ONCE", 16)
    _agrees(*_make((3, 1, 2, 0, 19, 5, 4, 1, 8, 1, 1), C=8), kernel)


def test_implementations_take_each_others_states(path):
    """Prefill by one, decode by another."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, 9, 6)), jnp.float32)
    weight = jnp.asarray(random.standard_normal((6, 4)), jnp.float32)
    call = functools.partial(gdn_jax.causal_conv1d, weight=weight)
    _, want = call(ConvState.zeros(2, 6, 4, x.dtype), x, implementation="xla")
    state = ConvState.zeros(2, 6, 4, x.dtype)
    for t, name in enumerate((path, "xla", path, path, "reference", path)):
        tokens = x[:, :4] if t == 0 else x[:, t + 3 : t + 4]
        state, y = call(state, tokens, implementation=name)
        assert testing.relative_error(y[:, -1], want[:, t + 3]) < 1e-6


def _stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _convolve(path, args, kwargs):
    return gdn_jax.causal_conv1d(*args, **kwargs, implementation=path)


def _close(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.array_equal(np.isnan(x), np.isnan(y))
        assert testing.relative_error(jnp.nan_to_num(x), jnp.nan_to_num(y)) < 1e-6


def _calls():
    """Two calls alike but for their numbers."""
    for seed in (2, 3):
        args, kwargs = _make((seed, 1, 0, 5 - seed), [0, 3, 3, 5, 6], C=8)
        yield args, jax.tree.map(jnp.asarray, kwargs)


def test_vmap_equals_a_loop(path):
    calls, call = list(_calls()), functools.partial(_convolve, path)
    want = _stack([call(*given) for given in calls])
    _close(jax.jit(jax.vmap(call))(*_stack(calls)), want)


def test_vmap_broadcasts_an_unbatched_state(path):
    ((state, x, weight), kwargs), ((_, other, _), _) = _calls()

    def call(x):
        return _convolve(path, (state, x, weight), kwargs)

    x = jnp.stack([x, other])
    _close(jax.jit(jax.vmap(call))(x), _stack([call(tokens) for tokens in x]))


def test_gradients_equal_the_oracles(path):
    """Weighted by column, so that a state turned the wrong way is seen."""
    (state, x, weight), kwargs = next(_calls())

    def loss(name, buffer, x, weight):
        given = ConvState(buffer, state.start), x, weight
        new, y = _convolve(name, given, kwargs)
        dense = jnp.nan_to_num(new.to_dense(4))
        return jnp.sum(jnp.sin(y)) + jnp.sum(dense**2 * jnp.arange(1, 4))

    given = state.buffer, x, weight
    got, want = (
        jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1, 2)))(*given)
        for name in (path, "reference")
    )
    _close(got, want)


def test_scan_carries_the_state(path):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((6, 2, 1, 5)), jnp.float32)
    weight = jnp.asarray(random.standard_normal((5, 4)), jnp.float32)
    call = functools.partial(gdn_jax.causal_conv1d, weight=weight, implementation=path)
    state = ConvState.zeros(2, 5, 4, x.dtype)
    _, want = call(state, x[:, :, 0].swapaxes(0, 1))
    _, got = jax.jit(functools.partial(jax.lax.scan, call))(state, x)
    assert testing.relative_error(got[:, :, 0].swapaxes(0, 1), want) < 1e-6


BY_CHANNELS = (ConvState(P(None, "x"), P()), P(None, None, "x"), P("x"))
BY_ROWS = (ConvState(P("x"), P("x")), P("x"), P())
LAYOUTS = pytest.mark.parametrize(
    "specs", [BY_CHANNELS, BY_ROWS], ids=["channels", "rows"]
)


def _sharded(path, mesh, specs):
    """Pallas' interpreter fails the check, whatever the kernel."""
    return jax.shard_map(
        functools.partial(gdn_jax.causal_conv1d, implementation=path),
        mesh=mesh,
        in_specs=specs,
        out_specs=specs[:2],
        check_vma=path != "interpret",
    )


def _rows():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((4, 3, 8)), jnp.float32)
    weight = jnp.asarray(random.standard_normal((8, 4)), jnp.float32)
    return ConvState.zeros(4, 8, 4, x.dtype), x, weight


@LAYOUTS
def test_shards_equal_the_whole(specs, path):
    devices = jax.devices()[:4]  # one GPU is a mesh as well
    mesh = jax.make_mesh(
        (len(devices),), ("x",), axis_types=(AxisType.Auto,), devices=devices
    )
    want = gdn_jax.causal_conv1d(*_rows(), implementation=path)
    _close(jax.jit(_sharded(path, mesh, specs))(*_rows()), want)


@LAYOUTS
def test_the_kernel_lowers_for_cuda_inside_shard_map(specs):
    mesh = AbstractMesh(
        (4,),
        ("x",),
        axis_types=(AxisType.Auto,),
        abstract_device=aot.ABSTRACT_H200.abstract_device,
    )
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(_sharded("triton", mesh, specs)).trace(*_rows())
        assert aot.KERNEL_CALL in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_kernel_survives_export():
    args, kwargs = next(_calls())
    allowed = export.DisabledSafetyCheck.custom_call(aot.KERNEL_CALL)

    @jax.jit
    def convolve(state, x, weight, kwargs):  # a plain tuple: export knows no ConvState
        args = ConvState(*state), x, weight
        state, y = _convolve("triton", args, kwargs)
        return tuple(state), y

    make = export.export(convolve, platforms=["cuda"], disabled_checks=[allowed])
    with jax.sharding.use_abstract_mesh(aot.ABSTRACT_H200):
        data = make(tuple(args[0]), *args[1:], kwargs).serialize()
    assert aot.KERNEL_CALL in export.deserialize(data).mlir_module()
