"""Which axes of arrays are split over which of a mesh's: one table for everything."""

from __future__ import annotations  # so that help() names types and expands none

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, PartitionSpec
from jax.typing import ArrayLike

from gdn_jax.ops import checks

MeshAxes = str | tuple[str, ...] | None

# Logical axes to a mesh's. No array of an op has two that lie over the same of the
# mesh's; of two that a parameter has the first here is split.
AXES: Mapping[str, MeshAxes] = dict(
    rows="data",  # sequences of a call, and the slots of their states
    vocab="model",
    heads="model",  # of attention; of its keys and values:
    kv_heads="model",
    gdn_key_heads="model",
    gdn_value_heads="model",
    gdn_channels="model",  # by parts, see `by_parts`
    experts="model",
    mlp="model",
    embed=None,  # whole: every projection sums over it
)
MOST_SHOWN = 12  # sizes that an error names


def make_mesh(data: int = 1, model: int = 1, *, devices: Any = None) -> Mesh:
    """A mesh for `AXES`: `data` groups of `model` devices, which lie side by side.

    Args:
      devices: of all processes, `data * model` of them; None: the first of JAX's.

    Raises:
      ValueError: there are not as many.
    """
    devices = list(jax.devices() if devices is None else devices)
    checks.count("data", data, "It is a count of groups.")
    checks.count("model", model, "It is a count of devices.")
    if data * model > len(devices):
        remedy = "Take fewer, or start JAX with more."
        wanted = f"at most {len(devices)} devices together"
        checks.fail("data * model", data * model, wanted, remedy)
    kinds = (AxisType.Auto,) * 2
    names = ("data", "model")
    chosen = devices[: data * model]
    return jax.make_mesh((data, model), names, axis_types=kinds, devices=chosen)


class Axis(NamedTuple):
    """Something that devices are to share out.

    Attributes:
      name: the logical axis.
      what: as an error names it.
      size: how much of it there is.
      others: of key heads that may be several devices', the value heads.
    """

    name: str
    what: str
    size: int
    others: int = 0

    def fits(self, parts: int) -> bool:
        """Whether so many can share it: all have as much of it; or each key head is
        several parts' of whose value heads it is."""
        size, others = self.size, self.others
        return size % parts == 0 or (
            others > 0 and parts % size == 0 and others % parts == 0
        )


class Grid:
    """A mesh, and what of arrays is split over its axes; one that it lacks splits
    nothing.

    Raises:
      ValueError: it has none of them, or one is explicit; or rows lie over an axis that
        something else does.
    """

    def __init__(self, mesh: Mesh, axes: Mapping[str, MeshAxes] = AXES):
        self.mesh = mesh
        there = set(mesh.axis_names)
        self.axes = {
            name: tuple(axis for axis in names_of(value) if axis in there)
            for name, value in axes.items()
        }
        used = {axis for value in self.axes.values() for axis in value}
        if not used:
            wanted = {axis for value in axes.values() for axis in names_of(value)}
            _refuse_names(mesh, wanted)
        check_kinds(mesh, used)
        for name in self.axes.keys() - {"rows"}:
            if both := set(self.over("rows")) & set(self.over(name)):
                wanted = f"other axes of the mesh for rows than for {name}"
                remedy = "An array has both. Give one of the two an axis of its own."
                checks.fail("axes", f"{sorted(both)} for both", wanted, remedy)

    def parts(self, name: str | None) -> int:
        """Between how many an axis of this name is shared out."""
        return math.prod(self.mesh.shape[axis] for axis in self.over(name))

    def over(self, name: str | None) -> tuple[str, ...]:
        return self.axes.get(name, ()) if name else ()

    def index(self, name: str | None) -> Array | int:
        """Which part this device has, inside of shard_map."""
        return lax.axis_index(self.over(name)) if self.parts(name) > 1 else 0

    def own_slots(
        self, tables: Mapping[str, Array], sizes: Mapping[str, int], null_slot: Any
    ) -> tuple[dict[str, Array], Any]:
        """Tables of slots, counted from the first of this device's part of each pool,
        inside of shard_map: those of others' parts are null. And the null slot behind
        that: None, since one of all parts is in none of the others.

        Args:
          tables: some of `sizes`' or all; conv_slots are made of slots.
          sizes: slots of this device's part of each table's pool.
          null_slot: as in `fused_update`, which refuses what is none.
        """
        found = dict(tables)
        is_int = isinstance(null_slot, int | np.integer)
        if "slots" in found and is_int and not isinstance(null_slot, bool):
            slots = jnp.asarray(found["slots"])
            found["slots"] = jnp.where(slots == null_slot, -1, slots)
            null_slot = None
        if "slots" in found and "conv_slots" in sizes and "conv_slots" not in found:
            slots = jnp.asarray(found["slots"])
            found["conv_slots"] = slots if slots.ndim == 1 else slots[:, 0]
        for name in found.keys() & sizes.keys():
            there = found[name] - self.index("rows") * sizes[name]
            found[name] = jnp.where(found[name] < 0, -1, there)
        return found, null_slot

    def spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
        return PartitionSpec(*(self.over(name) or None for name in names))

    def run(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        """`function` on each device's own. Kernels' results have no types that say
        over what they vary, and the interpreter's can have none: so not checked."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )

    def check(self, *axes: Axis) -> None:
        """
        Raises:
          ValueError: the mesh's devices cannot share one of these out; with the sizes
            that all over the same of the mesh's axes allow.
        """
        for axis in axes:
            if not axis.fits(self.parts(axis.name)):
                self._refuse(axis, axes)

    def _refuse(self, axis: Axis, axes: tuple[Axis, ...]) -> None:
        over, parts = self.over(axis.name), self.parts(axis.name)
        beside = [each for each in axes if each.size and self.over(each.name) == over]
        most = min(max(each.size, each.others) for each in beside)
        possible = [
            str(n) for n in range(1, most + 1) if all(each.fits(n) for each in beside)
        ]
        names = " * ".join(map(repr, over))
        wanted = f"a multiple of the {parts} devices of the mesh's {names}"
        if axis.others:
            wanted += f", or a divisor of them where they divide {axis.others}, its "
            wanted += "readers"
        more = ", .." if len(possible) > MOST_SHOWN else ""
        shown = ", ".join(possible[:MOST_SHOWN]) + more
        remedy = f"Possible sizes of {names}: {shown}."
        if axis.name == "rows":  # of which there may be more, unlike heads
            remedy = f"The next multiple is {-(-axis.size // parts) * parts}. {remedy}"
        checks.fail(axis.what, axis.size, wanted, remedy)


def names_of(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def check_mesh(mesh: Mesh, axes: Mapping[str, MeshAxes]) -> None:
    """
    Raises:
      ValueError: the mesh lacks an axis, or one is explicit.
    """
    used = {name for value in axes.values() for name in names_of(value)}
    if lacking := used - set(mesh.axis_names):
        _refuse_names(mesh, lacking)
    check_kinds(mesh, used)


def _refuse_names(mesh: Mesh, lacking: set[str]) -> None:
    checks.fail(
        "mesh",
        f"axes {mesh.axis_names}",
        f"one with {', '.join(map(repr, sorted(lacking)))}",
        "Name the mesh's axis so, or say in axes=dict(..) which logical axis is "
        "split over which of the mesh's.",
    )


def check_kinds(mesh: Mesh, used: set[str]) -> None:
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(kinds[name] == AxisType.Explicit for name in used):
        remedy = "Make it with jax.make_mesh(.., axis_types=(AxisType.Auto,) * n)."
        checks.fail("mesh", "explicit axes", "of axis type Auto", remedy)


def by_parts(
    x: ArrayLike, sizes: tuple[int, ...], parts: int, *, axis: int = -1
) -> Array:
    """Reorders an axis of groups, such as [q | k | v], so that each of its `parts` has
    its share of every group: [q_0 | k_0 | v_0 | q_1 | k_1 | v_1 ..].

    Args:
      sizes: of the groups, each a multiple of `parts`.
    """
    x = jnp.asarray(x)
    if sum(sizes) != x.shape[axis] or any(size % parts for size in sizes):
        wanted = f"multiples of {parts} that add up to {x.shape[axis]}"
        checks.fail("sizes", sizes, wanted, "They are the groups of the axis.")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    groups = [jnp.split(group, parts, axis) for group in jnp.split(x, ends, axis)]
    shares = [share for part in zip(*groups, strict=True) for share in part]
    return jnp.concatenate(shares, axis)


def own_groups(group_sizes: Array, axes: tuple[str, ...]) -> tuple[Array, Array]:
    """Of rows that lie group after group, inside of shard_map: the sizes of the groups
    that this device has of all [E], and the first row of theirs."""
    own = group_sizes.shape[0] // lax.axis_size(axes)
    first = lax.axis_index(axes) * own
    before = jnp.arange(group_sizes.shape[0]) < first
    sizes = lax.dynamic_slice_in_dim(group_sizes, first, own)
    return sizes, jnp.sum(jnp.where(before, group_sizes, 0), dtype=jnp.int32)
