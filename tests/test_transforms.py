"""JAX's transformations around the update: vmap, scan, shard_map, export."""

import dataclasses
import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import gdn_jax
from gdn_jax import testing

SMALL = dict(H=2, HV=4, K=8, V=4, act_dtype="float32")
SINGLE = testing.Case("decode", (1,) * 3, tokens="single", fresh=(1,), **SMALL)
PACKED = testing.Case(
    "packed",
    (2, 0, 3),
    tokens="packed",
    slots="checkpoints",
    columns=3,
    padding=1,
    **SMALL,
)
# for chunk_update: two chunks in a row, and a row of one
CHUNKED = testing.Case(
    "chunked", (66, 0, 3), tokens="packed", padding=1, fresh=(2,), **SMALL
)


def _make(case, seed=0):
    """Positional arguments, and the keyword arrays; the cases here have no options."""
    return jax.tree.map(jnp.asarray, testing.make(case, seed))


def _update(path, op="fused_update"):
    def update(args, arrays):
        return getattr(gdn_jax, op)(*args, **arrays, implementation=path)

    return update


def _close(got, want):
    got, want = (jax.tree.map(np.asarray, x) for x in (got, want))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.array_equal(np.isnan(x), np.isnan(y))  # poison stays where it was
        assert testing.relative_error(np.nan_to_num(x), np.nan_to_num(y)) < 1e-6


def _stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def test_vmap_equals_a_loop(path):
    calls = [_make(PACKED, seed) for seed in range(2)]
    update = jax.jit(_update(path))
    want = _stack([update(*call) for call in calls])
    _close(jax.jit(jax.vmap(_update(path)))(*_stack(calls)), want)


def test_vmap_broadcasts_an_unbatched_pool(path):
    """Only the tokens are batched: each entry has a copy of the pool."""
    (state, *first), arrays = _make(SINGLE)
    (_, *second), _ = _make(SINGLE, 1)

    def update(tokens):
        return _update(path)((state, *tokens), arrays)

    want = _stack([jax.jit(update)(tokens) for tokens in (first, second)])
    _close(jax.jit(jax.vmap(update))(_stack([first, second])), want)


def test_vmap_of_grad_equals_a_loop(path):
    def loss(args, arrays):
        state, out = _update(path)(args, arrays)
        return jnp.sum(out**2) + jnp.nansum(state**2)

    case = testing.Case("decode", (1,) * 2, tokens="single", **SMALL)
    calls = [_make(case, seed) for seed in range(2)]
    gradient = jax.jit(jax.grad(loss))
    want = _stack([gradient(*call) for call in calls])
    _close(jax.jit(jax.vmap(jax.grad(loss)))(*_stack(calls)), want)


def test_scan_carries_the_state(path):
    case = testing.Case("decode", (1,) * 3, tokens="single", **SMALL)
    (state, *tokens), arrays = _make(case)
    q, k, v, A_log, a, b, dt_bias = tokens

    def step(state, scale):
        args = (state, q * scale, k, v * scale, A_log, a, b, dt_bias)
        return _update(path)(args, arrays)

    scales = jnp.asarray([1.0, 0.5, 2.0])
    want, outs = state, []
    for scale in scales:
        want, out = jax.jit(step)(want, scale)
        outs.append(out)
    got = jax.jit(functools.partial(jax.lax.scan, step))(state, scales)
    _close(got, (want, jnp.stack(outs)))


def test_a_tuple_of_layers_goes_through_one_jit(path):
    """Each layer's pool is an array of its own, so that none is copied."""
    (state, q, k, v, *rest), arrays = _make(SINGLE)

    def model(states, v):
        new = []
        for layer in states:
            layer, v = _update(path)((layer, q, k, v, *rest), arrays)
            new.append(layer)
        return tuple(new), v

    states = (state, state * 2)
    first, middle = jax.jit(_update(path))((state, q, k, v, *rest), arrays)
    second, out = jax.jit(_update(path))((state * 2, q, k, middle, *rest), arrays)
    _close(jax.jit(model)(states, v), ((first, second), out))


HEADS = P(None, "x")
BY_HEADS = ((HEADS,) * 4 + (P("x"), HEADS, HEADS, P("x")), P())
BY_ROWS = ((P("x"),) * 4 + (P(), P("x"), P("x"), P()), P())
SHARDED_HEADS = dataclasses.replace(PACKED, H=4, HV=8)
SHARDED_ROWS = testing.Case("rows", (2,) * 4, slots="none", **SMALL)
SHARDED_CHUNKS = dataclasses.replace(CHUNKED, H=4, HV=8)
LAYOUTS = pytest.mark.parametrize(
    ("case", "specs", "op"),
    [
        (SHARDED_HEADS, BY_HEADS, "fused_update"),
        (SHARDED_ROWS, BY_ROWS, "fused_update"),
        (SHARDED_CHUNKS, BY_HEADS, "chunk_update"),
    ],
    ids=["heads", "rows", "heads, chunked"],
)
OPS = pytest.mark.parametrize(
    ("case", "op"), [(PACKED, "fused_update"), (CHUNKED, "chunk_update")]
)


def _mesh(size=4):
    devices = jax.devices()[:size]  # one GPU is a mesh as well
    return jax.make_mesh(
        (len(devices),), ("x",), axis_types=(AxisType.Auto,), devices=devices
    )


def _shard(update, mesh, specs, **kwargs):
    out = specs[0][0], specs[0][3]
    return jax.shard_map(update, mesh=mesh, in_specs=specs, out_specs=out, **kwargs)


@LAYOUTS
def test_shards_equal_the_whole(case, specs, op, path):
    call, update = _make(case), _update(path, op)
    # Pallas' interpreter fails the check, whatever the kernel.
    sharded = _shard(update, _mesh(), specs, check_vma=path != "interpret")
    _close(jax.jit(sharded)(*call), jax.jit(update)(*call))


@LAYOUTS
def test_gradients_of_shards_equal_the_wholes(case, specs, op):
    """Sharded rows add up the gradients of A_log and dt_bias, which they share."""

    def gradient(update):
        def loss(args, arrays):
            state, out = update(args, arrays)
            return jnp.sum(out**2) + jnp.nansum(state**2)

        return jax.jit(jax.grad(loss))

    call, update = _make(case), _update("xla", op)
    # On two cores four devices wait for each other for ever in the chunks' triangular
    # solves (jaxlib 0.10.2).
    sharded = _shard(update, _mesh(2), specs, check_vma=True)
    _close(gradient(sharded)(*call), gradient(update)(*call))


@LAYOUTS
def test_the_kernel_lowers_for_cuda_inside_shard_map(case, specs, op):
    mesh = AbstractMesh(
        (4,),
        ("x",),
        axis_types=(AxisType.Auto,),
        abstract_device=aot.ABSTRACT_H200.abstract_device,
    )
    sharded = _shard(_update("triton", op), mesh, specs, check_vma=True)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(sharded).trace(*_make(case))
        assert aot.KERNEL_CALL in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_kernel_lowers_for_cuda_under_vmap():
    calls = _stack([_make(PACKED, seed) for seed in range(2)])
    assert aot.KERNEL_CALL in aot.lower(jax.vmap(_update("triton")), *calls)


@OPS
def test_xla_survives_export(case, op):
    call, update = _make(case), jax.jit(_update("xla", op))
    data = export.export(update)(*call).serialize()
    _close(export.deserialize(data).call(*call), update(*call))


@OPS
def test_the_kernel_survives_export(case, op):
    """As in fused_update's docstring."""
    allowed = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    make = export.export(
        jax.jit(_update("triton", op)), platforms=["cuda"], disabled_checks=[allowed]
    )
    with jax.sharding.use_abstract_mesh(aot.ABSTRACT_H200):
        data = make(*_make(case)).serialize()
    restored = export.deserialize(data)
    assert restored.platforms == ("cuda",)
    assert aot.KERNEL_CALL in restored.mlir_module()


def test_numpy_inputs_equal_jax_arrays():
    update = jax.jit(_update("xla"))
    _close(update(*testing.make(SINGLE)), update(*_make(SINGLE)))


def test_a_call_outside_jit_equals_one_inside(path):
    call = _make(SINGLE)
    _close(_update(path)(*call), jax.jit(_update(path))(*call))


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_rows_shard_over_a_pool_that_every_device_holds(name):
    """The tokens vary over the mesh and the state does not: out, and its gradient."""
    case = dataclasses.replace(SHARDED_ROWS, slots="paged", lengths=(3,) * 4)
    args, kwargs = testing.make(case)
    state = jnp.nan_to_num(args[0])

    def update(state, q, k, v, A_log, a, b, dt_bias, slots):
        _, out = gdn_jax.fused_update(
            state, q, k, v, A_log, a, b, dt_bias, slots=slots, implementation=name
        )
        return out.astype(jnp.float32)

    rest = (*args[1:], kwargs["slots"])
    rows, whole = P("x"), P()
    specs = (whole, rows, rows, rows, whole, rows, rows, whole, rows)
    sharded = jax.shard_map(update, mesh=_mesh(), in_specs=specs, out_specs=rows)
    _close(jax.jit(sharded)(state, *rest), jax.jit(update)(state, *rest))

    def gradient(update):
        return jax.jit(jax.grad(lambda state: jnp.sum(update(state, *rest) ** 2)))(
            state
        )

    _close(gradient(sharded), gradient(update))
