"""Where a model's parameters lie on a mesh whose axes XLA partitions."""

import math
from collections.abc import Mapping

from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gdn_jax import sharding
from gdn_jax.sharding.grid import MeshAxes, names_of

# Those of parameters, in the same order: of two in one the first is split.
# "gdn_channels", whose parts q, k and v lie one after another, is whole here.
AXES: Mapping[str, MeshAxes] = {
    name: axes
    for name, axes in sharding.AXES.items()
    if name not in ("rows", "gdn_channels")
}


def find_sharding(
    mesh: Mesh,
    axes: Mapping[str, MeshAxes],
    names: tuple[str | None, ...],
    shape: tuple[int, ...],
) -> NamedSharding:
    """Of a parameter with logical axes `names`; an axis that the mesh's does not divide
    is not split."""
    spec = logical_to_mesh_axes(names, tuple(axes.items())) or ()
    spec = (
        part
        if size % math.prod(mesh.shape[name] for name in names_of(part)) == 0
        else None
        for size, part in zip(shape, spec, strict=True)
    )
    return NamedSharding(mesh, PartitionSpec(*spec))
