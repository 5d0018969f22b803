"""Flax linen modules around the ops; `flax.nnx.bridge.ToNNX` makes NNX modules of them.

Imported by itself (`from gdn_jax import nn`), so that `import gdn_jax` needs no Flax.
"""

from gdn_jax.nn.gated_delta_net import GatedDeltaNet as GatedDeltaNet
from gdn_jax.nn.initializers import decay_rate as decay_rate
from gdn_jax.nn.initializers import time_step as time_step
from gdn_jax.nn.mlp import GatedMLP as GatedMLP
from gdn_jax.nn.moe import MixtureOfExperts as MixtureOfExperts
from gdn_jax.nn.sharded import ShardedLayer as ShardedLayer
from gdn_jax.nn.state import GatedDeltaNetState as GatedDeltaNetState
