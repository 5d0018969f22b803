"""Gated DeltaNet for JAX on NVIDIA GPUs."""

from gdn_jax import testing as testing
from gdn_jax.ops.gated_delta.api import fused_update as fused_update
from gdn_jax.ops.gated_delta.api import recurrent_update as recurrent_update
from gdn_jax.ops.gated_delta.tuning import LaunchConfig as LaunchConfig
from gdn_jax.ops.gated_delta.unfused import gates as gates
from gdn_jax.pool import SlotPool as SlotPool
from gdn_jax.pool import copy_slots as copy_slots
