"""The same bits again: of a call made twice, of many under load, and with the launch
pinned of a row alone and in any batch."""

import contextlib
import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from gdn_jax import ChunkConfig, ConvState, LaunchConfig, LayerStepConfig, ReplayState
from gdn_jax.ops.add_norm.api import add_norm
from gdn_jax.ops.cached_attention.api import cached_attention
from gdn_jax.ops.cached_attention.call import Inputs as Cached
from gdn_jax.ops.cached_attention.tuning import AttentionConfig
from gdn_jax.ops.causal_conv1d.tuning import ConvConfig
from gdn_jax.ops.few_rows.api import products
from gdn_jax.ops.gated_delta.replay_tuning import ReplayConfig
from gdn_jax.ops.routing.api import route

KERNELS = ["interpret", pytest.param("triton", marks=pytest.mark.gpu)]
W, S = 4, 4
# rows, H, HV, K, V: as much as fills a GPU, and as little as there is to interpret
SIZES = {"triton": (67, 4, 8, 128, 96), "interpret": (3, 1, 2, 16, 24)}


@dataclasses.dataclass(frozen=True)
class Op:
    """`make(draw, sizes)`: its state, arrays of each row [N, ...] and others.
    `call(state, rows, others, **options)`: (state, out [N, ...]). `config`: a launch
    that can be pinned; `slots`: whether a row's states lie in its "slots"."""

    make: Callable[..., Any]
    call: Callable[..., Any]
    config: Any = None
    slots: bool = True


class Draw:
    """Arrays from one seed."""

    def __init__(self):
        self.random = np.random.default_rng(0)

    def normal(self, *shape, dtype="bfloat16", size=1.0):
        return jnp.asarray(size * self.random.standard_normal(shape), dtype)

    def slots(self, N, columns=1):
        order = self.random.permutation(N * columns + 3)[: N * columns]
        return jnp.asarray(order.reshape(N, columns), jnp.int32)


def _rule(draw, sizes, T=1, columns=1, state_dtype="float32"):
    N, H, HV, K, V = sizes
    P = N * columns + 3
    state = draw.normal(P, HV, V, K, dtype=state_dtype, size=0.1)
    slots = draw.slots(N, columns)
    rows = dict(
        q=draw.normal(N, T, H, K),
        k=draw.normal(N, T, H, K),
        v=draw.normal(N, T, HV, V),
        a=draw.normal(N, T, HV),
        b=draw.normal(N, T, HV),
        slots=slots if columns > 1 else slots[:, 0],
    )
    if columns > 1:
        count = draw.random.integers(1, columns + 1, N)
        rows["num_accepted"] = jnp.asarray(count, jnp.int32)
    others = dict(A_log=draw.normal(HV, dtype="float32"), dt_bias=draw.normal(HV))
    return state, rows, others


def _update(state, rows, others, **options):
    return gdn_jax.fused_update(state, **rows, **others, **options)


def _ragged(draw, sizes):
    """Packed rows of 0 to S tokens, one after another at the places of whole ones."""
    state, rows, others = _rule(draw, sizes, T=S, columns=S)
    length = draw.random.integers(0, S + 1, sizes[0])
    return state, rows | {"length": jnp.asarray(length, jnp.int32)}, others


def _packed_update(state, rows, others, **options):
    rows = dict(rows)
    length = rows.pop("length")
    N, T = rows["q"].shape[:2]
    bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(length)])
    row = jnp.repeat(jnp.arange(N), length, total_repeat_length=N * T)
    at = jnp.arange(N * T) - bounds[row]
    is_own = jnp.arange(N * T) < bounds[-1]
    names = ("q", "k", "v", "a", "b")
    at = jnp.clip(at, 0, T - 1)
    tokens = {name: rows.pop(name)[row, at] for name in names}
    bounds = bounds.astype(jnp.int32)
    state, out = gdn_jax.fused_update(
        state, **tokens, **rows, **others, cu_seqlens=bounds, **options
    )
    whole = jnp.zeros((N, T, *out.shape[1:]), out.dtype)
    row = jnp.where(is_own, row, N)  # the tokens of nobody
    return state, whole.at[row, at].set(out, mode="drop")


def _gates(state, rows, others, **options):
    tokens = {name: rows[name] for name in ("q", "k", "v", "slots")}
    A_log, dt_bias = others["A_log"], others["dt_bias"]
    log_decay, beta = gdn_jax.gates(A_log, rows["a"], rows["b"], dt_bias, **options)
    gates = dict(log_decay=log_decay, beta=beta)
    return gdn_jax.recurrent_update(state, **tokens, **gates, **options)


def _chunks(state, rows, others, **options):
    return gdn_jax.chunk_update(state, **rows, **others, **options)


def _replay(draw, sizes):
    state, rows, others = _rule(draw, sizes, T=4)
    state = ReplayState.from_dense(state, num_key_heads=sizes[1])
    return state, rows, others


def _replay_updates(state, rows, others, **options):
    """As many as fold."""
    out = None
    for _ in range(6):
        count = jnp.where(state.pending[rows["slots"]] > 0, 3, 1)
        state, out = gdn_jax.replay_update(
            state, **rows, **others, num_accepted=count, **options
        )
    return state, out


def _ring(draw, P, C):
    start = jnp.asarray(draw.random.integers(0, W - 1 + S, P), jnp.int32)
    return ConvState(draw.normal(P, C, W - 1 + S), start)


def _conv(draw, sizes):
    N, C = sizes[0], 40 * sizes[2]
    count = draw.random.integers(1, S + 1, N)
    rows = dict(
        x=draw.normal(N, S, C),
        slots=draw.slots(N)[:, 0],
        num_accepted=jnp.asarray(count, jnp.int32),
    )
    return _ring(draw, N + 3, C), rows, dict(weight=draw.normal(C, W))


def _convolve(state, rows, others, **options):
    return gdn_jax.causal_conv1d(state, **rows, **others, **options)


def _layer(draw, sizes):
    N, H, HV, K, V = sizes
    pool, rule, others = _rule(draw, sizes, T=S, columns=S)
    C = 2 * H * K + HV * V
    rows = dict(
        qkvz=draw.normal(N, S, C + HV * V),
        ba=draw.normal(N, S, 2 * HV),
        slots=rule["slots"],
        num_accepted=rule["num_accepted"],
    )
    others |= dict(conv_weight=draw.normal(C, W), norm_weight=draw.normal(V))
    return (_ring(draw, len(pool), C), pool), rows, others


def _step(state, rows, others, **options):
    return gdn_jax.fused_layer_step(
        state, layout="interleaved", **rows, **others, **options
    )


def _cache(draw, sizes):
    N, kv_heads, heads, _, _ = sizes
    start = draw.random.integers(0, 200, N)
    rows = dict(
        q=draw.normal(N, 2, heads, 64),
        rows=draw.slots(N)[:, 0],
        start=jnp.asarray(start, jnp.int32),
    )
    k, v = (draw.normal(N + 3, kv_heads, 203, 64) for _ in range(2))
    return None, rows, dict(k=k, v=v)


def _attend(state, rows, others, **options):
    return state, cached_attention(Cached(**rows, **others), **options)


OPS = {
    "decode": Op(_rule, _update, LaunchConfig(8, 4, 2)),
    "bfloat16 state": Op(
        functools.partial(_rule, state_dtype="bfloat16"), _update, LaunchConfig(8, 2, 2)
    ),
    "verify": Op(
        functools.partial(_rule, T=S, columns=S), _update, LaunchConfig(8, 2, 1, 2)
    ),
    "verify, packed": Op(_ragged, _packed_update, LaunchConfig(8, 2, 2)),
    "unfused": Op(functools.partial(_rule, T=3), _gates),
    "chunks": Op(functools.partial(_rule, T=70), _chunks, ChunkConfig(16)),
    "replay": Op(_replay, _replay_updates, ReplayConfig(16, 32, 4, 1, 2)),
    "conv": Op(_conv, _convolve, ConvConfig(4, 2)),
    "layer step": Op(_layer, _step, LayerStepConfig(128, 2, 16)),
    "layer step, parts": Op(_layer, _step, LayerStepConfig(64, 2, 8, 2)),
    "attention": Op(_cache, _attend, AttentionConfig(2), slots=False),
}


def _bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def _made(name, kernel):
    op = OPS[name]
    options = dict(implementation=kernel, config=op.config)
    if op.config is None:
        del options["config"]
    return op, op.make(Draw(), SIZES[kernel]), options


def _calls(interpreted, names=OPS):
    """All compiled; interpreted, which takes its time, some."""
    for name in names:
        if name in interpreted:
            yield pytest.param(name, "interpret", id=name)
        gpu = pytest.mark.gpu
        yield pytest.param(name, "triton", marks=gpu, id=f"{name}-triton")


REPEATED = ("verify", "verify, packed", "unfused", "chunks", "conv", "attention")


@pytest.mark.parametrize(("name", "kernel"), list(_calls(REPEATED)))
def test_the_same_call_twice_gives_the_same_bits(name, kernel):
    """With the launch that a table or a heuristic gives."""
    op, arrays, _ = _made(name, kernel)
    call = jax.jit(functools.partial(op.call, implementation=kernel))
    first = _bits(call(*arrays))
    assert _bits(call(*arrays)) == first


@pytest.mark.parametrize("kernel", KERNELS)
def test_so_do_the_ops_around_them(kernel):
    draw, rows = Draw(), 29
    x, scores = draw.normal(rows, 256), draw.normal(rows, 64, dtype="float32")
    matrices, experts = [draw.normal(256, 48)], draw.normal(5, 256, 32)
    sizes = jnp.array([3, 0, 17, 1, 5], jnp.int32)

    @jax.jit
    def call(x, scores):
        run = dict(implementation=kernel)
        return (
            products(x, matrices, **run),
            gdn_jax.grouped_dot(x, experts, sizes, **run),
            route(scores, None, k=4, normalize=True, **run),
            add_norm(x, x[None], x[0], eps=1e-6, **run),
            gdn_jax.gated_rms_norm(x, x, x[0], implementation="xla"),
        )

    first = _bits(call(x, scores))
    assert all(_bits(call(x, scores)) == first for _ in range(3))


# Not those whose loops XLA on a CPU compiles by how many rows there are: it contracts
# products into sums in some of them.
INTERPRETED = ("decode", "verify, packed", "conv", "layer step, parts")
PINNED = [name for name, op in OPS.items() if op.config is not None]


@pytest.mark.parametrize(("name", "kernel"), list(_calls(INTERPRETED, PINNED)))
def test_with_its_launch_pinned_a_row_has_the_same_bits_in_any_batch(name, kernel):
    """Alone, in all others' midst in another order, and in half of them; of a 16-bit
    state too: what a row reads and writes is its own."""
    op, (state, rows, others), options = _made(name, kernel)
    call = jax.jit(functools.partial(op.call, **options))
    N = SIZES[kernel][0]
    new, out = call(state, rows, others)
    batches = [[n] for n in (0, N // 2, N - 1)]
    batches += [draw.tolist() for draw in _orders(N)]
    for batch in batches:
        some = jax.tree.map(lambda x, batch=batch: x[np.array(batch)], rows)
        got, got_out = call(state, some, others)
        for place, n in enumerate(batch):
            assert _bits(got_out[place]) == _bits(out[n]), (batch, n)
            if op.slots:
                own = np.ravel(rows["slots"][n])
                pair = [jax.tree.map(lambda x, own=own: x[own], y) for y in (got, new)]
                assert _bits(pair[0]) == _bits(pair[1]), (batch, n)


def _orders(N):
    random = np.random.default_rng(1)
    return random.permutation(N), random.permutation(N)[: (N + 1) // 2]


@contextlib.contextmanager
def _busy():
    """Copies to and from the GPU all the while, and where there is torch products in a
    stream of its own."""
    stop, faults = threading.Event(), []

    def until_stopped(work):
        def run():
            try:
                while not stop.is_set():
                    work()
            except Exception as fault:
                faults.append(fault)

        return threading.Thread(target=run, daemon=True)

    much = np.ones(2**23, np.float32)
    threads = [until_stopped(lambda: np.asarray(jax.device_put(much)))]
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

        if torch.cuda.is_available():
            stream, x = torch.cuda.Stream(), torch.ones(2048, 2048, device="cuda")

            def multiply():
                with torch.cuda.stream(stream):
                    for _ in range(20):
                        torch.mm(x, x)
                stream.synchronize()

            threads.append(until_stopped(multiply))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults, faults


STATEFUL = [name for name, op in OPS.items() if op.slots]


def _chain(call, arrays, steps, wait):
    """The bits that so many steps leave, each in the state of the one before."""
    state, *rest = arrays
    state = jax.tree.map(jnp.array, state)  # donated
    out = None
    for _ in range(steps):
        state, out = call(state, *rest)
        if wait:
            jax.block_until_ready(out)
    return _bits((state, out))


@pytest.mark.gpu
@pytest.mark.parametrize("name", STATEFUL)
def test_many_launches_leave_the_same_bits_under_load(name):
    """A race on the pool would show in some of them."""
    op, arrays, _ = _made(name, "triton")
    call = jax.jit(
        functools.partial(op.call, implementation="triton"), donate_argnums=0
    )
    want = _chain(call, arrays, 200, wait=True)
    with _busy():
        for _ in range(5):
            assert _chain(call, arrays, 200, wait=False) == want


def test_a_chain_of_steps_repeats():
    """What the test above does, interpreted and with little to do."""
    op, arrays, options = _made("verify", "interpret")
    call = jax.jit(functools.partial(op.call, **options), donate_argnums=0)
    want = _chain(call, arrays, 3, wait=True)
    with _busy():
        assert _chain(call, arrays, 3, wait=False) == want
