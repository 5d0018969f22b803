"""How far states are from float64 after 100,000 steps: python benchmarks/horizon.py

`fused_update` in place, a token at a time, on states of each dtype; against float64,
which sees the same inputs. Heads forget and write at different rates, from those that
forget everything at once to those that hardly do. Nothing is stored: a step's inputs
are drawn on the device from a key that counts. 16-bit states are rounded to nearest and
stochastically; what the latter costs is timed on a GPU. Writes
results/<device>/horizon.json as it goes; runs on a CPU too, by XLA, where --quick is a
small part.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
import update
from common import REPEATS, console, header, results_folder, wait
from jax import lax
from rich.table import Table

import gdn_jax
from gdn_jax import testing, timing

N, K, V = 2, 128, 128
MARKS = 25  # steps at which errors are told, evenly spaced on a logarithmic scale
QUANTILES = 4096
TIMED = (64, 256)  # rows of a step that is timed, of Qwen3.5's heads


class Head(NamedTuple):
    """A kind of head. Its decay is exp(-A softplus(a)), beta sigmoid(b + shift), with
    normal a and b; its keys have `alike` of their numbers in common."""

    name: str
    A: float
    shift: float = 0.0
    alike: float = 0.0


HEADS = (
    Head("forgets at once", 16.0),
    Head("typical", 1.0),
    Head("slow", 1e-2),
    Head("slower", 1e-3),
    Head("slower, like keys", 1e-3, alike=0.75),
    Head("slower, writes little", 1e-3, -4.0),
    Head("slower, writes hardly", 1e-3, -7.0),
    Head("slowest, writes little", 1e-4, -6.0),
)
INPUTS = (
    f"{N} rows, {len(HEADS)} heads: "
    + "; ".join(
        f"{head.name} (A {head.A:g}, b {head.shift:+g}"
        + (f", {head.alike:g} of a key always the same)" if head.alike else ")")
        for head in HEADS
    )
    + f". Normal q, k, v, a, b of {QUANTILES} quantiles in bfloat16"
)


@dataclasses.dataclass(frozen=True)
class Contender:
    state_dtype: str
    rounding: str = "nearest"

    @property
    def title(self) -> str:
        return self.state_dtype + ", stochastic" * (self.rounding == "stochastic")


CONTENDERS = (
    Contender("float32"),
    Contender("bfloat16"),
    Contender("bfloat16", "stochastic"),
    Contender("float16"),
    Contender("float16", "stochastic"),
)


class Tables(NamedTuple):
    """What draws look up, so that every program has the same bits of them: values that
    it computes it may also leave in a wider dtype.

    Attributes:
      normal: [QUANTILES] bfloat16.
      b: [heads, QUANTILES] bfloat16, shifted.
      common, is_common: [heads, K] bfloat16 and bool, of keys.
      A_log, dt_bias: [heads] float32.
    """

    normal: jax.Array
    b: jax.Array
    common: jax.Array
    is_common: jax.Array
    A_log: jax.Array
    dt_bias: jax.Array


def make_tables() -> Tables:
    inverse = statistics.NormalDist().inv_cdf
    normal = np.array([inverse((i + 0.5) / QUANTILES) for i in range(QUANTILES)])
    shifts, rates, alike = (
        np.array([getattr(head, name) for head in HEADS])
        for name in ("shift", "A", "alike")
    )
    common = np.random.default_rng(0).normal(size=(len(HEADS), K))
    return Tables(
        jnp.asarray(normal, jnp.bfloat16),
        jnp.asarray(normal + shifts[:, None], jnp.bfloat16),
        jnp.asarray(common, jnp.bfloat16),
        jnp.asarray(np.arange(K) < alike[:, None] * K),
        jnp.asarray(np.log(rates), jnp.float32),
        jnp.zeros(len(HEADS), jnp.float32),
    )


def draw(tables: Tables, step: jax.Array) -> tuple[jax.Array, ...]:
    """q, k, v, a, b [N, heads, ..] of a step."""
    heads = len(HEADS)
    shape = N, heads, 2 * K + V + 2
    key = jax.random.fold_in(jax.random.key(0), step)
    found = jax.random.bits(key, shape, jnp.uint16) % jnp.uint16(QUANTILES)
    q, k, v, a, b = jnp.split(
        found.astype(jnp.int32), np.cumsum((K, K, V, 1)).tolist(), axis=-1
    )
    of_head = tables.b[jnp.arange(heads, dtype=jnp.int32), b[..., 0]]
    keys = jnp.where(tables.is_common, tables.common, tables.normal[k])
    q, v, a = (tables.normal[x] for x in (q, v, a[..., 0]))
    return q, keys, v, a, of_head


States = dict[Contender, tuple[jax.Array, jax.Array]]  # pool and last out of each


def begin_states(contenders: tuple[Contender, ...]) -> States:
    heads = len(HEADS)
    return {
        each: (
            jnp.zeros((N, heads, V, K), each.state_dtype),
            jnp.zeros((N, heads, V), jnp.float32),
        )
        for each in contenders
    }


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def advance(
    contenders: tuple[Contender, ...],
    implementation: str,
    states: list[tuple[jax.Array, jax.Array]],
    tables: Tables,
    first: jax.Array,
    end: jax.Array,
) -> list[tuple[jax.Array, jax.Array]]:
    """The contenders' states after the steps from `first` to `end`."""

    def step(i, states):
        q, k, v, a, b = draw(tables, i)
        key = jax.random.fold_in(jax.random.key(1), i)
        return [
            gdn_jax.fused_update(
                pool,
                *(q, k, v, tables.A_log, a, b, tables.dt_bias),
                implementation=implementation,
                out_dtype=jnp.float32,
                state_rounding=each.rounding,
                rounding_key=key if each.rounding == "stochastic" else None,
            )
            for each, (pool, _) in zip(contenders, states, strict=True)
        ]

    return lax.fori_loop(first, end, step, states)


@functools.partial(jax.jit, donate_argnums=0)
def advance_exactly(
    state: tuple[jax.Array, jax.Array], tables: Tables, first, end
) -> tuple[jax.Array, jax.Array]:
    """In float64, within `jax.enable_x64`."""
    rates = jnp.exp(tables.A_log.astype(jnp.float64))

    def unit(x):
        return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)

    def step(i, state):
        drawn = draw(tables, i)
        q, k, v, a, b = (x.astype(jnp.float64) for x in drawn)
        q, k = unit(q) * K**-0.5, unit(k)
        decay = jnp.exp(-rates * jax.nn.softplus(a + tables.dt_bias))
        new = decay[..., None, None] * state[0]
        u = v - jnp.sum(new * k[:, :, None, :], axis=-1)
        u *= jax.nn.sigmoid(b)[..., None]
        new += u[..., None] * k[:, :, None, :]
        return new, jnp.sum(new * q[:, :, None, :], axis=-1)

    return lax.fori_loop(first, end, step, state)


def marks(steps: int) -> list[int]:
    found = np.unique(np.geomspace(1, steps, MARKS).round().astype(int))
    return found.tolist()


def measure(contenders: tuple[Contender, ...], steps: int, implementation: str):
    """Yields the rows of each mark: the errors of each contender's heads."""
    tables, states = make_tables(), list(begin_states(contenders).values())
    with jax.enable_x64(True):
        exact = tuple(
            jnp.zeros((N, len(HEADS), *last), jnp.float64) for last in ((V, K), (V,))
        )
    done = 0
    for mark in marks(steps):
        first, end = jnp.int32(done), jnp.int32(mark)
        states = advance(contenders, implementation, states, tables, first, end)
        with jax.enable_x64(True):
            exact = advance_exactly(exact, tables, first, end)
        done, want = mark, [np.asarray(x) for x in exact]
        rows = []
        for each, found in zip(contenders, states, strict=True):
            got = [np.asarray(x, np.float64) for x in found]
            for i, head in enumerate(HEADS):
                state, out = (
                    testing.relative_error(x[:, i], y[:, i])
                    for x, y in zip(got, want, strict=True)
                )
                about = dataclasses.asdict(each) | dict(head=head.name, step=mark)
                rows.append(about | dict(error=state, out_error=out))
        yield rows


def time_rounding(rows: int, state_dtype: str) -> dict[str, Any]:
    """Microseconds of a decoding step of so many, by how its states are rounded."""
    problem = update.Problem(rows, state_dtype=state_dtype)
    inputs = update.make_inputs(problem)
    tokens = tuple(inputs[name] for name in update.TOKENS)
    pool, keys = inputs.pop("state"), jax.random.split(jax.random.key(2), 64)
    row: dict[str, Any] = dict(N=rows, state_dtype=state_dtype)
    for rounding in ("nearest", "stochastic"):

        @functools.partial(jax.jit, donate_argnums=0)
        def step(pool, tokens, slots, key, rounding=rounding):
            return gdn_jax.fused_update(
                pool,
                *tokens,
                slots=slots,
                implementation="triton",
                state_rounding=rounding,
                rounding_key=key if rounding == "stochastic" else None,
            )

        held = dict(pool=jnp.copy(pool))

        def run(i, step=step, held=held):
            slots = inputs["slots"][i % len(inputs["slots"])]
            held["pool"], _ = step(held["pool"], tokens, slots, keys[i % len(keys)])

        run(0)
        found = timing.measure(run, REPEATS, wait=wait, belongs=is_update)
        row[f"{rounding}_us"] = found.median_us
    return row


def is_update(kernel: str) -> bool:
    """The kernel itself: a caller makes its keys as it likes."""
    return "fused_update" in kernel


def main(
    steps: int = 100_000,
    quick: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    steps = min(steps, 2_000) if quick else steps
    result = header(INPUTS)
    result["time"] = f"the kernel alone, median of {REPEATS} calls"
    implementation = "triton" if jax.default_backend() == "gpu" else "xla"
    result |= {"steps": steps, "implementation": implementation, "rows": []}
    folder = results_folder(result["device"], out, quick=quick)
    path, begin = folder / "horizon.json", time.perf_counter()
    for rows in measure(CONTENDERS, steps, implementation):
        result["rows"] += rows
        result["seconds"] = time.perf_counter() - begin
        path.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"step {rows[0]['step']:,}: {result['seconds']:.0f} s")
    console.print(table(result["rows"]))
    if implementation == "triton":
        sizes = itertools.product(TIMED, ("bfloat16", "float16"))
        result["times"] = [time_rounding(*size) for size in sizes]
        path.write_text(json.dumps(result, indent=1) + "\n")
        console.print(result["times"])
    console.print(f"wrote {path}")


def table(rows: list[dict[str, Any]]) -> Table:
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    shown = Table("head", *(each.title for each in CONTENDERS))
    for head in HEADS:
        errors = [row["error"] for row in last if row["head"] == head.name]
        shown.add_row(head.name, *(f"{error:.1e}" for error in errors))
    return shown


if __name__ == "__main__":
    typer.run(main)
