"""A decode step of the whole layer: python benchmarks/layer.py [--quick]

Microseconds of all its kernels and how many they are, fused against unfused update, in
the geometries of Qwen3.5. A step is given another layer's weights and states than the
one before, as in a model, so that none finds its own in the L2 cache.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import typer
from common import L2_BYTES, Expected, Suite, run_suite
from flax.linen import meta

import gdn_jax
from gdn_jax import nn, testing

INPUTS = (
    "normal x and convolution inputs; weights as the layer begins them; state 0.1 * "
    "normal, slots in random order"
)
HIDDEN = {"Qwen3.5-9B": 4096, "Qwen3.5-35B-A3B": 2048}
BATCHES = (1, 8, 64, 256)
CHECKED_ROWS = 16
# x, channels, out, normed out and y are each rounded on the way to y.
ROUNDINGS = 5


@dataclasses.dataclass(frozen=True)
class Problem:
    """N sequences, one token each, through one layer of a model."""

    model: str
    N: int
    hidden_size: int
    H: int = 16
    HV: int = 32
    K: int = 128
    V: int = 128
    state_dtype: str = "float32"
    act_dtype: str = "bfloat16"

    @property
    def title(self) -> str:
        return (
            f"{self.model}: N={self.N} D={self.hidden_size} H={self.H} HV={self.HV} "
            f"K={self.K} V={self.V} state {self.state_dtype}"
        )

    @property
    def moved_bytes(self) -> int:
        """Least traffic: the projections' weights, x and y, the states read and
        written (of the convolution's the four inputs that a token needs)."""
        act = jnp.dtype(self.act_dtype).itemsize
        values, keys = self.HV * self.V, 2 * self.H * self.K
        columns = keys + 3 * values + 2 * self.HV  # channels, z, out; a and b
        state = values * self.K * jnp.dtype(self.state_dtype).itemsize
        conv = 4 * (keys + values) * act
        row = 2 * state + conv + 2 * self.hidden_size * act
        return self.hidden_size * columns * act + self.N * row

    @property
    def num_layers(self) -> int:
        return max(2, -(-4 * L2_BYTES // self.moved_bytes))


def unfused_update(layer, state, qkv, a, b, tables, path, implementation):
    """A layer's update with its gates in a launch of their own."""
    del path
    log_decay, beta = gdn_jax.gates(
        layer.A_log,
        a,
        b,
        layer.dt_bias,
        allow_neg_eigval=layer.allow_neg_eigval,
        gate_lower_bound=layer.gate_lower_bound,
        implementation=implementation,
    )
    return gdn_jax.recurrent_update(
        state,
        *qkv,
        log_decay,
        beta,
        implementation=implementation,
        **tables.recurrent,
    )


class Unfused(nn.GatedDeltaNet):
    update = unfused_update


def make_layer(problem: Problem, cls: type = nn.GatedDeltaNet, dtype: Any = None):
    p = problem
    dtype = jnp.dtype(p.act_dtype if dtype is None else dtype)
    return cls(p.hidden_size, p.H, p.HV, p.K, p.V, dtype=dtype, param_dtype=dtype)


def make_inputs(problem: Problem, seed: int = 0) -> dict[str, Any]:
    """For each layer its parameters, and a state for each of N slots."""
    p, layer = problem, make_layer(problem)

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, 4)
        x = jax.random.normal(keys[0], (p.N, 1, p.hidden_size), layer.dtype)
        state = layer.init_state(p.N, recurrent_dtype=jnp.dtype(p.state_dtype))
        normal = functools.partial(jax.random.normal, dtype=jnp.float32)
        buffer = normal(keys[1], state.conv.buffer.shape)
        recurrent = 0.1 * normal(keys[2], state.recurrent.shape)
        state = state._replace(
            conv=state.conv._replace(buffer=buffer.astype(state.conv.buffer.dtype)),
            recurrent=recurrent.astype(state.recurrent.dtype),
        )
        return {"x": x, "state": state, "params": meta.unbox(layer.init(keys[3], x))}

    keys = jax.random.split(jax.random.key(seed), p.num_layers)
    slots = np.random.default_rng(seed).permutation(p.N).astype(np.int32)
    return {"layers": [draw(key) for key in keys], "slots": jnp.asarray(slots)}


def step_of(
    problem: Problem, inputs: Mapping[str, Any], *, cls: type, implementation: str
) -> peers.Call:
    """A jitted step, each layer's state donated and handed on."""
    layer = make_layer(problem, cls)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, state, x, slots):
        return layer.apply(params, x, state, slots=slots, implementation=implementation)

    states = [jax.tree.map(jnp.array, each["state"]) for each in inputs["layers"]]
    held = {}

    def run(i):
        i %= len(states)
        each = inputs["layers"][i]
        y, states[i] = step(each["params"], states[i], each["x"], inputs["slots"])
        held.update(state=states[i].recurrent, out=y)

    return peers.Call(run, lambda: held, lambda name: True, "")


def expect(problem: Problem, inputs: Mapping[str, Any]) -> dict[str, Expected]:
    """The layer in float32 by the reference, on the first rows."""
    rows = min(problem.N, CHECKED_ROWS)
    layer, slots = make_layer(problem, dtype=jnp.float32), inputs["slots"][:rows]

    def exact(x):
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    first = jax.tree.map(exact, inputs["layers"][0])

    @jax.jit
    def step(params, state, x):
        return layer.apply(params, x, state, slots=slots, implementation="reference")

    with jax.default_matmul_precision("highest"):
        y, state = step(first["params"], first["state"], first["x"][:rows])
    touched = np.asarray(slots)
    return {
        "state": Expected(touched, np.asarray(state.recurrent[touched])),
        "out": Expected(slice(rows), np.asarray(y)),
    }


def tolerance(problem: Problem, what: str, *, is_ours: bool) -> float:
    """The state, too, is made of rounded tokens."""
    del what, is_ours
    return ROUNDINGS * testing.TOLERANCE["out", problem.act_dtype]


SUITE = Suite(
    name="layer",
    inputs=INPUTS,
    make_inputs=make_inputs,
    expect=expect,
    tolerance=tolerance,
    ours=lambda problem: {
        "triton": functools.partial(
            step_of, cls=nn.GatedDeltaNet, implementation="triton"
        ),
        "unfused": functools.partial(step_of, cls=Unfused, implementation="triton"),
        "xla": functools.partial(step_of, cls=nn.GatedDeltaNet, implementation="xla"),
    },
    peers=lambda problem: {},
)


def problems(quick: bool = False) -> list[Problem]:
    batches = (1, 64) if quick else BATCHES
    return [
        Problem(model, N, hidden_size=size)
        for model, size in HIDDEN.items()
        for N in batches
    ]


def main(quick: bool = False, out: pathlib.Path | None = None) -> None:
    run_suite(SUITE, problems(quick), out, quick=quick)


if __name__ == "__main__":
    typer.run(main)
