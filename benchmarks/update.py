"""Decode and verify: `fused_update` and what does the same, on slots of a pool."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
from common import L2_BYTES, Expected, Suite
from slot_copy import slot_copy

import gdn_jax
from gdn_jax import testing

CHECKED_ROWS = 16
INPUTS = "normal q, k, v, a, b, dt_bias; state 0.1 * normal; A in [1, 16]"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call: N rows of T tokens. T > 1 is a checkpoint verify with T columns.

    `dense` rows lie side by side [N T], as `gdn_jax.Engine` passes them, so that the
    kernel knows their length; others are packed, as vLLM does. `gib` makes the pool at
    least so large: past 4 GiB offsets take 64 bits.
    """

    N: int
    T: int = 1
    H: int = 16
    HV: int = 32
    K: int = 128
    V: int = 128
    state_dtype: str = "float32"
    act_dtype: str = "bfloat16"
    gib: int = 0
    dense: bool = False

    @property
    def tokens_per_row(self) -> int | None:
        """Where the kernel knows it."""
        return self.T if self.T == 1 or self.dense else None

    @property
    def title(self) -> str:
        return (
            f"N={self.N} T={self.T} H={self.H} HV={self.HV} K={self.K} V={self.V} "
            f"state {self.state_dtype}"
        )

    @property
    def state_bytes(self) -> int:
        """Of one slot."""
        return (
            self.HV * self.V * self.K * np.dtype(jnp.dtype(self.state_dtype)).itemsize
        )

    @property
    def P(self) -> int:
        """Enough slots that the calls rotate through four times the L2 cache (a cap
        keeps tiny states from making thousands of tables)."""
        call = self.state_bytes * self.N * self.T
        tables = max(1, -(-4 * L2_BYTES // call))
        return self.N * self.T * max(min(tables, 256), -(-self.gib * 2**30 // call))

    @property
    def moved_bytes(self) -> int:
        """Least traffic: the state read once, written once a token; tokens and out."""
        act = jnp.dtype(self.act_dtype).itemsize
        token = act * (2 * self.H * self.K + 2 * self.HV * self.V + 2 * self.HV)
        return self.N * (self.state_bytes * (1 + self.T) + self.T * token)


def make_inputs(problem: Problem, seed: int = 0) -> dict[str, Any]:
    """On the device, from normal draws; never zeros, which run faster than data."""
    p, act = problem, jnp.dtype(problem.act_dtype)
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    L = p.N * p.T

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.float32)

    random = np.random.default_rng(seed)
    columns = (p.N, p.T) if p.T > 1 else (p.N,)
    order = random.permutation(p.P).astype(np.int32).reshape(-1, *columns)
    inputs = {
        "state": (0.1 * normal(p.P, p.HV, p.V, p.K)).astype(p.state_dtype),
        "q": normal(L, p.H, p.K).astype(act),
        "k": normal(L, p.H, p.K).astype(act),
        "v": normal(L, p.HV, p.V).astype(act),
        "A_log": jnp.log(jnp.asarray(random.uniform(1, 16, p.HV), jnp.float32)),
        "a": normal(L, p.HV).astype(act),
        "b": normal(L, p.HV).astype(act),
        "dt_bias": normal(p.HV).astype(act),
        "slots": [jnp.asarray(table) for table in order],
    }
    if p.T > 1:
        accepted = random.integers(1, p.T + 1, p.N).astype(np.int32)
        inputs["num_accepted"] = jnp.asarray(accepted)
    return inputs


TOKENS = ("q", "k", "v", "A_log", "a", "b", "dt_bias")


def boundaries(problem: Problem) -> jax.Array | None:
    """`cu_seqlens` of packed rows."""
    if problem.tokens_per_row is not None:
        return None
    return jnp.arange(problem.N + 1, dtype=jnp.int32) * problem.T


def update(state, tokens, slots, accepted, bounds, *, unfused=False, **options):
    """Our op; `unfused` is the pair of gates and recurrent_update. Tokens come packed,
    and are folded where rows are dense."""
    q, k, v, A_log, a, b, dt_bias = tokens
    options |= dict(slots=slots, num_accepted=accepted, cu_seqlens=bounds)
    if slots.ndim == 2 and bounds is None:
        q, k, v, a, b = (x.reshape(*slots.shape, *x.shape[1:]) for x in (q, k, v, a, b))
    if unfused:
        implementation = options["implementation"]
        gates = gdn_jax.gates(A_log, a, b, dt_bias, implementation=implementation)
        state, out = gdn_jax.recurrent_update(state, q, k, v, *gates, **options)
    else:
        state, out = gdn_jax.fused_update(
            state, q, k, v, A_log, a, b, dt_bias, **options
        )
    return state, out.reshape(-1, *out.shape[-2:])


def ours(problem: Problem, inputs: Mapping[str, Any], *, unfused=False, **options):
    """A `peers.Call` for one of our implementations, the pool donated."""

    step = jax.jit(
        functools.partial(update, unfused=unfused, **options), donate_argnums=0
    )
    tokens = tuple(inputs[name] for name in TOKENS)
    accepted, bounds = inputs.get("num_accepted"), boundaries(problem)
    held = {"state": jnp.array(inputs["state"]), "out": None}

    def run(i):
        table = inputs["slots"][i % len(inputs["slots"])]
        held["state"], held["out"] = step(
            held["state"], tokens, table, accepted, bounds
        )

    return peers.Call(run, lambda: held, lambda name: True, "")


def copy(problem: Problem, inputs: Mapping[str, Any]):
    """XLA's in-place scaling of as many bytes as the update must read and write."""
    del inputs
    elements = problem.moved_bytes // 8
    scale = jax.jit(lambda x: x * jnp.float32(1.0001), donate_argnums=0)
    count = max(1, min(64, 4 * L2_BYTES // problem.moved_bytes))
    arrays = [jax.random.normal(jax.random.key(i), (elements,)) for i in range(count)]

    def run(i):
        arrays[i % count] = scale(arrays[i % count])

    return peers.Call(run, dict, lambda name: True, "")


def slots_alone(problem: Problem, inputs: Mapping[str, Any]):
    """The pool's slots read and written in place, and nothing else."""
    if problem.T > 1:
        raise peers.Unavailable("one token a row only")
    held = {"state": jnp.array(inputs["state"])}

    def run(i):
        table = inputs["slots"][i % len(inputs["slots"])]
        held["state"] = slot_copy(held["state"], table)

    return peers.Call(run, dict, lambda name: True, "no arithmetic")


def our_contenders(problem: Problem) -> dict[str, Callable]:
    del problem
    return {
        "copy": copy,
        "slots": slots_alone,
        "triton": functools.partial(ours, implementation="triton"),
        "unfused": functools.partial(ours, implementation="triton", unfused=True),
        "xla": functools.partial(ours, implementation="xla"),
    }


def expect(problem: Problem, inputs: Mapping[str, Any]) -> dict[str, Expected]:
    """What our oracle says of the first call's first rows."""
    rows = min(problem.N, CHECKED_ROWS)
    some = {
        name: inputs[name][: rows * problem.T] for name in ("q", "k", "v", "a", "b")
    }
    some |= {name: inputs[name] for name in ("A_log", "dt_bias")}
    table = inputs["slots"][0][:rows]
    accepted = inputs["num_accepted"][:rows] if problem.T > 1 else None
    state, out = jax.jit(
        functools.partial(update, implementation="reference", out_dtype=jnp.float32)
    )(
        inputs["state"].astype(jnp.float32),
        tuple(some[name] for name in TOKENS),
        table,
        accepted,
        boundaries(dataclasses.replace(problem, N=rows)),
    )
    touched = np.asarray(table).ravel()
    return {
        "state": Expected(touched, state[touched]),
        "out": Expected(slice(len(out)), out),
    }


def tolerance(problem: Problem, what: str, *, is_ours: bool) -> float:
    """Peers round more than we do in places; 4 still tells right from wrong."""
    dtypes = {"state": problem.state_dtype, "out": problem.act_dtype}
    return (1 if is_ours else 4) * testing.TOLERANCE[what, dtypes[what]]


def suite(name: str) -> Suite:
    return Suite(
        name=name,
        inputs=INPUTS,
        make_inputs=make_inputs,
        expect=expect,
        tolerance=tolerance,
        ours=our_contenders,
        peers=lambda problem: peers.DECODE if problem.T == 1 else peers.VERIFY,
    )
