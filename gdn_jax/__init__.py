"""Gated DeltaNet for JAX on NVIDIA GPUs.

generate                    prompts to texts, with a model of gdn_jax.models
Engine                      what it runs on: continuous batching, streamed and saved
fused_update                one kernel: gates, norms, delta rule, read-out
chunk_update                the same in chunks: prefill and training
gates, recurrent_update     the same in two launches, for gates of your own
causal_conv1d, ConvState    the convolution before it, and its state in slots
gated_rms_norm              the norm behind it, with its output gate
grouped_dot                 rows by their groups' weights: a mixture of experts
SlotPool, copy_slots        who owns which slot of a pool; copies between slots
LaunchConfig, ChunkConfig,  a kernel's launch, to pin
ConvConfig, GroupedDotConfig
testing                     cases, an oracle, tolerances, check_slots

The first two need Flax, which is imported once they are asked for, as it is for
gdn_jax.nn and gdn_jax.models.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gdn_jax import testing
from gdn_jax.ops.causal_conv1d.api import causal_conv1d
from gdn_jax.ops.causal_conv1d.call import ConvState
from gdn_jax.ops.causal_conv1d.tuning import ConvConfig
from gdn_jax.ops.gated_delta.api import fused_update, recurrent_update
from gdn_jax.ops.gated_delta.chunk_api import chunk_update
from gdn_jax.ops.gated_delta.tuning import ChunkConfig, LaunchConfig
from gdn_jax.ops.gated_delta.unfused import gates
from gdn_jax.ops.gated_rms_norm.api import gated_rms_norm
from gdn_jax.ops.grouped_dot.api import grouped_dot
from gdn_jax.ops.grouped_dot.tuning import GroupedDotConfig
from gdn_jax.pool import SlotPool, copy_slots

if TYPE_CHECKING:
    from gdn_jax.generation.api import generate as generate
    from gdn_jax.generation.engine import Engine as Engine

__version__ = "0.1.0"
__all__ = [
    "ChunkConfig",
    "ConvConfig",
    "ConvState",
    "Engine",
    "GroupedDotConfig",
    "LaunchConfig",
    "SlotPool",
    "causal_conv1d",
    "chunk_update",
    "copy_slots",
    "fused_update",
    "gated_rms_norm",
    "gates",
    "generate",
    "grouped_dot",
    "recurrent_update",
    "testing",
]

_WITH_FLAX = dict(Engine="gdn_jax.generation.engine", generate="gdn_jax.generation.api")


def __getattr__(name: str) -> Any:
    if name not in _WITH_FLAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WITH_FLAX[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WITH_FLAX})
