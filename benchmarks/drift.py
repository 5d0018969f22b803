"""How far states drift over a long text: python benchmarks/drift.py [--steps 10000]

Speculative steps of four tokens, of which one to four stand at random, on states of
each dtype: by replay, in two and in three parts and with records rounded to bfloat16,
and token by token in place; against float64, which sees the same rounded inputs. Half
of the heads forget slowly. Writes results/<device>/drift.json; runs on a CPU too, by
XLA.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from common import console, header, results_folder
from rich.progress import track

import gdn_jax
from gdn_jax import ReplayConfig, ReplayState, testing

N, T, H, HV, K, V = 4, 4, 2, 4, 128, 128
DTYPES = ("float32", "bfloat16", "float16")
ROUNDED = "records", "bfloat16"
MARKS = 40  # steps at which errors are told, evenly spaced on a logarithmic scale
SLOWEST, FASTEST = 1e-3, 16.0  # A of the first and the last head
INPUTS = (
    f"{N} rows; normal q, k, v, a, b in bfloat16; dt_bias 0; A from {SLOWEST} to "
    f"{FASTEST} over {HV} heads; 1 to {T} tokens of a step stand, uniformly (seed 0)"
)


@functools.partial(jax.jit, static_argnums=1)
def draw(key: jax.Array, steps: int) -> tuple[dict[str, jax.Array], jax.Array]:
    """Tokens [steps, N, T, ..] and how many stand [steps, N]."""
    shapes = dict(q=(H, K), k=(H, K), v=(HV, V), a=(HV,), b=(HV,))
    keys = iter(jax.random.split(key, 1 + len(shapes)))
    tokens = {
        name: jax.random.normal(next(keys), (steps, N, T, *shape), jnp.bfloat16)
        for name, shape in shapes.items()
    }
    return tokens, jax.random.randint(next(keys), (steps, N), 1, T + 1)


def head_parameters() -> tuple[jax.Array, jax.Array]:
    """A_log, dt_bias [HV]"""
    rates = np.geomspace(SLOWEST, FASTEST, HV).astype(np.float32)
    return jnp.log(jnp.asarray(rates)), jnp.zeros(HV)


def arguments(tokens: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    A_log, dt_bias = head_parameters()
    x = tokens
    return x["q"], x["k"], x["v"], A_log, x["a"], x["b"], dt_bias


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def by_replay(state: ReplayState, tokens, stood, options) -> ReplayState:
    """`stood` [steps, N], of each step's step before. With ROUNDED among the options
    records are, after each step."""
    rounds = ROUNDED in options
    keywords = dict(option for option in options if option != ROUNDED)

    def step(state, x):
        tokens, num_accepted = x
        state, _ = gdn_jax.replay_update(
            state, *arguments(tokens), num_accepted=num_accepted, **keywords
        )
        if rounds:
            u = jax.lax.reduce_precision(state.u, exponent_bits=8, mantissa_bits=7)
            state = state._replace(u=u)
        return state, None

    return jax.lax.scan(step, state, (tokens, stood))[0]


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def in_place(pool: jax.Array, tokens, stand, options) -> jax.Array:
    """Token by token; those that do not stand are null."""

    def step(pool, x):
        tokens, num_accepted = x
        for t in range(T):
            of_token = {name: y[:, t : t + 1] for name, y in tokens.items()}
            slots = jnp.where(t < num_accepted, jnp.arange(N), -1).astype(jnp.int32)
            pool, _ = gdn_jax.fused_update(
                pool, *arguments(of_token), slots=slots, **dict(options)
            )
        return pool, None

    return jax.lax.scan(step, pool, (tokens, stand))[0]


@functools.partial(jax.jit, donate_argnums=0)
def exactly(state: jax.Array, tokens, stand) -> jax.Array:
    """In float64, the same token by token."""
    A_log, dt_bias = head_parameters()

    def wide(x):
        return x.astype(jnp.float64)

    def token(state, x):
        q, k, v, a, b, stands = x
        del q
        log_decay = -jnp.exp(wide(A_log)) * jax.nn.softplus(wide(a) + wide(dt_bias))
        k = wide(k)
        k = k / jnp.sqrt(jnp.sum(k * k, axis=-1, keepdims=True) + 1e-6)
        k = jnp.repeat(k, HV // H, axis=1)
        new = jnp.exp(log_decay)[:, :, None, None] * state
        predicted = jnp.einsum("nhvk,nhk->nhv", new, k)
        u = jax.nn.sigmoid(wide(b))[:, :, None] * (wide(v) - predicted)
        new += u[..., None] * k[:, :, None, :]
        return jnp.where(stands[:, None, None, None], new, state), None

    def step(state, x):
        tokens, num_accepted = x
        stands = jnp.arange(T)[:, None] < num_accepted[None, :]
        names = ("q", "k", "v", "a", "b")
        each = tuple(tokens[name].swapaxes(0, 1) for name in names)
        return jax.lax.scan(token, state, (*each, stands))[0], None

    return jax.lax.scan(step, state, (tokens, stand))[0]


def marks(steps: int) -> list[int]:
    found = np.unique(np.geomspace(1, steps, MARKS).round().astype(int))
    return found.tolist()


def measure(dtypes: tuple[str, ...], steps: int, way: str) -> list[dict[str, Any]]:
    """Errors by contender at each mark."""
    pool = 0.1 * jax.random.normal(jax.random.key(1), (N, HV, V, K), jnp.float32)
    states: dict[tuple[str, str], Any] = {}
    plain = (("implementation", way),)
    options: dict[str, tuple] = {"in place": plain}
    if way == "xla":  # whose products are float32's
        options["replay"] = plain
    else:
        for parts in (2, 3):
            config = ("config", ReplayConfig(parts=parts))
            options[f"replay, {parts} parts"] = (*plain, config)
    first = list(options)[1]
    options["replay, bfloat16 records"] = (*options[first], ROUNDED)
    for dtype in dtypes:
        begin = pool.astype(dtype)
        for name in options:
            if name == "in place":
                states[dtype, name] = jnp.copy(begin)
            elif name != "replay, 3 parts" or dtype == "float32":
                # a copy each, since steps are given their state to keep
                states[dtype, name] = ReplayState.from_dense(
                    jnp.copy(begin), num_key_heads=H
                )
    with jax.enable_x64(True):
        exact = {dtype: pool.astype(dtype).astype(jnp.float64) for dtype in dtypes}
    rows, done = [], 0
    stood = jnp.ones((1, N), jnp.int32)
    for mark in track(marks(steps), description="drift", console=console):
        # few lengths, so few compilations
        for length in pieces(mark - done):
            tokens, stand = draw(jax.random.fold_in(jax.random.key(0), done), length)
            before = jnp.concatenate([stood, stand[:-1]])
            for (dtype, name), state in states.items():
                run, counts = (
                    (in_place, stand) if name == "in place" else (by_replay, before)
                )
                states[dtype, name] = run(state, tokens, counts, options[name])
            with jax.enable_x64(True):
                exact = {
                    dtype: exactly(state, tokens, stand)
                    for dtype, state in exact.items()
                }
            stood, done = stand[-1:], done + length
        for (dtype, name), state in states.items():
            got = state if name == "in place" else state.to_dense(stood[0])
            error = testing.relative_error(got, exact[dtype])
            rows.append(dict(state_dtype=dtype, how=name, step=done, error=error))
    return rows


def pieces(steps: int) -> list[int]:
    """A few lengths that add up to it."""
    found = []
    for length in (512, 64, 8, 1):
        count, steps = divmod(steps, length)
        found += count * [length]
    return found


def main(
    steps: int = 10_000,
    dtype: list[str] = typer.Option(list(DTYPES)),  # noqa: B008
    out: pathlib.Path | None = None,
) -> None:
    result = header(INPUTS)
    del result["time"]  # nothing is timed
    way = "triton" if jax.default_backend() == "gpu" else "xla"
    result |= {"steps": steps, "implementation": way}
    result["rows"] = measure(tuple(dtype), steps, way)
    folder = results_folder(result["device"], out)
    (folder / "drift.json").write_text(json.dumps(result, indent=1) + "\n")
    last = {(x["state_dtype"], x["how"]): x["error"] for x in result["rows"]}
    for (state, how), error in last.items():
        console.print(f"{state:10} {how:16} {error:.2e}")


if __name__ == "__main__":
    typer.run(main)
