"""Launches of a layer's step."""

from jax.experimental import pallas as pl

from gdn_jax.ops.gated_delta import tuning
from gdn_jax.ops.gated_delta.tuning import LaunchConfig
from gdn_jax.ops.layer_step.call import Heads


def heuristic(heads: Heads) -> LaunchConfig:
    """A head's whole state at once where registers hold it, by eight warps."""
    V, K = pl.next_power_of_2(heads.V), pl.next_power_of_2(heads.K)
    block_v = min(V, 32 * 8 * 32 // K)
    warps = min(8, block_v)
    return LaunchConfig(block_v, min(2, block_v // warps), 1, warps)


interpreter = tuning.interpreter
