"""What a module knows of others that have the rest of its heads, experts or columns."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from gdn_jax.ops.few_rows.call import total
from gdn_jax.ops.routing.call import Routes
from gdn_jax.sharding.grid import own_groups


@dataclasses.dataclass(frozen=True)
class Split:
    """That a module is one of several parts, each on a device, inside of `shard_map`.

    Attributes:
      axes: of the mesh, over which the parts lie.
      parts: how many there are.
      vocab: whether each has a part of the vocabulary; else all of it.
    """

    axes: tuple[str, ...]
    parts: int
    vocab: bool = False

    def own_routes(self, routes: Routes) -> Routes:
        """With the rows of this device's experts first, and as many groups as it has;
        the other rows are of none, so that products make zeros of them."""
        sizes, first = own_groups(routes.group_sizes, self.axes)
        rows = routes.token.shape[0]
        return routes._replace(
            place=(routes.place - first) % rows,
            token=jnp.roll(routes.token, -first),
            group_sizes=sizes,
        )

    def embedded(self, table: Array, tokens: Array) -> Array:
        """Rows of a table of which each device has a part."""
        size = table.shape[0]
        own = jnp.clip(tokens, 0, size * self.parts - 1)
        own -= lax.axis_index(self.axes) * size
        x = jnp.take(table, own, axis=0, mode="clip")
        is_own = (own >= 0) & (own < size)
        return lax.psum(jnp.where(is_own[..., None], x, 0), self.axes)

    def gathered(self, logits: Array) -> Array:
        """[..., all], of each device's part of the last axis."""
        return lax.all_gather(logits, self.axes, axis=logits.ndim - 1, tiled=True)


def summed(parts: Array, split: Split | None, dtype: object) -> Array:
    """Parts [S ..] of y: as they are, or [1 ..], summed over the devices too. Rounded
    to the activations' dtype before they are sent: that is half of float32's bytes."""
    if split is None:
        return parts
    return lax.psum(total(parts, dtype), split.axes)[None]
