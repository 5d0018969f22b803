"""The public step of a layer between its projections."""

from __future__ import annotations  # so that help() names types and expands none

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdn_jax import _dispatch, _triton
from gdn_jax.ops import checks, vjp
from gdn_jax.ops.causal_conv1d.call import ConvState
from gdn_jax.ops.gated_delta.arguments import gate_options
from gdn_jax.ops.gated_delta.replay_api import without_gradient
from gdn_jax.ops.gated_delta.replay_state import ReplayState
from gdn_jax.ops.gated_delta.replay_tuning import ReplayConfig, check_replay_registers
from gdn_jax.ops.layer_step import arguments
from gdn_jax.ops.layer_step.call import Inputs, Options, Stepped
from gdn_jax.ops.layer_step.chain import chain
from gdn_jax.ops.layer_step.replay import replay_step
from gdn_jax.ops.layer_step.triton import triton
from gdn_jax.ops.layer_step.tuning import (
    MEASURED_WINDOW,
    LayerStepConfig,
    Step,
    find_config,
    interpreter,
)

Projections = ArrayLike | tuple[ArrayLike, ArrayLike]
Paths = Mapping[str, Callable[[], Stepped]]


def fused_layer_step(
    state: tuple[ConvState, ArrayLike | ReplayState],
    qkvz: Projections,
    ba: Projections,
    *,
    layout: str,
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
    config: LayerStepConfig | ReplayConfig | None = None,
) -> tuple[tuple[ConvState, Array | ReplayState], Array]:
    """What a Gated DeltaNet layer does between its projections, in one launch, or two
    where `config.programs` share out a head, or with a `ReplayState` and dense rows
    three: (state, out).

        q, k, v = silu(causal convolution of qkvz's channels)   (`causal_conv1d`)
        out = gated delta rule(q, k, v, a, b)   (`fused_update` or `replay_update`)
        out = RMS norm(out) * activation(z)                     (`gated_rms_norm`)

    Sources: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv:2412.06464); a
    layer's parts and both layouts are those of Qwen3-Next and Qwen3.5 in transformers.

    For decoding and for verifying drafts, of at most as many tokens a row as the ring
    of `state[0]` has room for, S; prompts are for `chunk_update`. The projections are
    read where they lie: no split, copy or transpose is made of them.

    Args:
      state: (`ConvState` of C = 2 H K + HV V channels, [P or N, HV, V, K] or a
        `ReplayState`). Donate it under `jax.jit` and both are updated in place.
        Channels are all heads' q, then all k and v, whatever the layout. `start` is a
        column of the ring in every slot that a row names, also of a row that begins
        afresh. Inputs of the convolution are rounded to its buffer's dtype where they
        are stored.
      qkvz: [N, T, C + HV V] (dense) or [L, C + HV V] (packed), or two arrays, of q, k
        and v [.., C] and of z [.., HV V], where the layout is flat.
      ba: [.., 2 HV], or two arrays [.., HV], b and a.
      layout: "interleaved", by key heads, each with its q, k, v and z, and its b and a
        (Qwen3-Next); or "flat", all q, then all k, v and z, and all b before all a
        (Qwen3.5).
      conv_weight: [C, W], of the state's channels; no bias, and silu behind it.
      A_log, dt_bias: [HV].
      norm_weight: [V]. These four and the projections are floating, of any dtype.
      eps, activation: as in `gated_rms_norm`.
      slots, cu_seqlens, num_accepted, has_state, null_slot: as in `fused_update`, or
        with a `ReplayState` as in `replay_update`, but that rows of several tokens need
        `num_accepted`, which is 1 where nothing is pending, and that without it one
        token of the last step stands.
      conv_slots: [N] int32, each row's slot of the convolution's state. None: `slots`,
        or its column 0.
      scale, qk_l2norm, softplus_beta, softplus_threshold: as in `fused_update`.
      allow_neg_eigval, gate_lower_bound: as in `fused_update`.
      implementation: "triton", "interpret", "xla" or "reference"; None: triton where it
        can run, else xla, which here is the ops one after another.
      config: the kernel's launch; with a `ReplayState` a `ReplayConfig`.

    Null rule: as in `fused_update` or `replay_update`, for both states; a row is null
    also where its convolution's slot is, or where it has more than S tokens.

    Returns:
      state: the pair, behind this call's tokens.
      out: [.., HV V], what the output projection takes, in qkvz's dtype.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
      NotImplementedError: the kernel was asked for and cannot run here, or this call
        has more than 9 tokens a row (packed: S above 9), K or V above 256, or, but for
        a `ReplayState`, HV above 255.

    Numerics: float32 inside; q, k, v and out are rounded to qkvz's dtype on their way,
    as separate ops do, so that a result may be the neighbour of theirs. With `config`
    pinned, a row's bits do not depend on the rest of the batch.

    Transformations: `jit`, `vmap`, and reverse-mode gradients, which are those of the
    ops (with a `ReplayState` none); `shard_map` over heads and rows as in
    `fused_update`, with `start` whole. Not here: KDA, and projections of q, k and v
    apart; the ops and the layer do those.

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
    recurrent = state[1] if isinstance(state, tuple) and len(state) == 2 else None
    kind = ReplayConfig if isinstance(recurrent, ReplayState) else LayerStepConfig
    _dispatch.check_config(config, kind, implementation)
    x, options, unpack = arguments.pack(
        state,
        qkvz,
        ba,
        layout,
        dict(
            conv_weight=conv_weight,
            A_log=A_log,
            dt_bias=dt_bias,
            norm_weight=norm_weight,
        ),
        checks.tables(slots, cu_seqlens, num_accepted, has_state),
        conv_slots,
        null_slot=null_slot,
        eps=eps,
        activation=activation,
        scale=scale,
        qk_l2norm=qk_l2norm,
        gating=gate_options(
            softplus_beta, softplus_threshold, allow_neg_eigval, gate_lower_bound
        ),
    )
    paths: Any = _replay_paths if kind is ReplayConfig else _paths
    conv, recurrent, out = _dispatch.run(paths(x, options, config), implementation)
    return (conv, recurrent), unpack(out)


def _paths(x: Inputs, options: Options, config: Any) -> Paths:
    step = _step(x, options)

    def run_kernel(interpret: bool) -> Stepped:
        plain = interpreter(options.heads.V)
        found = plain if interpret else _find_config(x, step)
        _need_registers(step)
        return vjp.launched(KERNELS[interpret], options, config or found, x)

    return _of_kernel(x, options, run_kernel)


def _replay_paths(x: Inputs, options: Options, config: Any) -> Paths:
    x, step = without_gradient(x), _step(x, options)

    def run_kernel(interpret: bool) -> Stepped:
        found = ReplayConfig() if interpret else _find_config(x, step)
        _need_registers(step)
        check_replay_registers(config or found, step.K, step.V)
        return replay_step(x, options, config or found, interpret)

    return _of_kernel(x, options, run_kernel)


def _find_config(x: Inputs, step: Step) -> Any:
    return find_config(_triton.device_kind(x), step)


def _of_kernel(
    x: Inputs, options: Options, run_kernel: Callable[[bool], Stepped]
) -> Paths:
    heads = options.heads
    if 0 in (x.num_tokens, x.num_rows, x.pool.shape[0], x.conv.start.shape[0]):
        out = jnp.zeros((x.num_tokens, heads.HV, heads.V), x.projected.z.dtype)
        nothing = x.conv, x.recurrent, out  # every row is null
        return dict.fromkeys(map(str, _dispatch.IMPLEMENTATIONS), lambda: nothing)
    return {
        "triton": lambda: run_kernel(False),
        "interpret": lambda: run_kernel(True),
        "xla": lambda: _chain(x, options, "xla"),
        "reference": lambda: _chain(x, options, "reference"),
    }


def _need_registers(step: Step) -> None:
    reason = step.why_not()
    if reason is not None:
        raise NotImplementedError(
            f"fused_layer_step: the kernel cannot take this call: {reason}. Use "
            f"implementation='xla'."
        )


_chain = jax.jit(chain, static_argnums=(1, 2))

KERNELS = vjp.kernel_paths(
    triton, vjp.backward_of(lambda x, options: chain(x, options, "xla"))
)


def _step(x: Inputs, options: Options) -> Step:
    heads = options.heads
    sizes = heads.H, heads.HV, heads.K, heads.V, x.pool.dtype.name
    records, act = x.recurrent, x.projected.qkv.dtype.name
    replay = isinstance(records, ReplayState)
    window = records.window if replay else MEASURED_WINDOW
    verifies = x.tables.num_accepted is not None
    tokens = options.rule.tokens_per_row
    return Step(x.num_rows, tokens, x.columns, verifies, *sizes, replay, act, window)
