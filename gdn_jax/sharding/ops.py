"""An op whose heads and rows the devices of a mesh share out."""

from __future__ import annotations  # so that help() names types and expands none

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from gdn_jax.ops import checks
from gdn_jax.sharding.grid import AXES, Axis, Grid, MeshAxes, own_groups
from gdn_jax.sharding.table import OPS, Names, Op, key_of, of_pools

COPIES = ("src", "dst")


def split(
    op: Callable[..., Any], mesh: Mesh, *, axes: Mapping[str, MeshAxes] = AXES
) -> Callable[..., Any]:
    """An op of this library as it is, but that a mesh's devices share it out.

        >>> import jax, jax.numpy as jnp
        >>> from gdn_jax import fused_update, sharding
        >>> mesh = sharding.make_mesh(model=1)      # of one device: data=1
        >>> step = jax.jit(sharding.split(fused_update, mesh), donate_argnums=0)
        >>> N, H, HV, K, V = 2, 2, 4, 16, 16
        >>> q = jnp.ones((N, H, K))
        >>> gates = jnp.zeros(HV), jnp.zeros((N, HV)), jnp.zeros((N, HV)), jnp.zeros(HV)
        >>> state = jnp.zeros((N, HV, V, K))
        >>> state, out = step(state, q, q, jnp.ones((N, HV, V)), *gates)

    Arguments are whole arrays, split over the mesh already or not, and so are results,
    which stay split. To be called under `jax.jit`.

    Heads: where there are fewer key heads than devices of their axis, each is several
    devices', if these divide the value heads; a `ReplayState` has a key head for each
    device then. Channels of a convolution, and `qkvz` and `ba` of a flat layout, lie by
    parts, see `by_parts`, as does a `ConvState`'s buffer.

    Rows: a row's slot lies in the same part of the pool as the row in the batch; one of
    another part is an error where slots are the host's, and null where they are a JAX
    array. `copy_slots` copies within a part: a pair of two parts is an error likewise,
    or skipped. A `SlotPool` for each part hands out its slots.
    Packed rows have `cu_seqlens` [parts, N / parts + 1], each part's own, and a
    `grouped_dot` `group_sizes` [parts, E].

    Rounding: with `state_rounding="stochastic"` each device folds its place on the mesh
    into `rounding_key`, over axes of more than one part. So the bits depend on the
    mesh, and are one device's on a mesh of one part alone.

    Experts: each device multiplies the rows of its own, and the results are summed over
    the devices, an all-reduce, which is the only one of an op.

    Args:
      op: one of `OPS`, such as `gdn_jax.fused_update`.
      mesh: with axes of type Auto.
      axes: which logical axis is split over which of the mesh's.

    Raises:
      ValueError: it is no such op, or the mesh has none of the axes; and at a call that
        an axis cannot be shared out, with the sizes of the mesh that could, or that
        slots would be copied from one part to another.
    """
    name = getattr(op, "__name__", repr(op))
    if name not in (*OPS, "copy_slots"):
        wanted = f"one of {', '.join((*OPS, 'copy_slots'))}"
        checks.fail("op", name, wanted, "Put others into jax.shard_map yourself.")
    grid, signature = Grid(mesh, axes), inspect.signature(op)

    @functools.wraps(op)
    def shared(*args: Any, **keywords: Any) -> Any:
        call = dict(signature.bind(*args, **keywords).arguments)
        if name != "copy_slots":
            _check_slots(grid, OPS[name].pools, call)
            return _run(op, OPS[name], grid, call)
        _check_copies(grid, call)
        return _run(op, of_pools(call["state"]), grid, call)

    return shared


def _run(op: Callable[..., Any], entry: Op, grid: Grid, call: dict[str, Any]) -> Any:
    named = {path.partition(".")[0] for path in entry.arrays}
    given = {k: v for k, v in call.items() if k in named and v is not None}
    static = {k: v for k, v in call.items() if k not in given}
    leaves, structure = jax.tree.flatten(given, is_leaf=lambda x: isinstance(x, list))
    paths = [
        ".".join(map(key_of, path))
        for path, _ in jax.tree_util.tree_leaves_with_path(
            jax.tree.unflatten(structure, leaves), is_leaf=lambda x: isinstance(x, list)
        )
    ]
    if not entry.arrays.keys() >= set(paths):
        op(**call)  # which says what is wrong
        wanted = f"among {', '.join(sorted(entry.arrays))}"
        checks.fail("arrays", ", ".join(paths), wanted, "Give what the op takes.")
    arrays = dict(zip(paths, map(jnp.asarray, leaves), strict=True))
    names = {path: _axes_of(path, arrays, entry.arrays[path]) for path in paths}
    order = list(given)  # an error names the first of a call's arguments
    in_order = sorted(paths, key=lambda path: order.index(path.partition(".")[0]))
    split_sizes = static.get("split")
    grid.check(
        *_key_heads(arrays),
        *(axis for path in in_order for axis in _shared(path, arrays, names, grid)),
        *(
            Axis("gdn_channels", f"split[{i}]", size)
            for i, size in enumerate(split_sizes or ())
        ),
    )
    arrays |= {path: _repeated(arrays[path], names[path], grid) for path in paths}
    specs = {path: grid.spec(names[path]) for path in paths}
    if split_sizes is not None:
        parts = grid.parts("gdn_channels")
        static["split"] = [size // parts for size in split_sizes]

    def local(*leaves: Array) -> Any:
        options, tables = dict(static), dict(zip(paths, leaves, strict=True))
        if (key := options.get("rounding_key")) is not None:
            options["rounding_key"] = _own_key(key, grid)
        tables = _own_tables(tables, entry, grid, options)
        own = jax.tree.unflatten(structure, [tables.pop(path) for path in paths])
        return _call(op, grid, options | own | tables)

    found: Any = jax.tree.unflatten(structure, specs.values())
    results = [_result_spec(path, specs, found) for path in entry.results]
    if call.get("per_token_states"):
        results[0] = results[1]
    out_specs = tuple(results) if results[1:] else results[0]
    return grid.run(local, tuple(specs.values()), out_specs)(*arrays.values())


def _key_heads(arrays: Mapping[str, Array]) -> list[Axis]:
    """Of a layer's step, whose channels alone say how many there are."""
    if "conv_weight" not in arrays:
        return []
    pool, weight = _first(arrays, "state.1"), arrays["conv_weight"]
    if pool.ndim != 4 or weight.ndim != 2:
        return []
    _, HV, V, K = pool.shape
    key_heads, rest = divmod(weight.shape[0] - HV * V, 2 * K)
    what = "key heads of conv_weight's channels"
    is_right = key_heads > 0 and rest == 0
    return [Axis("gdn_key_heads", what, key_heads)] if is_right else []


def _first(arrays: Mapping[str, Array], path: str) -> Array:
    """At that path, or of those under it: a `ReplayState`'s checkpoint."""
    return next(x for name, x in arrays.items() if f"{name}.".startswith(f"{path}."))


def _check_copies(grid: Grid, call: dict[str, Any]) -> None:
    """
    Raises:
      ValueError: a slot's copy would be in another part, as far as the host knows.
    """
    shapes = [jnp.shape(pool) for pool in jax.tree.leaves(call["state"])]
    if grid.parts("rows") == 1 or any(isinstance(call[x], Array) for x in COPIES):
        return
    try:
        src, dst = (np.asarray(call[name]) for name in COPIES)
    except jax.errors.TracerArrayConversionError:  # a list of them
        return
    P = min((shape[0] for shape in shapes if shape), default=0)
    if src.shape != dst.shape or P % grid.parts("rows"):
        return  # errors of their own
    own = P // grid.parts("rows")
    real = (src >= 0) & (src < P) & (dst >= 0) & (dst < P)
    if (across := real & (src // max(own, 1) != dst // max(own, 1))).any():
        pairs = [*zip(src[across].tolist(), dst[across].tolist(), strict=True)]
        wanted = f"of one part of the pool, of {own} slots each"
        remedy = "Devices keep their sequences: take a free slot of the same part."
        checks.fail("src and dst", checks.listed(map(str, pairs)), wanted, remedy)


def _check_slots(grid: Grid, pools: Mapping[str, str], call: dict[str, Any]) -> None:
    """
    Raises:
      ValueError: a row's slot is in another part, as far as the host knows.
    """
    parts, null_slot = grid.parts("rows"), call.get("null_slot")
    given = {name: call.get(name) for name in pools.keys() & {"slots", "conv_slots"}}
    for name, table in given.items():
        if parts == 1 or table is None or isinstance(table, Array):
            continue
        try:
            table = np.asarray(table)
        except jax.errors.TracerArrayConversionError:  # a list of them
            continue
        P = _slots_of(call["state"], pools[name])
        if table.ndim == 0 or P % parts or len(table) % parts:
            continue  # errors of their own
        own = max(P // parts, 1)
        part = np.arange(len(table)) // max(len(table) // parts, 1)
        part = part.reshape(-1, *(1,) * (table.ndim - 1))
        real = (table >= 0) & (table < P)
        if null_slot is not None:
            real &= table != null_slot
        if (across := real & (table // own != part)).any():
            pairs = [
                f"{n}: {table[n].tolist()}" for n in np.unique(np.where(across)[0])
            ]
            wanted = f"for each row of the part that it is in, of {own} slots each"
            remedy = "Take a free slot of the row's own part; -1 pads."
            checks.fail(name, f"for row {checks.listed(pairs)}", wanted, remedy)


def _slots_of(state: Any, path: str) -> int:
    """Of a pool of a call's state, by its path in the table."""
    for key in path.split(".")[1:]:
        state = state[int(key)] if key.isdigit() else getattr(state, key)
    return jnp.shape(jax.tree.leaves(state)[0])[0]


def _own_key(key: Any, grid: Grid) -> Any:
    """Another one on each device, where slots and heads are counted from 0: with one
    key all would draw alike."""
    dtype = getattr(key, "dtype", None)
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not is_key or key.shape:
        return key  # which the op refuses
    for axis in grid.over("rows") + grid.over("gdn_value_heads"):
        if grid.mesh.shape[axis] > 1:
            key = jax.random.fold_in(key, lax.axis_index(axis))
    return key


def _call(op: Callable[..., Any], grid: Grid, call: dict[str, Any]) -> Any:
    if op.__name__ != "grouped_dot" or grid.parts("experts") == 1:
        return op(**call)
    axes = grid.over("experts")
    sizes, first = own_groups(call["group_sizes"], axes)
    x = jnp.roll(call["x"], -first, axis=0)  # rows past the last group give zeros
    y = op(**call | dict(x=x, group_sizes=sizes))
    return lax.psum(jnp.roll(y, first, axis=0), axes)


def _axes_of(path: str, arrays: Mapping[str, Array], names: Names) -> Names:
    ndim = arrays[path].ndim
    if per_token := {"a": "b", "log_decay": "beta"}.get(path):  # KDA: K behind
        names += (None,) * (ndim - arrays[per_token].ndim)
    if ... not in names:
        return (names + (None,) * ndim)[:ndim]
    at = names.index(...)
    behind = names[at + 1 :][-ndim:] if ndim else ()
    return (*names[:at], *[None] * ndim)[: ndim - len(behind)] + behind


def _shared(
    path: str, arrays: Mapping[str, Array], names: Mapping[str, Names], grid: Grid
) -> Iterator[Axis]:
    """An array's axes that are to be shared out."""
    x = arrays[path]
    if path in ("cu_seqlens", "group_sizes") and grid.parts("rows") > 1:
        wanted = f"[{grid.parts('rows')}, ..], each part's own"
        if x.ndim != 2 or len(x) != grid.parts("rows"):
            checks.fail(path, x.shape, wanted, "Each part's tokens are its own rows'.")
    for axis, (name, size) in enumerate(zip(names[path], x.shape, strict=True)):
        if name is not None:
            repeats = name == "gdn_key_heads" and path in ("q", "k")
            others = arrays["v"].shape[-2] if repeats else 0
            yield Axis(name, f"{path}'s axis {axis} ({name})", size, others)


def _repeated(x: Array, names: Names, grid: Grid) -> Array:
    """With its key heads as often as several devices need each."""
    for axis, (name, size) in enumerate(zip(names, x.shape, strict=True)):
        if size % grid.parts(name):
            x = jnp.repeat(x, grid.parts(name) // size, axis)
    return x


def _own_tables(
    arrays: dict[str, Any], entry: Op, grid: Grid, options: dict[str, Any]
) -> dict[str, Any]:
    """With slots counted from the first of this device's part of the pool."""
    if grid.parts("rows") == 1:
        return arrays
    for path in arrays.keys() & {"cu_seqlens", "group_sizes"}:
        arrays[path] = arrays[path][0]
    sizes = {
        table: _first(arrays, pool).shape[0] for table, pool in entry.pools.items()
    }
    tables = {path: arrays[path] for path in arrays.keys() & sizes.keys()}
    null_slot = options.get("null_slot")
    tables, null_slot = grid.own_slots(tables, sizes, null_slot)
    if "null_slot" in options:
        options["null_slot"] = null_slot
    return arrays | tables


def _result_spec(path: str, specs: Mapping[str, PartitionSpec], found: Any) -> Any:
    if path in specs:
        return specs[path]
    whole = found[path]
    return whole if path == "state" else whole[0]
