"""Where a model's parameters lie on a mesh."""

import math
from collections.abc import Mapping

from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gdn_jax.ops import checks

MeshAxes = str | tuple[str, ...] | None

# Parameters' logical axes to a mesh's: of two in one parameter the first here is split.
# Those that are not named are whole, such as "gdn_channels", whose parts q, k and v lie
# one after another.
AXES: Mapping[str, MeshAxes] = dict(
    vocab="model",
    heads="model",
    kv_heads="model",
    gdn_key_heads="model",
    gdn_value_heads="model",
    experts="model",
    mlp="model",
)


def check_mesh(mesh: Mesh, axes: Mapping[str, MeshAxes]) -> None:
    """
    Raises:
      ValueError: the mesh lacks an axis, or one is explicit.
    """
    used = {name for value in axes.values() for name in _names(value)}
    if lacking := sorted(used - set(mesh.axis_names)):
        checks.fail(
            "mesh",
            f"axes {mesh.axis_names}",
            f"one with {', '.join(map(repr, lacking))}",
            "Name the mesh's axis so, or say in axes=dict(..) which logical axis is "
            "split over which of the mesh's.",
        )
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(kinds[name] == AxisType.Explicit for name in used):
        remedy = "Make it with jax.make_mesh(.., axis_types=(AxisType.Auto,) * n)."
        checks.fail("mesh", "explicit axes", "of axis type Auto", remedy)


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
        if size % math.prod(mesh.shape[name] for name in _names(part)) == 0
        else None
        for size, part in zip(shape, spec, strict=True)
    )
    return NamedSharding(mesh, PartitionSpec(*spec))


def _names(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()
