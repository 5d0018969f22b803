"""Calls of `fused_update`: the table of cases, and inputs for one."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `fused_update`: shapes, modes and which rows are null.

    Attributes:
      lengths: tokens of each row.
      tokens: "dense" [N, T, ..], "packed" [L, ..] with `cu_seqlens`, or "single"
        [L, ..] without, one token a row.
      slots: "none" (a state per row), "paged", or "checkpoints" (a table of `columns`).
      null_rows: rows whose slot to read is null, that of the option `null_slot` first
        if there is one; their tokens are NaN.
      null_columns: (row, column) pairs of a table whose slot is null; if the row reads
        another column it is live and skips that write.
      bad_accepted: rows whose num_accepted is 0 or columns + 1, in turn; likewise null.
      fresh: rows with has_state False; their slots hold NaN.
      padding: tokens past the last row, NaN, in packed calls.
      options: further keyword arguments of `fused_update`.
    """

    name: str
    lengths: tuple[int, ...]
    H: int = 2
    HV: int = 4
    K: int = 32
    V: int = 32
    tokens: str = "dense"
    slots: str = "paged"
    columns: int = 4
    kda: bool = False
    state_dtype: str = "float32"
    act_dtype: str = "bfloat16"
    gate_spread: float = 1.0
    null_rows: tuple[int, ...] = ()
    null_columns: tuple[tuple[int, int], ...] = ()
    bad_accepted: tuple[int, ...] = ()
    fresh: tuple[int, ...] = ()
    padding: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def N(self) -> int:
        return len(self.lengths)

    @property
    def dead(self) -> set[int]:
        empty = {n for n, length in enumerate(self.lengths) if length == 0}
        return empty | set(self.null_rows) | set(self.bad_accepted)


def make(case: Case, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `fused_update` for a case, as NumPy arrays.

    Whatever must not be read is NaN: slots no live row reads, tokens of null rows,
    padding, the slots of rows that start afresh.
    """
    random = np.random.default_rng(seed)
    L = sum(case.lengths) + case.padding
    state, kwargs = _state_and_slots(case, random)
    if case.fresh:
        kwargs["has_state"] = np.array([n not in case.fresh for n in range(case.N)])

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    begin = np.concatenate([[0], np.cumsum(case.lengths)]).astype(np.int32)
    token_values = [
        normal(L, case.H, case.K),
        normal(L, case.H, case.K),
        normal(L, case.HV, case.V),
        normal(L, case.HV, *([case.K] if case.kda else [])) * case.gate_spread,
        normal(L, case.HV),
    ]
    for x in token_values:
        x[begin[-1] :] = np.nan
        for n in case.dead:
            x[begin[n] : begin[n + 1]] = np.nan
    if case.tokens == "packed":
        kwargs["cu_seqlens"] = begin
    elif case.tokens == "dense":
        token_values = [x.reshape(case.N, -1, *x.shape[1:]) for x in token_values]
    act = jnp.dtype(case.act_dtype)
    q, k, v, a, b = (x.astype(act) for x in token_values)
    A_log = np.log(random.uniform(0.5, 8, case.HV)).astype(np.float32)
    dt_bias = normal(case.HV, *([case.K] if case.kda else [])).astype(act)
    kwargs |= dict(case.options)
    return (
        state.astype(jnp.dtype(case.state_dtype)),
        q,
        k,
        v,
        A_log,
        a,
        b,
        dt_bias,
    ), kwargs


def _state_and_slots(case: Case, random: np.random.Generator):
    S = case.columns if case.slots == "checkpoints" else 1
    P = case.N if case.slots == "none" else 2 * case.N * S + 3
    shape = (P, case.HV, case.V, case.K)
    state = np.full(shape, np.nan, np.float32)
    if case.slots == "none":
        table = np.arange(case.N, dtype=np.int32)[:, None]
        accepted = np.ones(case.N, np.int32)
    else:
        null_slot = dict(case.options).get("null_slot")
        own = [slot for slot in range(P) if slot != null_slot]
        table = random.permutation(own)[: case.N * S].reshape(-1, S).astype(np.int32)
        accepted = random.integers(1, S + 1, case.N).astype(np.int32)
        nulls = (-1, P, P + 7) if null_slot is None else (null_slot, -1, P)
        for i, n in enumerate(case.null_rows):
            table[n, accepted[n] - 1] = nulls[i % 3]
        for n, column in case.null_columns:
            table[n, column] = -1
    for n in range(case.N):
        slot = table[n, accepted[n] - 1]
        if n not in case.dead and n not in case.fresh and 0 <= slot < P:
            state[slot] = random.standard_normal(shape[1:])
    kwargs: dict[str, Any] = {}
    if case.slots == "checkpoints":
        for i, n in enumerate(case.bad_accepted):
            accepted[n] = (0, S + 1)[i % 2]
        kwargs |= dict(slots=table, num_accepted=accepted)
    elif case.slots == "paged":
        kwargs["slots"] = table[:, 0]
    return state, kwargs


CASES = (
    Case("decode", (1,) * 3),
    Case("decode, packed", (1,) * 3, tokens="single"),
    Case("decode, float32", (1,) * 3, act_dtype="float32"),
    Case("decode, float16", (1,) * 3, act_dtype="float16", state_dtype="float16"),
    Case("decode, bfloat16 state", (1,) * 3, state_dtype="bfloat16"),
    Case("decode, state per row", (1,) * 3, slots="none"),
    Case("decode, nulls", (1,) * 5, null_rows=(0, 2, 3), fresh=(4,), tokens="single"),
    Case("decode, null slot", (1,) * 4, null_rows=(0, 2), options=(("null_slot", 0),)),
    Case("decode, one head", (1,) * 2, H=1, HV=1, K=16, V=16),
    Case("decode, HV = 3 H", (1,) * 2, H=2, HV=6, K=64, V=64),
    Case("decode, HV = 8 H", (1,) * 2, H=1, HV=8, K=16, V=32),
    Case("decode, K=96 V=192", (1,) * 2, H=2, HV=2, K=96, V=192),
    Case("decode, K=128 V=128", (1,) * 2, K=128, V=128),
    Case("decode, K=192 V=96", (1,) * 2, H=1, HV=2, K=192, V=96),
    Case("decode, K=256 V=256", (1,) * 2, H=1, HV=1, K=256, V=256),
    Case("decode, odd dims", (1,) * 2, H=1, HV=3, K=20, V=7, act_dtype="float32"),
    Case("decode, K=1 V=1", (1,) * 2, H=1, HV=2, K=1, V=1, act_dtype="float32"),
    Case("decode, extreme gates", (1,) * 3, gate_spread=40.0),
    Case(
        "decode, plain q and k",
        (1,) * 2,
        options=(("qk_l2norm", False), ("scale", 0.3)),
    ),
    Case(
        "decode, softplus",
        (1,) * 2,
        options=(("softplus_beta", 2.0), ("softplus_threshold", 3.0)),
    ),
    Case("decode, doubled beta", (1,) * 2, options=(("allow_neg_eigval", True),)),
    Case("decode, float32 out", (1,) * 2, options=(("out_dtype", jnp.float32),)),
    Case("decode, KDA", (1,) * 3, H=4, kda=True),
    Case("dense, T=3", (3,) * 3, fresh=(1,)),
    Case("dense, T=5", (5,) * 3, null_rows=(1,)),
    Case("dense, T=17, bfloat16", (17,) * 2, state_dtype="bfloat16"),
    Case("dense, T=17, nulls", (17,) * 4, null_rows=(1, 3)),
    Case("dense, state per row", (3,) * 2, slots="none", fresh=(0,)),
    Case("dense, KDA", (5,) * 2, H=4, kda=True, K=48),
    Case(
        "dense, KDA, lower bound",
        (5,) * 2,
        H=4,
        kda=True,
        options=(("gate_lower_bound", -5.0),),
    ),
    Case("dense, lower bound", (3,) * 2, options=(("gate_lower_bound", -5.0),)),
    Case("packed", (3, 0, 17, 1), tokens="packed", null_rows=(3,), padding=5),
    Case(
        "packed, whole groups",
        (4, 8, 1, 9, 0, 5),
        tokens="packed",
        null_rows=(1, 4),
        padding=1,
    ),
    Case("packed, state per row", (3, 0, 2), tokens="packed", slots="none", padding=1),
    Case("packed, fresh", (2, 3, 1), tokens="packed", fresh=(0, 2)),
    Case("packed, KDA", (4, 1, 0, 2), tokens="packed", kda=True, H=4, padding=2),
    Case("packed, K=96 V=192", (2, 3), tokens="packed", H=1, HV=3, K=96, V=192),
    Case("checkpoints, T=1", (1,) * 3, slots="checkpoints"),
    Case("checkpoints, T=1, packed", (1,) * 3, slots="checkpoints", tokens="single"),
    Case("checkpoints, T=4", (4,) * 3, slots="checkpoints"),
    Case("checkpoints, T=2 of 4", (2,) * 3, slots="checkpoints", fresh=(1,)),
    Case(
        "checkpoints, nulls",
        (4, 2, 4, 0, 3, 1, 4),
        slots="checkpoints",
        tokens="packed",
        null_rows=(0, 5),
        bad_accepted=(1, 4),
        padding=3,
    ),
    Case(
        "checkpoints, past the end",
        (6, 3, 5),
        slots="checkpoints",
        tokens="packed",
        columns=3,
    ),
    Case(
        "checkpoints, null columns",
        (4, 4, 4),
        slots="checkpoints",
        null_columns=((0, 1), (1, 3), (2, 0)),
    ),
    Case(
        "checkpoints, bfloat16",
        (4, 1, 3),
        slots="checkpoints",
        tokens="packed",
        state_dtype="bfloat16",
        K=64,
        V=64,
    ),
    Case("checkpoints, KDA", (3,) * 2, slots="checkpoints", kda=True, H=4),
    Case(
        "states, T=3", (3,) * 3, null_rows=(1,), options=(("per_token_states", True),)
    ),
    Case(
        "states, packed",
        (3, 0, 2, 1),
        tokens="packed",
        null_rows=(3,),
        fresh=(2,),
        padding=4,
        options=(("per_token_states", True),),
    ),
    Case(
        "states, from checkpoints",
        (4, 5, 2),
        slots="checkpoints",
        tokens="packed",
        bad_accepted=(2,),
        options=(("per_token_states", True),),
    ),
    Case(
        "states, T=1, nulls",
        (1,) * 3,
        null_rows=(0,),
        state_dtype="bfloat16",
        options=(("per_token_states", True),),
    ),
)

GATES_OPEN = (("gate_lower_bound", -1e-4),)  # nothing is forgotten
# of chunk_update
CHUNK_CASES = (
    *(Case(f"T={T}", (T,) * 2) for T in (1, 63, 64, 65)),
    Case("T=1000", (1000,), H=1, HV=2),
    Case("state per row", (70, 70), slots="none", fresh=(0,), act_dtype="float32"),
    Case("float16", (70,), act_dtype="float16", state_dtype="float16"),
    Case("bfloat16 state", (150,) * 2, state_dtype="bfloat16"),
    Case("nulls", (70,) * 4, null_rows=(0, 2), fresh=(3,)),
    Case("null slot", (5,) * 4, null_rows=(1, 3), options=(("null_slot", 0),)),
    Case("ragged", (130, 0, 64, 1, 63, 65), tokens="packed", null_rows=(3,), padding=9),
    Case("ragged, odd dims", (70, 3), tokens="packed", H=1, HV=3, K=20, V=7),
    Case("ragged, fresh", (70, 0, 5, 64), tokens="packed", fresh=(2, 3)),
    Case("K=8 V=6", (70, 3), tokens="packed", H=1, HV=2, K=8, V=6),
    Case("K=1 V=1", (70,), H=1, HV=2, K=1, V=1, act_dtype="float32"),
    Case("one token a row", (1,) * 5, tokens="single", null_rows=(2,)),
    Case("K=96 V=192", (70,), H=1, HV=2, K=96, V=192),
    Case("K=128 V=128", (130,), H=1, HV=2, K=128, V=128),
    Case("K=256 V=64", (70,), H=1, HV=1, K=256, V=64),
    Case("extreme gates", (150,) * 2, gate_spread=40.0, act_dtype="float32"),
    Case("gates open", (300,), act_dtype="float32", options=GATES_OPEN),
    Case("doubled beta", (130,), options=(("allow_neg_eigval", True),)),
    Case("options", (70,), options=(("out_dtype", jnp.float32), ("scale", 0.3))),
)
CHUNK_KDA_CASES = (
    Case("KDA", (100, 33), tokens="packed", H=4, kda=True, padding=3),
    Case("KDA, extreme gates", (100,), H=2, HV=4, kda=True, gate_spread=40.0),
    Case("KDA, bound", (100,), H=4, kda=True, options=(("gate_lower_bound", -5.0),)),
    Case("KDA, dense nulls", (66,) * 3, H=4, kda=True, null_rows=(0,), fresh=(2,)),
    Case(
        "KDA, ragged nulls",
        (70, 2, 0, 65, 3),
        tokens="packed",
        H=4,
        kda=True,
        null_rows=(1,),
        fresh=(3,),
        padding=2,
    ),
)
