"""Schedules of replay calls, and what float64 has after each."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from gdn_jax.ops.gated_delta.replay_state import ReplayState
from gdn_jax.testing.cases import Case, make
from gdn_jax.testing.oracle import oracle


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Ragged calls of `rows` rows and `tokens` packed tokens over `slots` slots.

    In each call rows are other slots' at random, or nobody's; some slots begin anew,
    and some rows are given a count that makes them null.
    """

    name: str
    calls: int = 60
    window: int = 16
    longest: int = 5
    rows: int = 4
    slots: int = 6
    tokens: int = 12
    H: int = 2
    HV: int = 4
    K: int = 32
    V: int = 32
    kda: bool = False
    state_dtype: str = "float32"
    act_dtype: str = "bfloat16"
    gate_spread: float = 1.0


@dataclasses.dataclass(frozen=True)
class Call:
    """Positional arguments behind the state, and keywords."""

    args: tuple
    kwargs: dict
    pending: np.ndarray  # [P] before it


class Host:
    """Each slot's state after each of its last call's tokens, in float64."""

    def __init__(self, schedule: Schedule, seed: int | Sequence[int] = 0):
        self.schedule, self.random = schedule, np.random.default_rng(seed)
        x = schedule
        shape = x.slots, x.HV, x.V, x.K
        state = 0.1 * self.random.standard_normal(shape)
        self.begin = jnp.asarray(state, x.state_dtype)
        exact = np.asarray(self.begin).astype(np.float64)
        self.states = [[each] for each in exact]  # a last one where none is pending
        self.pending = np.zeros(x.slots, np.int32)

    def replay_state(self) -> ReplayState:
        """As it begins, NaN wherever no record is."""
        x = self.schedule
        state = ReplayState.from_dense(
            self.begin,
            num_key_heads=x.H,
            window=x.window,
            key_dtype=x.act_dtype,
            per_key_decay=x.kda,
        )
        poisoned = {
            name: jnp.full_like(getattr(state, name), jnp.nan)
            for name in ("u", "k", "k_scale", "log_decay")
        }
        start = jnp.asarray(self.random.integers(0, x.window, x.slots), jnp.int32)
        return state._replace(start=start, **poisoned)

    @property
    def latest(self) -> np.ndarray:
        """The states [P, HV, V, K] if all pending tokens stand."""
        return np.stack([states[-1] for states in self.states])

    def draw(self, *, faults: bool = True) -> Call:
        x, random = self.schedule, self.random
        chance = random.random if faults else lambda n: np.ones(n)
        slots = random.permutation(x.slots)[: x.rows].astype(np.int32)
        null = chance(x.rows) < 0.15
        slots = np.where(null, random.choice([-1, x.slots], x.rows), slots)
        lengths = random.integers(1, x.longest + 1, x.rows)
        lengths = np.where(chance(x.rows) < 0.1, 0, lengths)
        while lengths.sum() > x.tokens:
            lengths[lengths.argmax()] -= 1
        pending = self.pending[np.clip(slots, 0, x.slots - 1)]
        accepted = 1 + (random.random(x.rows) * pending).astype(np.int32)
        bad = (chance(x.rows) < 0.1) & (pending > 0)
        accepted = np.where(
            bad, random.choice([0, 1], x.rows) * (pending + 1), accepted
        )
        fresh = chance(x.rows) < 0.03
        L, f32 = x.tokens, np.float32

        def normal(*shape):
            return random.standard_normal(shape).astype(f32)

        decays = (x.HV, x.K) if x.kda else (x.HV,)
        arrays = [
            jnp.asarray(y, x.act_dtype)
            for y in (
                normal(L, x.H, x.K),
                normal(L, x.H, x.K),
                normal(L, x.HV, x.V),
                x.gate_spread * normal(L, *decays),
                normal(L, x.HV),
            )
        ]
        q, k, v, a, b = arrays
        A_log = np.log(np.linspace(1, 16, x.HV)).astype(f32)
        dt_bias = np.linspace(-2, 1, np.prod(decays)).reshape(decays).astype(f32)
        kwargs = dict(
            slots=slots.astype(np.int32),
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            num_accepted=accepted.astype(np.int32),
            has_state=~fresh,
        )
        args = (q, k, v, A_log, a, b, dt_bias)
        return Call(args, kwargs, self.pending.copy())

    def take(self, call: Call) -> np.ndarray:
        """Goes on by a call; its out."""
        x, kwargs = self.schedule, dict(call.kwargs)
        slots, accepted = kwargs["slots"], kwargs.pop("num_accepted")
        live = (slots >= 0) & (slots < x.slots)
        pool = self.latest
        for n in np.flatnonzero(live):
            pending = self.pending[slots[n]]
            if not kwargs["has_state"][n] or not pending:
                continue
            if not 1 <= accepted[n] <= pending:
                live[n] = False
            else:
                pool[slots[n]] = self.states[slots[n]][accepted[n] - 1]
        kwargs["slots"] = np.where(live, slots, -1)
        args = [np.asarray(y).astype(np.float64) for y in call.args]
        tokens, out, _ = oracle((pool, *args), kwargs | {"per_token_states": True})
        bounds = kwargs["cu_seqlens"]
        for n in np.flatnonzero(live & (np.diff(bounds) > 0)):
            own = tokens[bounds[n] : bounds[n + 1]]
            self.states[slots[n]] = list(own)
            self.pending[slots[n]] = len(own)
        return out


def dense_call(N=3, T=4, seed=0, **sizes):
    """A state of as many slots as rows, and a dense call's arguments behind it."""
    case = Case("dense", (T,) * N, slots="none", **sizes)
    (pool, *tokens), _ = make(case, seed)
    state = ReplayState.from_dense(
        pool, num_key_heads=case.H, key_dtype=case.act_dtype, per_key_decay=case.kda
    )
    return state, [jnp.asarray(x) for x in tokens]
