"""The public step of a layer between its projections."""

from __future__ import annotations  # so that help() names types and expands none

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdn_jax import _dispatch, _triton
from gdn_jax.ops import checks, vjp
from gdn_jax.ops.batch import Batch
from gdn_jax.ops.causal_conv1d.call import ConvState
from gdn_jax.ops.gated_delta import arguments
from gdn_jax.ops.gated_delta.call import GateOptions
from gdn_jax.ops.gated_delta.call import Options as RuleOptions
from gdn_jax.ops.layer_step.call import (
    LAYOUTS,
    Heads,
    Inputs,
    Options,
    Projected,
    Weights,
)
from gdn_jax.ops.layer_step.chain import chain
from gdn_jax.ops.layer_step.triton import triton
from gdn_jax.ops.layer_step.tuning import (
    LayerStepConfig,
    Step,
    find_config,
    interpreter,
)
from gdn_jax.ops.tables import find_tables

Projections = ArrayLike | tuple[ArrayLike, ArrayLike]


def fused_layer_step(
    state: tuple[ConvState, ArrayLike],
    qkvz: Projections,
    ba: Projections,
    *,
    layout: str = "interleaved",
    conv_weight: ArrayLike,
    A_log: ArrayLike,
    dt_bias: ArrayLike,
    norm_weight: ArrayLike,
    eps: float = 1e-6,
    activation: str = "silu",
    slots: ArrayLike | None = None,
    conv_slots: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    num_accepted: ArrayLike | None = None,
    has_state: ArrayLike | None = None,
    null_slot: int | None = None,
    scale: float | None = None,
    qk_l2norm: bool = True,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    allow_neg_eigval: bool = False,
    gate_lower_bound: float | None = None,
    implementation: str | None = None,
    config: LayerStepConfig | None = None,
) -> tuple[tuple[ConvState, Array], Array]:
    """What a Gated DeltaNet layer does between its projections, in one launch:
    (state, out).

        q, k, v = silu(causal convolution of qkvz's channels)   (`causal_conv1d`)
        out = gated delta rule(q, k, v, a, b)                   (`fused_update`)
        out = RMS norm(out) * activation(z)                     (`gated_rms_norm`)

    For decoding and for verifying drafts, of at most as many tokens a row as the ring
    of `state[0]` has room for, S; prompts are for `chunk_update`. The projections are
    read where they lie: no split, copy or transpose is made of them.

    Args:
      state: (`ConvState` of C = 2 H K + HV V channels, [P or N, HV, V, K]). Donate it
        under `jax.jit` and both are updated in place.
      qkvz: [N, T, C + HV V] (dense) or [L, C + HV V] (packed), or two arrays, of q, k
        and v [.., C] and of z [.., HV V], where the layout is flat.
      ba: [.., 2 HV], or two arrays [.., HV], b and a.
      layout: "interleaved", by key heads, each with its q, k, v and z, and its b and a
        (Qwen3-Next); or "flat", all q, then all k, v and z, and all b before all a
        (Qwen3.5).
      conv_weight: [C, W].
      A_log, dt_bias: [HV].
      norm_weight: [V].
      eps, activation: as in `gated_rms_norm`.
      slots, cu_seqlens, num_accepted, has_state, null_slot: as in `fused_update`.
      conv_slots: [N] int32, each row's slot of the convolution's state. None: `slots`,
        or its column 0.
      scale, qk_l2norm, softplus_beta, softplus_threshold: as in `fused_update`.
      allow_neg_eigval, gate_lower_bound: as in `fused_update`.
      implementation: "triton", "interpret", "xla" or "reference"; None: triton where it
        can run, else xla, which here is the ops one after another.
      config: the kernel's launch.

    Null rule: as in `fused_update`, for both states; a row is null also where its
    convolution's slot is, or where it has more than S tokens.

    Returns:
      state: the pair, behind this call's tokens.
      out: [.., HV V], what the output projection takes, in qkvz's dtype.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
      NotImplementedError: the kernel was asked for and cannot run here, or K or V are
        above 256.

    Numerics: float32 inside; q, k, v and out are rounded to qkvz's dtype on their way,
    as separate ops do. The gradient is that of the ops.

    Examples:
      A token of each of two sequences, laid out as Qwen3.5 has them:

        >>> import jax, jax.numpy as jnp
        >>> from gdn_jax import ConvState, fused_layer_step
        >>> H, HV, K, V, W = 1, 2, 16, 16, 4
        >>> C = 2 * H * K + HV * V
        >>> state = ConvState.zeros(5, C, W, jnp.float32), jnp.zeros((5, HV, V, K))
        >>> weights = dict(
        ...     conv_weight=jnp.ones((C, W)) / W,
        ...     A_log=jnp.zeros(HV),
        ...     dt_bias=jnp.zeros(HV),
        ...     norm_weight=jnp.ones(V),
        ... )
        >>> qkvz, ba = jnp.ones((2, 1, C + HV * V)), jnp.zeros((2, 1, 2 * HV))
        >>> slots = jnp.array([3, 1], jnp.int32)
        >>> state, out = fused_layer_step(
        ...     state, qkvz, ba, layout="flat", slots=slots, **weights
        ... )
        >>> out.shape
        (2, 1, 32)
    """
    _dispatch.check_name(implementation)
    _dispatch.check_config(config, LayerStepConfig, implementation)
    conv, recurrent = _pair(state)
    weights = Weights(
        *(
            checks.floating(name, x)
            for name, x in dict(
                conv_weight=conv_weight,
                A_log=A_log,
                dt_bias=dt_bias,
                norm_weight=norm_weight,
            ).items()
        )
    )
    projected, heads = _projected(conv, recurrent, qkvz, ba, layout, weights)
    x, options = _pack(
        conv,
        recurrent,
        projected,
        weights,
        heads,
        checks.tables(slots, cu_seqlens, num_accepted, has_state),
        conv_slots,
        null_slot=null_slot,
        eps=checks.number("eps", eps),
        activation=activation,
        scale=scale,
        qk_l2norm=qk_l2norm,
        gating=arguments.gate_options(
            softplus_beta, softplus_threshold, allow_neg_eigval, gate_lower_bound
        ),
    )
    # every check of the ops that it is made of, whichever runs
    jax.eval_shape(lambda x: chain(x, options, "xla"), x)
    conv, recurrent, out = _dispatch.run(_paths(x, options, config), implementation)
    return (conv, recurrent), out.reshape(*projected.z.shape[:-1], heads.HV * heads.V)


def _paths(
    x: Inputs, options: Options, config: LayerStepConfig | None
) -> dict[str, Callable[[], tuple[ConvState, Array, Array]]]:
    heads = options.heads
    if 0 in (x.num_tokens, x.num_rows, x.recurrent.shape[0], x.conv.start.shape[0]):
        out = jnp.zeros((x.num_tokens, heads.HV, heads.V), options.rule.out_dtype)
        nothing = x.conv, x.recurrent, out  # every row is null
        return dict.fromkeys(_dispatch.IMPLEMENTATIONS, lambda: nothing)

    def run_kernel(interpret: bool) -> tuple[ConvState, Array, Array]:
        step = _step(x, options)
        if interpret:
            found = interpreter(heads.V)
        else:
            found = find_config(_triton.device_kind(x), step)
        launch, reason = config or found, step.why_not()
        if reason is not None:
            raise NotImplementedError(
                f"fused_layer_step: the kernel cannot take this call: {reason}. Use "
                f"implementation='xla'."
            )
        return vjp.launched(KERNELS[interpret], options, launch, x)

    return {
        "triton": lambda: run_kernel(False),
        "interpret": lambda: run_kernel(True),
        "xla": lambda: _chain(x, options, "xla"),
        "reference": lambda: _chain(x, options, "reference"),
    }


_chain = jax.jit(chain, static_argnums=(1, 2))


KERNELS = vjp.kernel_paths(
    triton, vjp.backward_of(lambda x, options: chain(x, options, "xla"))
)


def _step(x: Inputs, options: Options) -> Step:
    heads = options.heads
    sizes = heads.H, heads.HV, heads.K, heads.V, x.recurrent.dtype.name
    verifies = x.tables.num_accepted is not None
    tokens = options.rule.tokens_per_row
    return Step(x.num_rows, tokens, x.columns, verifies, *sizes)


def _pair(state: Any) -> tuple[ConvState, Array]:
    if not isinstance(state, tuple) or len(state) != 2:
        remedy = "The convolution's state and the rule's pool."
        checks.fail("state", type(state).__name__, "(ConvState, pool)", remedy)
    conv, recurrent = state
    if not isinstance(conv, ConvState):
        remedy = "Make one with ConvState.zeros."
        checks.fail("state[0]", type(conv).__name__, "a ConvState", remedy)
    recurrent = checks.floating("state[1]", recurrent)
    if recurrent.ndim != 4:
        remedy = "Add the missing axes."
        checks.fail("state[1]", recurrent.shape, "[P or N, HV, V, K]", remedy)
    return conv, recurrent


def _projected(
    conv: ConvState,
    recurrent: Array,
    qkvz: Any,
    ba: Any,
    layout: str,
    weights: Weights,
) -> tuple[Projected, Heads]:
    if layout not in LAYOUTS:
        remedy = "Qwen3-Next's is interleaved, Qwen3.5's flat."
        checks.fail("layout", repr(layout), f"one of {', '.join(LAYOUTS)}", remedy)
    _, HV, V, K = recurrent.shape
    C = conv.buffer.shape[1]
    keys = C - HV * V
    H = keys // (2 * K) if K else 0
    if H < 1 or keys != H * 2 * K or HV % H:
        wanted = f"[P, C, R] with C = 2 H K + HV V, of HV = {HV}, V = {V} and K = {K}"
        remedy = "HV is a multiple of H."
        checks.fail("state[0].buffer", conv.buffer.shape, wanted, remedy)
    apart = isinstance(qkvz, tuple)
    if apart != isinstance(ba, tuple) or (apart and layout != "flat"):
        remedy = "Two arrays each, of layout='flat', or one each."
        got = f"{type(qkvz).__name__} beside ba {type(ba).__name__}, layout {layout!r}"
        checks.fail("qkvz", got, "an array, or with ba a pair of them", remedy)
    if apart:
        names = "qkvz[0]", "qkvz[1]", "ba[0]", "ba[1]"
        widths, given = (C, HV * V, HV, HV), (*qkvz, *ba)
    else:
        names, widths, given = ("qkvz", "ba"), (C + HV * V, 2 * HV), (qkvz, ba)
    arrays = [checks.floating(name, x) for name, x in zip(names, given, strict=True)]
    lead = arrays[0].shape[:-1]
    for name, x, width in zip(names, arrays, widths, strict=True):
        if len(lead) not in (1, 2) or x.shape != (*lead, width):
            first = "" if x is arrays[0] else f", the leading axes {lead} of {names[0]}"
            wanted = f"[N, T, {width}] or [L, {width}]{first}"
            checks.fail(name, x.shape, wanted, f"H = {H} of the state's channels.")
        if x.dtype != arrays[0].dtype:
            remedy = "Projections have one dtype."
            checks.fail(name, x.dtype, f"{names[0]}'s {arrays[0].dtype}", remedy)
    if weights.norm.shape != (V,):
        checks.fail("norm_weight", weights.norm.shape, f"[V] = {(V,)}", "One a value.")
    heads = Heads(H, HV, K, V, layout == "interleaved", apart)
    return Projected(*(arrays if apart else (arrays[0],) * 2 + (arrays[1],) * 2)), heads


def _pack(
    conv: ConvState,
    recurrent: Array,
    projected: Projected,
    weights: Weights,
    heads: Heads,
    given: Batch,
    conv_slots: ArrayLike | None,
    *,
    null_slot: int | None,
    eps: float,
    activation: str,
    scale: float | None,
    qk_l2norm: bool,
    gating: GateOptions,
) -> tuple[Inputs, Options]:
    lead = projected.z.shape[:-1]
    _, tokens, _ = checks.rows_of(lead, given.cu_seqlens)
    own = None if conv_slots is None else checks.integers("conv_slots", conv_slots)
    L = math.prod(lead)
    packed = jax.tree.map(lambda x: x.reshape(L, x.shape[-1]), projected)
    x = Inputs(conv, recurrent, packed, weights, given, own)
    room = f"room for S = {x.columns} tokens in state[0]"
    if tokens is not None and tokens > x.columns:
        remedy = "Make the ConvState with columns=S, or use the ops for prompts."
        checks.fail("qkvz", f"T = {tokens} with {room}", "[N, T, ..], T <= S", remedy)
    if given.slots is not None and given.slots.shape[1:] > (x.columns,):
        got, remedy = f"{given.slots.shape} with {room}", "Make it with columns=S."
        checks.fail("slots", got, "[N, S] of at most its S", remedy)
    pools = x.pools(null_slot)
    jax.eval_shape(lambda: find_tables(given, own, lead, pools).rows)  # checks
    options = RuleOptions(
        tokens_per_row=tokens,
        scale=heads.K**-0.5 if scale is None else checks.number("scale", scale),
        qk_l2norm=checks.flag("qk_l2norm", qk_l2norm),
        null_slot=checks.null_slot_of(null_slot, recurrent.shape[0], given.slots),
        per_token_states=False,
        out_dtype=projected.z.dtype,
        gating=gating,
    )
    varying = ConvState(
        _triton.varying_like(conv.buffer, x),
        _triton.varying_like(conv.start, (conv.start, given, own)),
    )
    x = x._replace(conv=varying, recurrent=_triton.varying_like(recurrent, x))
    return x, Options(options, heads, eps, activation)
