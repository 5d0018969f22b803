"""Prefill and train: `chunk_update`, forward and backward, on whole sequences."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
from common import L2_BYTES, Expected, Suite

import gdn_jax
from gdn_jax import ChunkConfig, testing

INPUTS = (
    "normal q, k, v, a, b; state 0.1 * normal; A in [1, 16], time steps "
    "softplus(dt_bias) in [0.001, 0.1], both as models begin"
)
# design.md's for chunked forms: float32 where the state is, over long sequences.
FLOAT32 = 1e-5
# FLA keeps norms, W, U and a chunk's state in bfloat16; its own tests allow 0.005 to
# 0.02 on float16. A wrong result is off by 1, not by a hundredth.
PEERS = 2e-2


@dataclasses.dataclass(frozen=True)
class Problem:
    """N rows of T tokens; or packed rows of `lengths`, N of them, N * T tokens."""

    N: int
    T: int
    lengths: tuple[int, ...] = ()
    H: int = 16
    HV: int = 32
    K: int = 128
    V: int = 128
    state_dtype: str = "float32"
    act_dtype: str = "bfloat16"
    backward: bool = False

    def __post_init__(self):
        if self.lengths and (self.N, self.tokens) != (
            len(self.lengths),
            sum(self.lengths),
        ):
            raise ValueError(f"lengths must be N, and sum to N * T; got {self}.")

    @property
    def title(self) -> str:
        rows = f" of {self.lengths}" if self.lengths else ""
        return (
            f"N={self.N} T={self.T}{rows} H={self.H} HV={self.HV} K={self.K} "
            f"V={self.V} state {self.state_dtype}"
        )

    @property
    def tokens(self) -> int:
        return self.N * self.T

    @property
    def moved_bytes(self) -> int:
        """Least traffic: tokens in and out and the state read and written, once; for a
        backward pass the cotangents read and the gradients written besides."""
        act = jnp.dtype(self.act_dtype).itemsize
        state = (
            self.N * self.HV * self.V * self.K * jnp.dtype(self.state_dtype).itemsize
        )
        tokens = act * self.tokens * 2 * (self.H * self.K + self.HV)
        values = act * self.tokens * self.HV * self.V
        forward = 2 * state + tokens + 2 * values
        return 2 * forward if self.backward else forward

    @property
    def num_sets(self) -> int:
        """So many that the calls take turns through four times the L2 cache."""
        return max(2, -(-4 * L2_BYTES // self.moved_bytes))


def make_inputs(problem: Problem, seed: int = 0) -> dict[str, Any]:
    """On the device, from normal draws; never zeros, which run faster than data."""
    p, act = problem, jnp.dtype(problem.act_dtype)
    lead = (p.tokens,) if p.lengths else (p.N, p.T)
    shapes = {
        "state": (p.N, p.HV, p.V, p.K),
        "q": (*lead, p.H, p.K),
        "k": (*lead, p.H, p.K),
        "v": (*lead, p.HV, p.V),
        "a": (*lead, p.HV),
        "b": (*lead, p.HV),
    }
    if p.backward:
        shapes |= {"state_weights": shapes["state"], "out_weights": shapes["v"]}

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, len(shapes))
        drawn = {
            name: jax.random.normal(one, shape, jnp.float32)
            for one, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        return {
            name: (0.1 * x).astype(p.state_dtype) if "state" in name else x.astype(act)
            for name, x in drawn.items()
        }

    random = np.random.default_rng(seed)
    step = np.exp(random.uniform(np.log(1e-3), np.log(1e-1), p.HV))
    ends = np.cumsum([0, *p.lengths])
    return {
        "sets": [
            draw(key) for key in jax.random.split(jax.random.key(seed), p.num_sets)
        ],
        "A_log": jnp.log(jnp.asarray(random.uniform(1, 16, p.HV), jnp.float32)),
        "dt_bias": jnp.asarray(np.log(np.expm1(step)), jnp.float32),
        "cu_seqlens": jnp.asarray(ends, jnp.int32) if p.lengths else None,
    }


def arguments(inputs: Mapping[str, Any], x: Mapping[str, jax.Array]) -> dict[str, Any]:
    """What our ops take, by name, of a set's arrays."""
    names = ("state", "q", "k", "v", "a", "b")
    return {name: x[name] for name in names} | shared(inputs)


def shared(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What all sets have in common."""
    return {name: inputs[name] for name in ("A_log", "dt_bias", "cu_seqlens")}


def forward(
    problem: Problem, inputs: Mapping[str, Any], *, op: Callable, **options
) -> peers.Call:
    """One of our ops under jit, each set's state donated and handed on."""
    del problem

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, rest):
        return op(state, **rest, **options)

    sets = [arguments(inputs, x) for x in inputs["sets"]]
    states = [jnp.array(x.pop("state")) for x in sets]
    held = {}

    def run(i):
        i %= len(sets)
        states[i], out = step(states[i], sets[i])
        held.update(state=states[i], out=out)

    return peers.Call(run, lambda: held, lambda name: True, "")


def gradients(inputs: Mapping[str, Any], x: Mapping[str, jax.Array], **options):
    """Of sum(out * out_weights) + sum(state * state_weights), beside state and out;
    without the sums themselves, which are not ours to time."""
    given = arguments(inputs, x)
    bounds = given.pop("cu_seqlens")

    def op(given):
        return gdn_jax.chunk_update(**given, cu_seqlens=bounds, **options)

    (state, out), pullback = jax.vjp(op, given)
    [found] = pullback((x["state_weights"], x["out_weights"]))
    return {"state": state, "out": out} | {f"d_{n}": d for n, d in found.items()}


def forward_and_backward(
    problem: Problem, inputs: Mapping[str, Any], **options
) -> peers.Call:
    """As in training: no state is donated, for the backward pass starts from it."""
    del problem
    step = jax.jit(functools.partial(gradients, **options))
    held = {}

    def run(i):
        held.update(step(shared(inputs), inputs["sets"][i % len(inputs["sets"])]))

    return peers.Call(run, lambda: held, lambda name: True, "")


def expect(
    problem: Problem, inputs: Mapping[str, Any], implementation: str = "triton"
) -> dict[str, Expected]:
    """What a walk token by token leaves in float32; of dense tokens, the first row's.
    Gradients: of the XLA chunked form in float32.

    The walk is the kernel, which is tested against the oracle: `lax.scan` would take
    minutes over these lengths.
    """
    first = {name: x.astype(jnp.float32) for name, x in inputs["sets"][0].items()}
    where = slice(None) if problem.lengths else slice(1)
    rows = {name: x[where] for name, x in first.items()}
    walk = jax.jit(
        functools.partial(gdn_jax.fused_update, implementation=implementation)
    )
    state, out = walk(**arguments(inputs, rows))
    expected = {
        "state": Expected(where, np.asarray(state)),
        "out": Expected(where, np.asarray(out)),
    }
    if problem.backward:
        exact = jax.jit(functools.partial(gradients, implementation="xla"))
        for name, value in exact(shared(inputs), first).items():
            if name not in expected:
                expected[name] = Expected(slice(None), np.asarray(value))
    return expected


def tolerance(problem: Problem, what: str, *, is_ours: bool) -> float:
    """Gradients come of bfloat16 tokens and cotangents, whatever their own dtype."""
    if not is_ours:
        return PEERS
    if what == "state":
        return max(testing.TOLERANCE["state", problem.state_dtype], FLOAT32)
    return max(testing.TOLERANCE["out", problem.act_dtype], FLOAT32)


# Launches of the walk and of what prepares it, beside the one that None takes.
LAUNCHES = (
    ChunkConfig(),
    ChunkConfig(num_stages=2),
    ChunkConfig(16),
    ChunkConfig(16, num_warps=8),
    ChunkConfig(64, num_warps=8, num_stages=2),
    ChunkConfig(prepare_warps=8),
)


def launches() -> dict[str, Callable]:
    def named(config: ChunkConfig) -> str:
        fields = dataclasses.asdict(config).items()
        return "triton " + " ".join(f"{name}={value}" for name, value in fields)

    chunk = functools.partial(forward, op=gdn_jax.chunk_update, implementation="triton")
    return {named(c): functools.partial(chunk, config=c) for c in LAUNCHES}


def prefill(*, tune: bool) -> Suite:
    chunk = functools.partial(forward, op=gdn_jax.chunk_update)
    walk = functools.partial(forward, op=gdn_jax.fused_update)
    return Suite(
        name="prefill",
        inputs=INPUTS,
        make_inputs=make_inputs,
        expect=expect,
        tolerance=tolerance,
        ours=lambda problem: (
            {
                "triton": functools.partial(chunk, implementation="triton"),
                "xla": functools.partial(chunk, implementation="xla"),
                "token_by_token": functools.partial(walk, implementation="triton"),
            }
            | (launches() if tune else {})
        ),
        peers=lambda problem: peers.PREFILL,
    )


def train() -> Suite:
    both = forward_and_backward
    return Suite(
        name="train",
        inputs=INPUTS + "; cotangents normal, the final state's 0.1 * normal",
        make_inputs=make_inputs,
        expect=expect,
        tolerance=tolerance,
        ours=lambda problem: {
            "triton": functools.partial(both, implementation="triton"),
            "xla": functools.partial(both, implementation="xla"),
        },
        peers=lambda problem: peers.TRAIN,
    )
