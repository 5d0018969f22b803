"""The public update of a gated delta rule state that writes it once in many steps."""

from __future__ import annotations  # so that help() names types and expands none

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdn_jax import _dispatch, _triton
from gdn_jax.ops import checks
from gdn_jax.ops.gated_delta import arguments
from gdn_jax.ops.gated_delta.call import GateLogits, Options
from gdn_jax.ops.gated_delta.replay_call import Inputs
from gdn_jax.ops.gated_delta.replay_reference import replay_reference
from gdn_jax.ops.gated_delta.replay_state import (
    WINDOWS,
    ReplayState,
    check_state,
    varying_as,
)
from gdn_jax.ops.gated_delta.replay_triton import replay_triton
from gdn_jax.ops.gated_delta.replay_tuning import (
    ReplayConfig,
    check_replay_registers,
    replay_heuristic,
)
from gdn_jax.ops.gated_delta.replay_xla import replay_xla
from gdn_jax.ops.gated_delta.tuning import MAX_HEAD_DIM


def replay_update(
    state: ReplayState,
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
    out_dtype: Any = None,
    implementation: str | None = None,
    config: ReplayConfig | None = None,
) -> tuple[ReplayState, Array]:
    """`fused_update` that reads a state and writes it once in many calls: (state, out).

    The state of a slot is a checkpoint and a ring of R = 16 or 32 records of the tokens
    since (`ReplayState`). A call, for each row,

      1. keeps the first `num_accepted` records of those the row's last call left, its
         pending ones, and drops the others: drafts that did not stand;
      2. where the ring has no room for T more, writes the state with the records that
         stand in it as the new checkpoint;
      3. computes `out` of its T tokens, as `fused_update` does, and leaves their
         records pending.

    With g_i the log-decay of a record's token, G its running sum, and beta, k and v as
    in `fused_update`, the state S_j behind j records is found from the checkpoint S_0:

        u_i = beta_i (v_i - exp(g_i) S_{i-1} k_i)
        S_j = exp(G_j) S_0 + sum over i <= j of exp(G_j - G_i) u_i k_i^T

    One token a call, all of which stand, is plain decoding with fewer writes. Source:
    ReplaySSM (Dao-AILab and NVIDIA, 2026; vLLM RFC 47572); the sum is that of Yang,
    Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv:2412.06464), section 3.

    Args:
      state: a `ReplayState` of P slots; under `jit` with it donated, updated in place.
      q, k: [N, T, H, K] (dense) or [L, H, K] (packed); k of a dtype that `state.k`
        holds.
      v: [.., HV, V], of q's lead.
      A_log, dt_bias, a, b: [HV], [HV], [.., HV] and [.., HV]; KDA's as in
        `fused_update`.
      slots: [N] int32, each row's slot; None: row i is slot i.
      cu_seqlens: as in `fused_update`. A row has at most R tokens.
      num_accepted: [N] int32, how many of the row's pending tokens stand, 1 to all of
        them; where none is pending any number. None: all stand.
      has_state: [N] bool; False: the row starts from zeros, whatever its slot holds.
      config: a `ReplayConfig`, the kernels' launch; with `implementation` None it says
        nothing where the kernels cannot run.
      null_slot, scale, qk_l2norm, out_dtype, implementation: as in `fused_update`.
      softplus_beta, softplus_threshold: as in `fused_update`.
      allow_neg_eigval, gate_lower_bound: as in `fused_update`.

    Null rule: a row is null if its slot is, if it has no tokens or more than R, or if
    something is pending, it does not start from zeros, and num_accepted is outside 1 to
    what is pending. It reads nothing, writes
    nothing, and its `out` is exactly zero. NaN in its tokens reaches nothing; in one of
    a live row's it reaches that row's `out` and records, of tokens before it too.
    Undefined: a slot of two live rows, and tokens that a falling `cu_seqlens` gives to
    two rows.

    Returns:
      state: the `ReplayState` behind the call.
      out: of v's shape, in `out_dtype`.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
      NotImplementedError: the implementation asked for cannot run this call here. With
        a decay for each K (KDA), or K or V above 256, there are "xla" and "reference"
        alone.

    Transformations: `jit`, `scan` and `vmap`, which broadcasts an unbatched state, one
    copy an entry; `shard_map` over rows, or over heads, of whose states the counters
    start, committed and pending are whole. "interpret" needs `check_vma=False`.

    Numerics: a float32 checkpoint is folded in float32's own precision; the kernel
    reads it in `config.parts` bfloat16 parts, of which 2 leave 2^-17. A 16-bit one is
    rounded where it is written, once in many tokens. There is no gradient, which raises
    NotImplementedError: train with `chunk_update`.

    Examples:
      Three drafts behind a token, of which two turn out to stand:

        >>> import jax, jax.numpy as jnp
        >>> from gdn_jax import ReplayState, replay_update
        >>> P, H, HV, K, V = 4, 1, 2, 16, 16
        >>> state = ReplayState.zeros(P, H, HV, K, V, key_dtype=jnp.float32)
        >>> def tokens(T):
        ...     q = k = jnp.ones((1, T, H, K))
        ...     v, a = jnp.ones((1, T, HV, V)), jnp.zeros((1, T, HV))
        ...     return q, k, v, jnp.zeros(HV), a, a, jnp.zeros(HV)
        >>> update = jax.jit(replay_update, donate_argnums=0)
        >>> slots = jnp.array([2], jnp.int32)
        >>> state, out = update(state, *tokens(4), slots=slots)
        >>> stands = jnp.array([3], jnp.int32)
        >>> state, out = update(state, *tokens(4), slots=slots, num_accepted=stands)
        >>> int(state.committed[2]), int(state.pending[2])
        (3, 4)
    """
    _dispatch.check_name(implementation)
    _dispatch.check_config(config, ReplayConfig, implementation)
    x, options, unpack = _pack(
        state,
        q,
        k,
        v,
        arguments.floating_gates(GateLogits, A_log, a, b, dt_bias),
        num_accepted,
        slots=slots,
        cu_seqlens=cu_seqlens,
        has_state=has_state,
        null_slot=null_slot,
        scale=scale,
        qk_l2norm=qk_l2norm,
        out_dtype=out_dtype,
        gating=arguments.gate_options(
            softplus_beta, softplus_threshold, allow_neg_eigval, gate_lower_bound
        ),
    )
    x = without_gradient(x._replace(state=varying_as(x.state, x, x.tables)))
    new, out = _dispatch.run(_paths(x, options, config), implementation)
    return new, unpack(out)


@jax.custom_jvp
def without_gradient(x: Any) -> Any:
    """A call's arrays, of which none has a gradient."""
    return x


@without_gradient.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "A step of a ReplayState has no gradient, in any implementation. Train with "
        "chunk_update."
    )


def _pack(
    state, q, k, v, gates: GateLogits, num_accepted, **keywords
) -> tuple[Inputs, Options, Callable[[Array], Array]]:
    check_state(state)
    slots = keywords["slots"]
    if slots is not None and jnp.ndim(slots) > 1:
        remedy = "A slot keeps records of drafts itself: it needs no slot for each."
        checks.fail("slots", jnp.shape(slots), "[N], one slot a row", remedy)
    x, options, unpack = arguments.pack(
        state.checkpoint,
        q,
        k,
        v,
        gates,
        num_accepted=None,
        per_token_states=False,
        **keywords,
    )
    tables = checks.tables(x.slots, x.cu_seqlens, num_accepted, x.has_state)
    checks.check_sharding(state._asdict() | dict(num_accepted=tables.num_accepted))
    inputs = Inputs(state, x.q, x.k, x.v, gates._replace(**x.gates._asdict()), tables)
    checks.check_per_row(tables, inputs.num_rows, f"{inputs.num_rows} rows")
    _check_records(inputs, options)
    return inputs, options, unpack


def _check_records(x: Inputs, options: Options) -> None:
    T, R = options.tokens_per_row, x.state.window
    if T is not None and T > R:
        longer = f"Take a ReplayState of window={WINDOWS[-1]}, or read"
        begins = longer if WINDOWS[-1] >= T else "Read"
        remedy = (
            f"{begins} prompts with chunk_update into its checkpoint, reset before."
        )
        checks.fail("q", f"{T} tokens a row", f"of at most R = {R} tokens", remedy)
    if x.state.k.shape[1] != x.k.shape[1]:
        got, wanted = x.k.shape[1], x.state.k.shape[1]
        remedy = "It is num_key_heads of the ReplayState."
        checks.fail("k", f"{got} key heads", f"of H = {wanted}", remedy)
    if jnp.promote_types(x.k.dtype, x.state.k.dtype) != x.state.k.dtype:
        remedy = f"Make the ReplayState with key_dtype={x.k.dtype}."
        checks.fail("k", x.k.dtype, f"of a dtype that {x.state.k.dtype} holds", remedy)
    per_k = x.gates.a.ndim == 3
    if (x.state.log_decay.ndim == 4) != per_k:
        got = "a decay for each K" if per_k else "one for all of K"
        remedy = f"Make the ReplayState with per_key_decay={per_k}."
        checks.fail("a", got, "what the records of state.log_decay have", remedy)


def _paths(
    x: Inputs, options: Options, config: ReplayConfig | None
) -> Mapping[str, Callable[[], tuple[ReplayState, Array]]]:
    if 0 in (x.q.shape[0], x.num_rows, x.state.start.shape[0]):
        return {
            name: functools.partial(_nothing, x, options)
            for name in map(str, _dispatch.IMPLEMENTATIONS)
        }

    def run_kernel(interpret: bool):
        if not interpret:
            _triton.device_kind(x)
        if x.gates.a.ndim == 3:
            raise NotImplementedError(
                "replay_update: no kernel for a decay per K (KDA). Use "
                "implementation='xla'."
            )
        V, K = x.state.checkpoint.shape[2:]
        if max(K, V) > MAX_HEAD_DIM:
            raise NotImplementedError(
                f"replay_update: the kernel takes K and V up to {MAX_HEAD_DIM}; got "
                f"{K=}, {V=}. Use implementation='xla'."
            )
        dtypes = x.k.dtype, x.state.checkpoint.dtype
        group = x.v.shape[1] // x.k.shape[1]
        launch = config or replay_heuristic(x.longest(options), *dtypes, group)
        check_replay_registers(launch, K, V)
        return _launched(x, options, launch, interpret)

    return {
        "triton": lambda: run_kernel(False),
        "interpret": lambda: run_kernel(True),
        "xla": lambda: _xla(x, options),
        "reference": lambda: _reference(x, options),
    }


_launched = jax.jit(replay_triton, static_argnums=(1, 2, 3))
_xla = jax.jit(replay_xla, static_argnums=1)
_reference = jax.jit(replay_reference, static_argnums=1)


def _nothing(x: Inputs, options: Options) -> tuple[ReplayState, Array]:
    """There are no tokens, rows or slots: every row is null."""
    return x.state, jnp.zeros(x.v.shape, options.out_dtype)
