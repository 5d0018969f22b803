"""A Gated DeltaNet layer whose heads devices share out, and its sequences."""

from __future__ import annotations  # so that help() names types and expands none

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from gdn_jax.nn.gated_delta_net import GatedDeltaNet
from gdn_jax.nn.shares import Shares, is_traced
from gdn_jax.nn.split import Split, summed
from gdn_jax.nn.state import GatedDeltaNetState
from gdn_jax.ops import checks
from gdn_jax.sharding.grid import AXES, Axis, Grid, MeshAxes

PLACED = "Give what shard(layer.init(..)['params']) gives."
TABLES = ("slots", "conv_slots", "num_accepted", "has_state")


class ShardedLayer:
    """A layer on a mesh: one all-reduce, behind the last projection.

        >>> import jax, jax.numpy as jnp
        >>> from gdn_jax import nn, sharding
        >>> layer = nn.GatedDeltaNet(64, 2, 4, 16, 16)
        >>> x = jax.random.normal(jax.random.key(0), (2, 6, 64))
        >>> params = layer.init(jax.random.key(1), x)["params"]
        >>> shared = nn.ShardedLayer(layer, sharding.make_mesh(model=1))
        >>> y, state = jax.jit(shared.apply)({"params": shared.shard(params)}, x)

    Gradients are those of one device. Where several devices have a key head, its
    parameters are there as often, and each copy has the gradient of all.

    Args:
      layer: what is shared out.
      mesh: with axes of type Auto.
      axes: which logical axis is split over which of the mesh's; see `sharding.AXES`.

    Raises:
      ValueError: the devices cannot share it out; the text names the sizes that could.
    """

    def __init__(
        self, layer: GatedDeltaNet, mesh: Mesh, axes: Mapping[str, MeshAxes] = AXES
    ):
        self.layer, self.grid = layer, Grid(mesh, axes)
        H, HV = layer.num_key_heads, layer.num_value_heads
        self.grid.check(
            Axis("gdn_value_heads", "layer.num_value_heads", HV),
            Axis("gdn_key_heads", "layer.num_key_heads", H, HV),
        )
        over, parts = (
            self.grid.over("gdn_value_heads"),
            self.grid.parts("gdn_value_heads"),
        )
        if over != self.grid.over("gdn_key_heads"):
            remedy = "A value head reads a key head of its own device."
            checks.fail("axes", dict(axes), "one mesh axis for both of heads", remedy)
        self.split = Split(over, parts) if parts > 1 else None
        own: dict[str, Any] = dict(num_key_heads=-(-H // parts))
        self.part = layer.clone(num_value_heads=HV // parts, **own)
        self.shares = Shares(mesh, self.split, layer.heads)

    @functools.cached_property
    def targets(self) -> dict[str, Any]:
        """Each parameter's box, by its path."""
        x = jax.ShapeDtypeStruct((1, 1, self.layer.hidden_size), jnp.float32)
        boxes = jax.eval_shape(self.layer.init, jax.random.key(0), x)["params"]
        return flatten_dict(boxes, sep="/")

    def shard(self, params: Any) -> Any:
        """The layer's parameters, put where they belong on the mesh."""
        arrays = self._flat(params, "Give layer.init(..)['params'].")
        placed = {
            path: self.shares.place(
                path,
                box.names,
                box.value.shape,
                functools.partial(_part_of, arrays[path]),
            )
            for path, box in self.targets.items()
        }
        return unflatten_dict(placed, sep="/")

    def _flat(self, params: Any, remedy: str) -> dict[str, Any]:
        arrays = flatten_dict(meta.unbox(params), sep="/")
        if arrays.keys() != self.targets.keys():
            checks.fail("params", sorted(arrays), f"{sorted(self.targets)}", remedy)
        return arrays

    def _check_params(self, params: Any) -> dict[str, Any]:
        remedy, arrays = PLACED, self._flat(params, PLACED)
        names = {path: box.names for path, box in self.targets.items()}
        for path, box in self.targets.items():
            wanted = self.shares.shape(path, box.names, box.value.shape)
            if jnp.shape(arrays[path]) != wanted:
                got = jnp.shape(arrays[path])
                checks.fail(f"params/{path}", got, f"{wanted} on the mesh", remedy)
        if not is_traced(params):
            self.shares.check_places(arrays, names, remedy)
        return arrays

    def init_state(self, num_slots: int, **keywords: Any) -> GatedDeltaNetState:
        """As `GatedDeltaNet.init_state`; every device makes its own part."""
        groups = self.grid.parts("rows")
        others = keywords.get("num_conv_slots")
        rows = dict(num_slots=num_slots)
        if others is not None:
            rows["num_conv_slots"] = others
            keywords |= dict(num_conv_slots=others // groups)
        self.grid.check(*(Axis("rows", *each) for each in rows.items()))
        make = functools.partial(self.part.init_state, num_slots // groups, **keywords)
        return jax.jit(self.grid.run(make, (), self._specs(jax.eval_shape(make))))()

    def apply(
        self,
        variables: Any,
        x: Array,
        state: GatedDeltaNetState | None = None,
        **keywords: Any,
    ) -> tuple[Array, GatedDeltaNetState]:
        """As `GatedDeltaNet.apply`. Groups of devices share sequences out in order, and
        a sequence's slots are in its group's part of the pools; one of another part is
        null.

        Parameters are as `shard` gives them. The layer's own may be of the same shapes,
        with columns in another order: they are refused where they are there to look at,
        and under `jax.jit`, which does not say where its arguments lie, give wrong
        numbers.

        Raises:
          ValueError: the groups cannot share the sequences out, or the parameters do
            not lie where the layer's do.
        """
        params = self._check_params(variables["params"])
        tables = {k: keywords.pop(k) for k in TABLES if keywords.get(k) is not None}
        if self.grid.parts("rows") > 1 and keywords.get("cu_seqlens") is not None:
            remedy = "Give rows of one length, padded."
            checks.fail("cu_seqlens", "given", "None with several groups", remedy)
        arrays = dict(x=x, **tables)
        rows = ((f"{name}'s axis 0", len(array)) for name, array in arrays.items())
        self.grid.check(*(Axis("rows", *each) for each in rows))

        def run(variables: Any, state: Any, arrays: dict[str, Any]) -> Any:
            call = keywords | self._own_slots(state, arrays, keywords)
            x = call.pop("x")
            parts, new = self.part.apply(variables, x, state, method="parts", **call)
            return summed(parts, self.split, self.layer.dtype)[0], new

        rows = PartitionSpec(self.grid.over("rows") or None)
        state_specs = PartitionSpec() if state is None else self._specs(state)
        flat = {k: self.shares.spec(k, box.names) for k, box in self.targets.items()}
        specs = dict(params=unflatten_dict(flat, sep="/")), state_specs, rows
        new = self._specs(self._from_zeros(x)) if state is None else state_specs
        boxes = {k: (box.names, box.value.shape) for k, box in self.targets.items()}
        variables = dict(params=unflatten_dict(self.shares.tied(params, boxes), "/"))
        return self.grid.run(run, specs, (rows, new))(variables, state, arrays)

    def _from_zeros(self, x: Array) -> Any:
        """Of the form that the state has which a call without one gives."""
        rows = x.shape[0]
        return jax.eval_shape(lambda: self.layer.init_state(rows))

    def _own_slots(
        self, state: Any, arrays: dict[str, Any], keywords: dict[str, Any]
    ) -> dict[str, Any]:
        """The arrays, with slots counted from the first of this group's part of each
        pool."""
        if state is None or "slots" not in arrays or self.grid.parts("rows") == 1:
            return dict(arrays)
        recurrent = jax.tree.leaves(state.recurrent)[0].shape[0]
        sizes = dict(slots=recurrent, conv_slots=state.conv.start.shape[0])
        null_slot = keywords.get("null_slot")
        tables, null_slot = self.grid.own_slots(arrays, sizes, null_slot)
        return tables | dict(null_slot=null_slot)

    def _specs(self, state: Any) -> Any:
        rows = self.grid.over("rows") or None
        heads = PartitionSpec(rows, self.grid.over("gdn_value_heads") or None)
        return jax.tree.map(
            lambda x: PartitionSpec(rows) if x.ndim == 1 else heads, state
        )


def _part_of(array: Any, region: Any) -> np.ndarray:
    return np.asarray(array[region])
