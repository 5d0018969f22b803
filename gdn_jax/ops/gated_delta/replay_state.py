"""The state of replay: a checkpoint a slot, and records of the tokens since.

After j tokens behind a checkpoint S_0 the state is

    S_j = exp(G_j) S_0 + sum over i <= j of exp(G_j - G_i) u_i k_i^T

with u_i what token i corrected and G the running sum of log-decays. So a step writes a
record of each of its tokens, a hundredth of a state, and the checkpoint only where the
ring of records is full. Rejecting drafts drops their records.

    start             + committed          + pending     (all mod R)
    | part of the text | of the last step: not yet known how many stand |

Source: ReplaySSM (Dao-AILab and NVIDIA, 2026; vLLM RFC 47572).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdn_jax import _triton
from gdn_jax import _types as t
from gdn_jax.ops import checks

WINDOWS = (16, 32)


class ReplayState(NamedTuple):
    """States of a pool of slots, each a checkpoint and a ring of R records.

    Attributes:
      checkpoint: [P, HV, V, K], float32, bfloat16 or float16.
      u: [P, HV, R, V] float32, what each token corrected: beta (v - prediction).
      k: [P, H, R, K], keys as they came, in the activations' dtype.
      k_scale: [P, H, R] float32, 1 / |k|, or 1 without `qk_l2norm`.
      log_decay: [P, HV, R] float32, or [P, HV, R, K] with a decay for each K (KDA).
      start: [P] int32, the column of the oldest record.
      committed: [P] int32, records of tokens that stand.
      pending: [P] int32, records of the last call's tokens, behind them.
    """

    checkpoint: t.State
    u: Array
    k: Array
    k_scale: Array
    log_decay: Array
    start: t.Start
    committed: t.Start
    pending: t.Start

    @property
    def window(self) -> int:
        """R"""
        return self.u.shape[2]

    @classmethod
    def zeros(
        cls,
        num_slots: int,
        num_key_heads: int,
        num_value_heads: int,
        key_head_dim: int,
        value_head_dim: int,
        *,
        window: int = 16,
        dtype: Any = jnp.float32,
        key_dtype: Any = jnp.bfloat16,
        per_key_decay: bool = False,
    ) -> "ReplayState":
        """Empty states of sequences.

        Args:
          num_slots, num_key_heads, num_value_heads: P, H, HV.
          key_head_dim, value_head_dim: K, V.
          window: R, 16 or 32.
          dtype: the checkpoints', float32, bfloat16 or float16.
          key_dtype: of the keys that calls bring.
          per_key_decay: of KDA.

        Raises:
          ValueError: a size is no axis', or HV no multiple of H, or a dtype is none of
            those.
        """
        for name, x in dict(
            num_slots=num_slots,
            num_key_heads=num_key_heads,
            num_value_heads=num_value_heads,
            key_head_dim=key_head_dim,
            value_head_dim=value_head_dim,
        ).items():
            checks.count(name, x, "It is an axis.")
        shape = num_slots, num_value_heads, value_head_dim, key_head_dim
        remedy = "The checkpoint's dtype."
        pool = jnp.zeros(shape, checks.float_dtype("dtype", dtype, remedy))
        return cls.from_dense(
            pool,
            num_key_heads=num_key_heads,
            window=window,
            key_dtype=key_dtype,
            per_key_decay=per_key_decay,
        )

    @classmethod
    def from_dense(
        cls,
        state: ArrayLike,
        *,
        num_key_heads: int,
        window: int = 16,
        key_dtype: Any = jnp.bfloat16,
        per_key_decay: bool = False,
    ) -> "ReplayState":
        """States without records.

        Args:
          state: [P, HV, V, K], as `fused_update` or a prefill by `chunk_update` leaves
            it. The array itself becomes the checkpoints: it is gone once the state is
            donated.
          num_key_heads: H, which divides HV.
          window, key_dtype, per_key_decay: as in `zeros`.

        Raises:
          ValueError: state is no such array, or the others are not what `zeros` takes.
        """
        state = checks.floating("state", state)
        if state.ndim != 4:
            checks.fail("state", state.shape, "[P, HV, V, K]", "Add the missing axes.")
        remedy = "It is that of k."
        key_dtype = checks.float_dtype("key_dtype", key_dtype, remedy)
        if type(window) is not int or window not in WINDOWS:
            remedy = "It is R, the records that a slot has room for."
            checks.fail("window", repr(window), f"one of {WINDOWS}", remedy)
        checks.count("num_key_heads", num_key_heads, "It is H.")
        P, HV, V, K = state.shape
        if HV % num_key_heads:
            remedy = "Value head i reads key head i // (HV // H)."
            checks.fail("num_key_heads", num_key_heads, f"a divisor of {HV=}", remedy)
        H, R = num_key_heads, window
        f32, none = jnp.float32, jnp.zeros(P, jnp.int32)
        return cls(
            checkpoint=state,
            u=jnp.zeros((P, HV, R, V), f32),
            k=jnp.zeros((P, H, R, K), key_dtype),
            k_scale=jnp.zeros((P, H, R), f32),
            log_decay=jnp.zeros((P, HV, R, *([K] if per_key_decay else [])), f32),
            start=none,
            committed=none.copy(),  # no two leaves of a donated state are one buffer
            pending=none.copy(),
        )

    def to_dense(self, num_accepted: Any = None) -> Array:
        """The states [P, HV, V, K], in the checkpoints' dtype. `num_accepted` [P] as
        the next call would be given it, held to 0 to what is pending; None: all
        pending tokens stand."""
        check_state(self)
        kept = self.pending
        if num_accepted is not None:
            num_accepted = checks.integers("num_accepted", num_accepted)
            if num_accepted.shape != self.start.shape:
                wanted = f"[P] = {self.start.shape}"
                remedy = "One a slot; of slots that are not asked for any number."
                checks.fail("num_accepted", num_accepted.shape, wanted, remedy)
            kept = jnp.clip(num_accepted, 0, self.pending)
        records = in_order(self, jnp.arange(self.start.shape[0]), self.start)
        state = self.checkpoint.astype(jnp.float32)
        state = folded(state, records, self.committed + kept)
        return state.astype(self.checkpoint.dtype)

    def reset(self, slots: Any) -> "ReplayState":
        """With the states of these slots [N] zero, for their new owners; a slot outside
        the pool is none. `has_state` False in a call does the same."""
        slots = checks.integers("slots", slots)
        if slots.ndim != 1:
            checks.fail("slots", slots.shape, "[N]", "Pass jnp.array([slot]) for one.")
        num_slots = self.start.shape[0]
        slots = jnp.where(slots < 0, num_slots, slots)  # not counted from the end
        counters = "start", "committed", "pending"
        cleared = {
            name: getattr(self, name).at[slots].set(0, mode="drop")
            for name in ("checkpoint", *counters)
        }
        return self._replace(**cleared)


def varying_as(state: ReplayState, arrays: Any, tables: Any) -> ReplayState:
    """Under `shard_map`: what a call writes varies as its arrays do, but counters as
    the call's tables alone, so that of heads all devices know the same ones."""
    counters = state.start, state.committed, state.pending
    like = {name: (counters, tables) for name in ("start", "committed", "pending")}
    return ReplayState(
        *(
            _triton.varying_like(x, like.get(name, arrays))
            for name, x in state._asdict().items()
        )
    )


def check_state(state: Any) -> None:
    """Of the right type, shapes and dtypes."""
    make = "Make it with ReplayState.zeros or ReplayState.from_dense."
    if not isinstance(state, ReplayState):
        checks.fail("state", type(state).__name__, "a ReplayState", make)
    shapeless = (name for name, x in state._asdict().items() if not hasattr(x, "shape"))
    for name in shapeless:
        got = type(getattr(state, name)).__name__
        checks.fail(f"state.{name}", got, "an array", make)
    checks.floating("state.checkpoint", state.checkpoint)
    checks.floating("state.k", state.k)
    if jnp.ndim(state.checkpoint) != 4 or jnp.ndim(state.k) != 4:
        got = f"checkpoint {state.checkpoint.shape}, k {state.k.shape}"
        checks.fail("state", got, "[P, HV, V, K] and [P, H, R, K]", make)
    P, HV, V, K = state.checkpoint.shape
    H, R = state.k.shape[1:3]
    if R not in WINDOWS:
        checks.fail("state.k", f"{R} records", f"one of {WINDOWS} records", make)
    shapes = dict(u=(P, HV, R, V), k=(P, H, R, K), k_scale=(P, H, R))
    shapes |= dict.fromkeys(("start", "committed", "pending"), (P,))
    for name, shape in shapes.items():
        if getattr(state, name).shape != shape:
            got = getattr(state, name).shape
            wanted = f"{shape}, as its checkpoint and k have"
            checks.fail(f"state.{name}", got, wanted, make)
    if state.log_decay.shape not in ((P, HV, R), (P, HV, R, K)):
        got, shape = state.log_decay.shape, (P, HV, R)
        checks.fail("state.log_decay", got, f"{shape}, or with K behind (KDA)", make)
    for name in ("start", "committed", "pending"):
        checks.integers(f"state.{name}", getattr(state, name))
    for name in ("u", "k_scale", "log_decay"):
        if getattr(state, name).dtype != jnp.float32:
            got = getattr(state, name).dtype
            checks.fail(f"state.{name}", got, "float32", make)


class Records(NamedTuple):
    """Records of rows in the order of their tokens: u [N HV R V], k [N HV R K] with its
    scale in it, log_decay [N HV R], or with K behind."""

    u: Array
    k: Array
    log_decay: Array


def in_order(state: ReplayState, slot: Array, start: Array) -> Records:
    R = state.window
    slot = slot[:, None]
    column = (start[:, None] + jnp.arange(R)) % R
    u, k, k_scale, log_decay = (
        x[slot, :, column].swapaxes(1, 2)
        for x in (state.u, state.k, state.k_scale, state.log_decay)
    )
    k = k.astype(jnp.float32) * k_scale[..., None]
    return Records(u, jnp.repeat(k, u.shape[1] // k.shape[1], axis=1), log_decay)


def folded(state: Array, records: Records, count: Array) -> Array:
    """The states [N HV V K] after their first `count` [N] records, float32."""
    R = records.u.shape[2]
    place = jnp.arange(R)
    valid = (place < count[:, None])[:, None, :, None]  # [N 1 R 1]
    per_k = records.log_decay.ndim == 4
    log_decay = records.log_decay if per_k else records.log_decay[..., None]
    log_decay = jnp.where(valid, log_decay, 0.0)
    # what is forgotten after each token: a sum of its own, so that none cancels
    later = (place[None, :] > place[:, None]).astype(jnp.float32)
    after = jnp.einsum("ij,nhjk->nhik", later, log_decay, precision="highest")
    k = jnp.where(valid, records.k * jnp.exp(after), 0.0)
    u = jnp.where(valid, records.u, 0.0)
    left = jnp.exp(jnp.sum(log_decay, axis=2))[:, :, None, :]
    return state * left + jnp.einsum("nhrv,nhrk->nhvk", u, k, precision="highest")
