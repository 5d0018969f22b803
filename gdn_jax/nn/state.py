"""What a layer carries from call to call."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from gdn_jax import _types as t
from gdn_jax.nn.projections import Heads
from gdn_jax.ops import checks
from gdn_jax.ops.batch import Batch
from gdn_jax.ops.causal_conv1d.call import ConvState
from gdn_jax.ops.gated_delta.replay_state import ReplayState, check_state
from gdn_jax.ops.tables import Pools


class GatedDeltaNetState(NamedTuple):
    """What a layer carries from call to call.

    Attributes:
      conv: the convolution's inputs, a slot for each sequence.
      recurrent: [N or P, HV, V, K], the rule's states, or a `ReplayState` of them.
    """

    conv: ConvState
    recurrent: t.State | ReplayState

    @property
    def is_replay(self) -> bool:
        return isinstance(self.recurrent, ReplayState)

    @property
    def slots_each(self) -> int:
        """Recurrent states a sequence: 1, or with checkpoints S."""
        if isinstance(self.recurrent, ReplayState):
            return 1
        return self.recurrent.shape[0] // self.conv.buffer.shape[0]


def zeros(
    heads: Heads,
    num_slots: int,
    num_conv_slots: int,
    *,
    width: int,
    dtype: Any,
    columns: int = 1,
    recurrent_dtype: Any = jnp.float32,
    window: int | None = None,
    per_key_decay: bool = False,
) -> GatedDeltaNetState:
    """With a `window` the rule's states are a `ReplayState`."""
    conv = ConvState.zeros(
        num_conv_slots, heads.channels, width, dtype, columns=columns
    )
    shape = (num_slots, heads.HV, heads.V, heads.K)
    recurrent = jnp.zeros(shape, recurrent_dtype)
    if window is not None:
        recurrent = ReplayState.from_dense(
            recurrent,
            num_key_heads=heads.H,
            window=window,
            key_dtype=dtype,
            per_key_decay=per_key_decay,
        )
    return GatedDeltaNetState(conv, recurrent)


def check_type(state: Any) -> GatedDeltaNetState:
    if not isinstance(state, GatedDeltaNetState):
        remedy = "Make one with layer.init_state."
        checks.fail("state", type(state).__name__, "a GatedDeltaNetState", remedy)
    return state


def pools_of(
    state: GatedDeltaNetState,
    channels: int,
    conv_width: int,
    given: Batch,
    null_slot: int | None,
    path: str,
) -> Pools:
    conv, recurrent = state
    if conv.buffer.ndim != 3 or conv.buffer.shape[1] != channels:
        wanted = f"[P, C, W - 1 + S] with C = {channels}, as this layer has"
        remedy = "Each layer has a state of its own: layer.init_state."
        checks.fail("state.conv.buffer", conv.buffer.shape, wanted, remedy)
    columns = conv.buffer.shape[-1] - conv_width + 1
    is_table = given.slots is not None and given.slots.ndim == 2
    if is_table and columns < given.slots.shape[-1]:
        checks.fail(
            "state.conv",
            f"{columns} columns for slots {given.slots.shape}",
            "of at least S columns",
            "Make the state with layer.init_state(.., columns=S).",
        )
    P = conv.buffer.shape[0]
    if isinstance(recurrent, ReplayState):
        check_state(recurrent)
        longest = recurrent.window if path == "fused" else None
        if given.num_accepted is not None:
            longest = min(columns, recurrent.window)
        num_slots = recurrent.start.shape[0]
        return Pools(P, num_slots, null_slot, columns, longest, recurrent.pending)
    return Pools(P, recurrent.shape[0], null_slot)
