"""Ops over the devices of a mesh: heads over one axis of it, sequences over another.

    AXES        which axes of arrays are split over which of a mesh's
    make_mesh   a mesh for them
    split       an op that a mesh's devices share out
    by_parts    the order of channels that they share

No op has anything to do with another head or another sequence, so that each device runs
the op on its own and nothing is sent. `gdn_jax.models.ShardedModel` does the same with
whole models, where sums over heads are all that is sent.
"""

from gdn_jax.sharding.grid import AXES as AXES
from gdn_jax.sharding.grid import MeshAxes as MeshAxes
from gdn_jax.sharding.grid import by_parts as by_parts
from gdn_jax.sharding.grid import make_mesh as make_mesh
from gdn_jax.sharding.ops import split as split
