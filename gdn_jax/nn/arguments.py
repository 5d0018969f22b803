"""Checks of a layer's fields and of its calls, and what paths are chosen by."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from gdn_jax.nn.projections import LAYOUTS
from gdn_jax.nn.state import GatedDeltaNetState
from gdn_jax.ops import checks
from gdn_jax.ops.batch import Batch
from gdn_jax.ops.gated_delta.replay_state import WINDOWS, ReplayState
from gdn_jax.ops.gated_rms_norm.api import ACTIVATIONS
from gdn_jax.ops.layer_step.call import LAYOUTS as LAYOUTS_OF_STEPS
from gdn_jax.ops.layer_step.call import pool_of
from gdn_jax.ops.layer_step.tuning import MEASURED_WINDOW, Step, pays

PATHS = ("fused", "chunk")
# Dense rows up to here are walked token by token: a chunk would be mostly empty.
LONGEST_FUSED = 16


def check_fields(layer: Any) -> None:
    for name in (
        "hidden_size",
        "num_key_heads",
        "num_value_heads",
        "key_head_dim",
        "value_head_dim",
        "conv_width",
    ):
        checks.count(name, getattr(layer, name), "It is an axis.")
    if layer.gate_rank is not None:
        remedy = "None projects `a` and `z` by one matrix each."
        checks.count("gate_rank", layer.gate_rank, remedy)
    if layer.num_value_heads % layer.num_key_heads:
        checks.fail(
            "num_value_heads",
            layer.num_value_heads,
            f"a multiple of num_key_heads = {layer.num_key_heads}",
            "Value head i reads key head i // (HV // H).",
        )
    if layer.layout not in LAYOUTS:
        wanted = f"one of {', '.join(LAYOUTS)}"
        checks.fail("layout", repr(layer.layout), wanted, "See the class.")
    if layer.output_activation not in ACTIVATIONS:
        got, wanted = repr(layer.output_activation), f"one of {', '.join(ACTIVATIONS)}"
        checks.fail("output_activation", got, wanted, "See gated_rms_norm.")
    for name in ("dtype", "param_dtype"):
        checks.float_dtype(name, getattr(layer, name), "The layer is of floats.")
    apart = layer.per_key_decay or layer.gate_rank is not None
    if layer.layout == "interleaved" and apart:
        checks.fail(
            "layout",
            "'interleaved' with per_key_decay or gate_rank",
            "'flat' or 'separate' there",
            "Interleaved, `a` and `z` have no matrix of their own.",
        )


def check_tokens(x: Array, hidden_size: int) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        remedy = "Embed or cast it first; the layer casts to its own dtype."
        checks.fail("x", x.dtype, "of a floating dtype", remedy)
    if x.ndim not in (2, 3) or x.shape[-1] != hidden_size:
        D = hidden_size
        wanted = f"[N, T, {D}] (dense) or [L, {D}] (packed)"
        checks.fail("x", x.shape, wanted, "The last axis is the layer's hidden_size.")


def check_pools(num_slots: int, num_conv_slots: int, recurrent_dtype: Any) -> None:
    for name, x in dict(num_slots=num_slots, num_conv_slots=num_conv_slots).items():
        checks.count(name, x, "One a sequence, or the slots of a pool.")
    remedy = "The rule computes in float32 whatever it is."
    checks.float_dtype("recurrent_dtype", recurrent_dtype, remedy)


def check_begins_from_zeros(given: Batch) -> None:
    for name in ("slots", "num_accepted", "has_state"):
        if getattr(given, name) is not None:
            remedy = "Make one with layer.init_state."
            checks.fail("state", "None", f"given where {name} is", remedy)


DECODES = ("in_place", "checkpoints", "replay")


def check_decode(decode: str | None, columns: int) -> None:
    if decode not in (None, *DECODES):
        wanted = f"None or one of {', '.join(DECODES)}"
        checks.fail("decode", repr(decode), wanted, "None chooses.")
    if decode == "in_place" and columns > 1:
        wanted = f"'checkpoints' or 'replay' with {columns - 1} drafts"
        remedy = "In place there is no state to go back to when drafts are rejected."
        checks.fail("decode", "'in_place'", wanted, remedy)


def window_of(columns: int) -> int:
    """R of a replay state, whose records hold a speculative step."""
    fitting = [window for window in WINDOWS if window >= columns]
    if not fitting:
        wanted = f"at most {WINDOWS[-1]} with decode='replay'"
        remedy = "It is S, 1 + drafts: a step's tokens are records of the state."
        checks.fail("columns", columns, wanted, remedy)
    return fitting[0]


def choose_path(path: str | None, x: Array, given: Batch, *, replay: bool) -> str:
    speculative = given.num_accepted is not None
    if path not in (None, *PATHS):
        wanted = f"None or one of {', '.join(PATHS)}"
        checks.fail("path", repr(path), wanted, "None chooses by the call's form.")
    if path == "chunk" and speculative:
        remedy = "Leave it out: verification keeps a state for every token."
        checks.fail("path", "'chunk'", "'fused' with num_accepted", remedy)
    single = x.shape[1] == 1 if x.ndim == 3 else given.cu_seqlens is None
    if path == "fused" and replay and not (single or speculative):
        remedy = "Leave it out: several tokens would stay pending in a replay state."
        checks.fail("path", "'fused'", "'chunk' without num_accepted", remedy)
    if path is not None:
        return path
    short = x.ndim == 3 and x.shape[1] <= LONGEST_FUSED and not replay
    return "fused" if speculative or short or single else "chunk"


def steps_at_once(
    layer: Any,
    x: Array,
    state: GatedDeltaNetState,
    given: Batch,
    implementation: str | None,
) -> bool:
    """Whether `fused_layer_step` can take a call on the fused path, and was measured to
    be faster."""
    known = layer.layout in LAYOUTS_OF_STEPS and layer.gate_rank is None
    if layer.per_key_decay or not known:
        return False
    rows, tokens, _ = checks.rows_of(x.shape[:-1], given.cu_seqlens)
    columns = state.conv.buffer.shape[2] - layer.conv_width + 1
    pool = jnp.asarray(pool_of(state.recurrent))
    HV, V, K = pool.shape[1:]
    sizes = layer.num_key_heads, HV, K, V, pool.dtype.name
    verifies = given.num_accepted is not None
    act = jnp.dtype(layer.dtype).name
    recurrent: Any = state.recurrent
    replay = isinstance(recurrent, ReplayState)
    window = recurrent.window if replay else MEASURED_WINDOW
    step = Step(rows, tokens, columns, verifies, *sizes, replay, act, window)
    return pays(implementation, x, step)
