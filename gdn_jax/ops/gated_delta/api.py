"""The public update of a gated delta rule state, fused with its gates."""

from __future__ import annotations  # so that help() names types and expands none

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdn_jax import _dispatch, _triton
from gdn_jax.ops import vjp
from gdn_jax.ops.gated_delta import arguments, tuning
from gdn_jax.ops.gated_delta.call import (
    GateLogits,
    GateOptions,
    Gates,
    Inputs,
    Options,
)
from gdn_jax.ops.gated_delta.reference import reference
from gdn_jax.ops.gated_delta.triton import triton
from gdn_jax.ops.gated_delta.tuning import LaunchConfig
from gdn_jax.ops.gated_delta.xla import xla


def fused_update(
    state: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    A_log: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    dt_bias: ArrayLike,
    *,
    slots: ArrayLike | None = None,
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
    per_token_states: bool = False,
    out_dtype: Any = None,
    state_rounding: str = "nearest",
    rounding_key: Array | None = None,
    implementation: str | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Array, Array]:
    """Gates, normalises and applies the gated delta rule: (state, out).

    For each sequence and value head, token by token and in float32, whatever of
    float32, bfloat16 and float16 each argument is:

        decay = exp(-exp(A_log) * softplus(a + dt_bias))
        beta  = sigmoid(b)
        q, k  = q / |q|, k / |k|  (if qk_l2norm)
        q     = q * scale
        S     = decay * S
        S     = S + beta * (v - S k) k^T
        out   = S q

    The carry between tokens is float32 and is rounded only where it is stored. Source:
    Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv:2412.06464); the contract is
    that of vLLM's fused_sigmoid_gating_delta_rule_update (PR 35777).

    Args:
      state: [N, HV, V, K] float32, bfloat16 or float16; with `slots` a pool
        [P, HV, V, K]. Donate it under `jax.jit` (`donate_argnums=0`) and it is updated
        in place; slots that are not written keep their bits. NOT donated, every call
        copies the whole pool.
      q, k: [N, T, H, K] (dense) or [L, H, K] (packed). HV % H == 0; value head i reads
        key head i // (HV // H).
      v: [N, T, HV, V] or [L, HV, V].
      A_log: [HV], log of the decay rate.
      a, b: [N, T, HV] or [L, HV], logits of decay and beta. Per-K decay (KDA): a has a
        further axis K.
      dt_bias: [HV]; KDA: [HV, K].
      slots: [N] int32: sequence n reads and writes pool slot slots[n]. [N, S] with
        `num_accepted`: speculative decoding, below.
      cu_seqlens: [N + 1] int32: sequence n owns the packed tokens from cu_seqlens[n] to
        cu_seqlens[n + 1], clipped to [0, L]; a step that does not grow is an empty
        sequence. Without it each packed token is a sequence of its own (decoding).
      num_accepted: [N] int32 in 1..S, how many tokens of the last step stand: 1 + the
        drafts accepted. Sequence n starts from slot slots[n, num_accepted[n] - 1] and
        leaves the state after token t in slot slots[n, t], so that the next step can
        start at whichever draft was accepted. After a prefill into slots[:, 0] it is 1.
        Dense T <= S; packed tokens past column S - 1 give `out` and store nothing.
      has_state: [N] bool. False starts a sequence from zeros, whatever its slot holds.
        None: all go on from their slots.
      null_slot: one that means "none" in `slots`, for callers with one (vLLM: 0).
      scale: of q, > 0; K**-0.5 if None.
      qk_l2norm: divide q and k by sqrt(sum of squares + 1e-6).
      softplus_beta, softplus_threshold: softplus(x) = log(1 + exp(beta x)) / beta, and
        x where beta x > threshold.
      allow_neg_eigval: double beta, so that it spans (0, 2) (OLMo-hybrid).
      gate_lower_bound: if given, < 0, decay = exp(gate_lower_bound *
        sigmoid(exp(A_log) * (a + dt_bias))) instead (KDA of GLM and Kimi-K3).
      per_token_states: leave the pool alone and return the state after every token.
      state_rounding: of 16-bit states where they are stored, "nearest" or "stochastic":
        up or down at random, right on the average, where nearest would leave a state
        as it is whose steps are small (docs/numerics.md).
      rounding_key: with "stochastic" alone, a typed key, another one each call: states
        are rounded by it and where they are stored, and by nothing else. Under
        `shard_map` fold in the shard's index.
      out_dtype: of `out`; v's if None. float16 overflows past 65504: ask for float32.
      implementation: "triton" (one Pallas kernel; NVIDIA, compute capability >= 8.0),
        "interpret" (that kernel in Pallas' interpreter, any machine), "xla",
        "reference" (`lax.scan`, the oracle). None: triton where it can run, else xla;
        under jit JAX's default device decides, wherever the arrays lie.
      config: the kernel's launch; None takes the tuning table ("interpret": one program
        a head). Pinned, it makes a row's bits independent of the batch. With
        implementation=None it counts where the kernel runs; "xla" and "reference" have
        no launch and refuse it.

    Null rule: a slot outside [0, P), or `null_slot`, is null. A row whose slot to READ
    is null, whose num_accepted is outside 1..S, or which has no tokens, reads nothing,
    writes nothing, and its `out` is exactly zero, as is that of tokens of no row. A
    null slot to WRITE skips that write alone. NaN in such tokens reaches nothing,
    gradients included. Undefined: one slot written by two live rows or twice by one, or
    read by a live row and written by another (`gdn_jax.testing.check_slots` finds
    them); `out` of a token that a falling `cu_seqlens` gives to two rows, and those
    rows' states and gradients; q or k so long (1e19) that float32 cannot hold the sum
    of squares.

    Returns:
      state: like the argument, or with `per_token_states` [N, T, HV, V, K] or
        [L, HV, V, K] in its dtype, zero for null rows.
      out: of v's shape, in `out_dtype`.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
      NotImplementedError: the implementation asked for cannot run this call here.

    Transformations: `jax.grad` works with every implementation; the backward pass runs
    the reference recurrence, so it is for correctness, not for long sequences. Forward
    mode (`jax.jvp`) is the reference's alone, and under `jit` `implementation` and
    `config` are to be closed over, not passed; of both JAX's own errors tell, without a
    remedy. Under `jax.vmap` an unbatched pool is broadcast, one copy per batch entry.
    Under `jax.shard_map` split heads or rows; "interpret" needs `check_vma=False`.

    Examples:
      A token for each of two rows, whose states lie in slots 3 and 0 of a pool of 4:

        >>> import jax, jax.numpy as jnp
        >>> from gdn_jax import fused_update
        >>> H, HV, K, V = 1, 2, 16, 16
        >>> q = k = jnp.ones((2, 1, H, K))
        >>> v = jnp.ones((2, 1, HV, V))
        >>> a = b = jnp.zeros((2, 1, HV))
        >>> A_log = dt_bias = jnp.zeros(HV)
        >>> tokens = q, k, v, A_log, a, b, dt_bias
        >>> slots = jnp.array([3, 0], jnp.int32)
        >>> update = jax.jit(fused_update, donate_argnums=0)
        >>> state, out = update(jnp.zeros((4, HV, V, K)), *tokens, slots=slots)
        >>> out.shape, [bool(jnp.any(each)) for each in state]
        ((2, 1, 2, 16), [True, False, False, True])

      On a machine without a GPU (export, lowering, compiling ahead of time) name the
      device that the launch is for, by its kind as JAX prints it, around the tracing;
      without one, implementation=None is xla there:

        >>> from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
        >>> h200 = AbstractDevice("NVIDIA H200", 1, "cuda")
        >>> with use_abstract_mesh(AbstractMesh((), (), abstract_device=h200)):
        ...     traced = update.trace(state, *tokens, slots=slots)
        ...     lowered = traced.lower(lowering_platforms=("cuda",))
        >>> "triton" in lowered.as_text()
        True

      `jax.export` needs the kernel's custom call allowed, and the flatbuffers package:

        >>> from jax import export
        >>> call = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
        >>> make = export.export(update, platforms=["cuda"], disabled_checks=[call])
        >>> data = make(state, *tokens, slots=slots).serialize()
        >>> export.deserialize(data).platforms
        ('cuda',)
    """
    x, options, unpack = arguments.pack(
        state,
        q,
        k,
        v,
        arguments.floating_gates(GateLogits, A_log, a, b, dt_bias),
        slots=slots,
        cu_seqlens=cu_seqlens,
        num_accepted=num_accepted,
        has_state=has_state,
        null_slot=null_slot,
        scale=scale,
        qk_l2norm=qk_l2norm,
        per_token_states=per_token_states,
        out_dtype=out_dtype,
        state_rounding=state_rounding,
        rounding_key=rounding_key,
        gating=arguments.gate_options(
            softplus_beta, softplus_threshold, allow_neg_eigval, gate_lower_bound
        ),
    )
    return _update(x, options, unpack, implementation, config)


def recurrent_update(
    state: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    log_decay: ArrayLike,
    beta: ArrayLike,
    *,
    slots: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    num_accepted: ArrayLike | None = None,
    has_state: ArrayLike | None = None,
    null_slot: int | None = None,
    scale: float | None = None,
    qk_l2norm: bool = True,
    per_token_states: bool = False,
    out_dtype: Any = None,
    state_rounding: str = "nearest",
    rounding_key: Array | None = None,
    implementation: str | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Array, Array]:
    """`fused_update` for callers with gates of their own: (state, out).

    With `gates` before it, the unfused pair: the same result in two launches, the gates
    in memory between them.

    Args:
      log_decay: [N, T, HV] or [L, HV], log of the decay, normally <= 0; per K (KDA)
        with a further axis K.
      beta: [N, T, HV] or [L, HV], used as it is.

    Everything else is as in `fused_update`: shapes, dtypes, in-place update, null rule,
    errors and transformations.

    Examples:
      Nothing is forgotten, and beta is 1: a key reads what was last written with it.

        >>> import jax.numpy as jnp
        >>> from gdn_jax import recurrent_update
        >>> k = jnp.eye(16)[jnp.array([0, 1, 0])].reshape(1, 3, 1, 16)
        >>> v = jnp.arange(3.0)[None, :, None, None] * jnp.ones(16)
        >>> never, always = jnp.zeros((1, 3, 1)), jnp.ones((1, 3, 1))
        >>> empty = jnp.zeros((1, 1, 16, 16))
        >>> state, out = recurrent_update(empty, k, k, v, never, always, scale=1.0)
        >>> state[0, 0, 0, :3].round(3).tolist()
        [2.0, 1.0, 0.0]
    """
    x, options, unpack = arguments.pack(
        state,
        q,
        k,
        v,
        arguments.floating_gates(Gates, log_decay, beta),
        slots=slots,
        cu_seqlens=cu_seqlens,
        num_accepted=num_accepted,
        has_state=has_state,
        null_slot=null_slot,
        scale=scale,
        qk_l2norm=qk_l2norm,
        per_token_states=per_token_states,
        out_dtype=out_dtype,
        state_rounding=state_rounding,
        rounding_key=rounding_key,
        gating=GateOptions(),
    )
    return _update(x, options, unpack, implementation, config)


def _update(
    x: Inputs,
    options: Options,
    unpack: Callable[[Array], Array],
    implementation: str | None,
    config: LaunchConfig | None,
) -> tuple[Array, Array]:
    _dispatch.check_name(implementation)
    _dispatch.check_config(config, LaunchConfig, implementation)
    x = x._replace(state=_triton.varying_like(x.state, x))
    state, out = _dispatch.run(_paths(x, options, config), implementation)
    return unpack(state) if options.per_token_states else state, unpack(out)


def _paths(x: Inputs, options: Options, config: LaunchConfig | None):
    V, K = x.state.shape[2:]
    empty = 0 in (x.q.shape[0], x.num_rows, x.state.shape[0])
    run = nothing if empty else _differentiable

    def run_triton():
        device_kind = _triton.device_kind(x)
        launch = config or tuning.find_config(
            device_kind,
            K,
            V,
            x.state.dtype,
            heads=x.num_rows * x.v.shape[1],
            walk=tuning.find_walk(
                options.tokens_per_row, x.gates.per_token[0].ndim == 3
            ),
        )
        return run(COMPILED, options, launch, x)

    return {
        "triton": run_triton,
        "interpret": lambda: run(
            INTERPRETED, options, config or tuning.interpreter(V), x
        ),
        "xla": lambda: run(BATCHED, options, None, x),
        "reference": lambda: (
            run(None, options, None, x) if empty else _reference(x, options)
        ),
    }


def _interpreted(x: Inputs, options: Options, config: LaunchConfig):
    return triton(x, options, config, interpret=True)


def _batched(x: Inputs, options: Options, config: None):
    del config
    return xla(x, options)


BACKWARD = vjp.backward_of(reference)
BATCHED = vjp.Path(_batched, BACKWARD)
COMPILED = vjp.Path(triton, BACKWARD)
INTERPRETED = vjp.Path(_interpreted, BACKWARD)

# jit so that a call outside jit is traced and compiled once, not at every call.
_differentiable = jax.jit(vjp.differentiable, static_argnums=(0, 1, 2))
_reference = jax.jit(reference, static_argnums=1)


def nothing(path: Any, options: Options, config: Any, x: Inputs):
    """In place of `_differentiable` where there are no tokens, rows or slots: every row
    is null."""
    del path, config
    out = jnp.zeros(x.v.shape, options.out_dtype)
    if options.per_token_states:
        return jnp.zeros((x.q.shape[0], *x.state.shape[1:]), x.state.dtype), out
    return x.state, out
