"""Gated DeltaNet for JAX on NVIDIA GPUs.

generate                    prompts to texts, with a model of gdn_jax.models
Engine                      what it runs on: continuous batching, streamed and saved
fused_update                one kernel: gates, norms, delta rule, read-out
chunk_update                the same in chunks: prefill and training
gates, recurrent_update     the same in two launches, for gates of your own
causal_conv1d, ConvState    the convolution before it, and its state in slots
fused_layer_step            convolution, rule and norm of a step in one launch
gated_rms_norm              the norm behind it, with its output gate
grouped_dot                 rows by their groups' weights: a mixture of experts
SlotPool, copy_slots        who owns which slot of a pool; copies between slots
replay_update, ReplayState  the same, with a state that is written once in many steps
LaunchConfig, ChunkConfig,  a kernel's launch, to pin
ConvConfig, ReplayConfig, GroupedDotConfig, LayerStepConfig
testing                     cases, an oracle, tolerances, check_slots

Each is imported once it is asked for: the first two need Flax, as gdn_jax.nn and
gdn_jax.models do, and the command line starts before JAX does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdn_jax import testing as testing
    from gdn_jax.generation.api import generate as generate
    from gdn_jax.generation.engine import Engine as Engine
    from gdn_jax.ops.causal_conv1d.api import causal_conv1d as causal_conv1d
    from gdn_jax.ops.causal_conv1d.call import ConvState as ConvState
    from gdn_jax.ops.causal_conv1d.tuning import ConvConfig as ConvConfig
    from gdn_jax.ops.gated_delta.api import fused_update as fused_update
    from gdn_jax.ops.gated_delta.api import recurrent_update as recurrent_update
    from gdn_jax.ops.gated_delta.chunk_api import chunk_update as chunk_update
    from gdn_jax.ops.gated_delta.replay_api import replay_update as replay_update
    from gdn_jax.ops.gated_delta.replay_state import ReplayState as ReplayState
    from gdn_jax.ops.gated_delta.replay_tuning import ReplayConfig as ReplayConfig
    from gdn_jax.ops.gated_delta.tuning import ChunkConfig as ChunkConfig
    from gdn_jax.ops.gated_delta.tuning import LaunchConfig as LaunchConfig
    from gdn_jax.ops.gated_delta.unfused import gates as gates
    from gdn_jax.ops.gated_rms_norm.api import gated_rms_norm as gated_rms_norm
    from gdn_jax.ops.grouped_dot.api import grouped_dot as grouped_dot
    from gdn_jax.ops.grouped_dot.tuning import GroupedDotConfig as GroupedDotConfig
    from gdn_jax.ops.layer_step.api import fused_layer_step as fused_layer_step
    from gdn_jax.ops.layer_step.tuning import LayerStepConfig as LayerStepConfig
    from gdn_jax.pool import SlotPool as SlotPool
    from gdn_jax.pool import copy_slots as copy_slots

__version__ = "0.1.0"

_MODULES = {
    "ChunkConfig": "ops.gated_delta.tuning",
    "ConvConfig": "ops.causal_conv1d.tuning",
    "ConvState": "ops.causal_conv1d.call",
    "Engine": "generation.engine",
    "GroupedDotConfig": "ops.grouped_dot.tuning",
    "LayerStepConfig": "ops.layer_step.tuning",
    "LaunchConfig": "ops.gated_delta.tuning",
    "ReplayConfig": "ops.gated_delta.replay_tuning",
    "ReplayState": "ops.gated_delta.replay_state",
    "SlotPool": "pool",
    "causal_conv1d": "ops.causal_conv1d.api",
    "chunk_update": "ops.gated_delta.chunk_api",
    "copy_slots": "pool",
    "fused_layer_step": "ops.layer_step.api",
    "fused_update": "ops.gated_delta.api",
    "gated_rms_norm": "ops.gated_rms_norm.api",
    "gates": "ops.gated_delta.unfused",
    "generate": "generation.api",
    "grouped_dot": "ops.grouped_dot.api",
    "recurrent_update": "ops.gated_delta.api",
    "replay_update": "ops.gated_delta.replay_api",
}

__all__ = [
    "ChunkConfig",
    "ConvConfig",
    "ConvState",
    "Engine",
    "GroupedDotConfig",
    "LaunchConfig",
    "LayerStepConfig",
    "ReplayConfig",
    "ReplayState",
    "SlotPool",
    "causal_conv1d",
    "chunk_update",
    "copy_slots",
    "fused_layer_step",
    "fused_update",
    "gated_rms_norm",
    "gates",
    "generate",
    "grouped_dot",
    "recurrent_update",
    "replay_update",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return importlib.import_module("gdn_jax.testing")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"gdn_jax.{_MODULES[name]}")
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
