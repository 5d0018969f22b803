"""What the benchmarks share: problems, inputs, checks, timing, results files."""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from slot_copy import slot_copy

import gdn_jax
from gdn_jax import testing, timing

RESULTS = pathlib.Path(__file__).parent / "results"
L2_BYTES = 64 * 2**20  # an H200's 60 MB, the largest of the GPUs this ran on
REPEATS = 30
CHECKED_ROWS = 16

console = Console(width=120)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call: N rows of T tokens. T > 1 is a checkpoint verify with T columns.

    `gib` makes the pool at least so large: past 4 GiB offsets take 64 bits.
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
    """`cu_seqlens`, as engines pass it when rows have several tokens."""
    if problem.T == 1:
        return None
    return jnp.arange(problem.N + 1, dtype=jnp.int32) * problem.T


def update(state, tokens, slots, accepted, bounds, *, unfused=False, **options):
    """Our op on packed tokens; `unfused` is the pair of gates and recurrent_update."""
    q, k, v, A_log, a, b, dt_bias = tokens
    options |= dict(slots=slots, num_accepted=accepted, cu_seqlens=bounds)
    if not unfused:
        return gdn_jax.fused_update(state, *tokens, **options)
    log_decay, beta = gdn_jax.gates(
        A_log, a, b, dt_bias, implementation=options["implementation"]
    )
    return gdn_jax.recurrent_update(state, q, k, v, log_decay, beta, **options)


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

    def result():
        return held["state"], held["out"]

    return peers.Call(run, result, lambda name: True, "")


def copy(problem: Problem, inputs: Mapping[str, Any]):
    """XLA's in-place scaling of as many bytes as the update must read and write."""
    del inputs
    elements = problem.moved_bytes // 8
    scale = jax.jit(lambda x: x * jnp.float32(1.0001), donate_argnums=0)
    count = max(1, min(64, 4 * L2_BYTES // problem.moved_bytes))
    arrays = [jax.random.normal(jax.random.key(i), (elements,)) for i in range(count)]

    def run(i):
        arrays[i % count] = scale(arrays[i % count])

    return peers.Call(run, lambda: (None, None), lambda name: True, "")


def slots_alone(problem: Problem, inputs: Mapping[str, Any]):
    """The pool's slots read and written in place, and nothing else."""
    if problem.T > 1:
        raise peers.Unavailable("one token a row only")
    held = {"state": jnp.array(inputs["state"])}

    def run(i):
        table = inputs["slots"][i % len(inputs["slots"])]
        held["state"] = slot_copy(held["state"], table)

    return peers.Call(run, lambda: (None, None), lambda name: True, "no arithmetic")


OURS = ("copy", "slots", "triton", "unfused", "xla")


def contenders(problem: Problem) -> dict[str, Callable]:
    kernels = peers.DECODE if problem.T == 1 else peers.VERIFY
    return {
        "copy": copy,
        "slots": slots_alone,
        "triton": functools.partial(ours, implementation="triton"),
        "unfused": functools.partial(ours, implementation="triton", unfused=True),
        "xla": functools.partial(ours, implementation="xla"),
        **kernels,
    }


class Expected(NamedTuple):
    """What our oracle says of the first call's first rows."""

    touched: np.ndarray  # slots
    state: jax.Array
    out: jax.Array


def expect(problem: Problem, inputs: Mapping[str, Any]) -> Expected:
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
    return Expected(touched, state[touched], out)


def errors_of(expected: Expected, state, out) -> dict[str, float]:
    """Of what a first call left; of nothing where a contender has no such result."""
    errors = {}
    if state is not None:
        got = np.asarray(state[expected.touched], np.float32)
        errors["state"] = testing.relative_error(got, expected.state)
    if out is not None:
        got = np.asarray(out[: len(expected.out)], np.float32)
        errors["out"] = testing.relative_error(got, expected.out)
    return errors


def passed(problem: Problem, errors: Mapping[str, float], slack: int) -> bool:
    dtypes = {"state": problem.state_dtype, "out": problem.act_dtype}
    return all(
        error < slack * testing.TOLERANCE[what, dtypes[what]]
        for what, error in errors.items()
    )


def wait() -> None:
    """For everything on the device, whichever framework launched it."""
    jax.block_until_ready(jax.live_arrays())
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.synchronize()


def time_contender(
    name: str, build: Callable, problem: Problem, inputs, expected: Expected
) -> dict:
    """One row of a results file. `first_call_s` is what a user waits for the first
    call, compilation included; a peer may have compiled for an earlier problem."""
    row = {"contender": name, **dataclasses.asdict(problem)}
    try:
        call = build(problem, inputs)
        wait()
        begin = time.perf_counter()
        call.run(0)
        wait()
        row["first_call_s"] = time.perf_counter() - begin
        errors = errors_of(expected, *call.result())
    except peers.Unavailable as reason:
        return row | {"absent": str(reason)}
    except Exception as error:
        if name in OURS:
            raise
        return row | {"absent": f"failed: {type(error).__name__}: {error}"[:400]}
    row |= {"note": call.note, "errors": errors}
    # peers round more than we do in places; that still tells right from wrong
    if not passed(problem, errors, 1 if name in OURS else 4):
        return row | {"absent": "wrong results"}
    found = timing.measure(call.run, REPEATS, wait=wait, belongs=call.kernels)
    row |= dataclasses.asdict(found)
    row["tb_per_s"] = problem.moved_bytes / found.median_us / 1e6
    return row


def header(repeats: int = REPEATS) -> dict[str, Any]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def git(*words: str) -> str:
        command = ["git", *words]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "numpy", "torch", "triton")
    return {
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # a copy of the tree without its .git says its commit by the environment
        "commit": os.environ.get("GDN_JAX_COMMIT") or git("rev-parse", "HEAD"),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "inputs": "normal q, k, v, a, b, dt_bias; state 0.1 * normal; A in [1, 16]",
        "time": f"device kernels, median of {repeats} calls over rotating slots",
    }


def need_gpu() -> None:
    if jax.default_backend() != "gpu":
        raise SystemExit(
            f"The benchmarks time kernels on a GPU; JAX's default backend here is "
            f"{jax.default_backend()!r}."
        )


def run_suite(suite: str, problems: list[Problem], out: pathlib.Path | None) -> None:
    """Checks and times every contender on every problem; prints and writes the rows,
    problem by problem."""
    need_gpu()
    result = header() | {"copy_tb_per_s": timing.copy_bandwidth(), "rows": []}
    folder = out or RESULTS / result["device"].lower().replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.json"
    for problem in track(problems, description=suite, console=console):
        inputs = make_inputs(problem)
        expected = expect(problem, inputs)
        for name, build in contenders(problem).items():
            row = time_contender(name, build, problem, inputs, expected)
            result["rows"].append(row)
        console.print(table(result, problem))
        path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {path}")


def table(result: Mapping[str, Any], problem: Problem) -> Table:
    """The rows of one problem, for people."""
    p = problem
    title = (
        f"N={p.N} T={p.T} H={p.H} HV={p.HV} K={p.K} V={p.V} state {p.state_dtype}, "
        f"copy {result['copy_tb_per_s']:.2f} TB/s"
    )
    shown = Table(title=title, title_justify="left")
    columns = ("contender", "us", "min", "max", "kernels", "TB/s", "of copy", "first s")
    for column in columns:
        shown.add_column(column, justify="left" if column == "contender" else "right")
    shown.add_column("errors (state, out) or why absent", overflow="fold")
    for row in result["rows"]:
        if any(row[k] != v for k, v in dataclasses.asdict(problem).items()):
            continue
        errors = " ".join(f"{e:.1e}" for e in row.get("errors", {}).values())
        if "absent" in row:
            shown.add_row(row["contender"], *[""] * 7, f"{row['absent']} {errors}")
            continue
        shown.add_row(
            row["contender"],
            *(f"{row[key]:.2f}" for key in ("median_us", "min_us", "max_us")),
            str(row["kernels"]),
            f"{row['tb_per_s']:.2f}",
            f"{row['tb_per_s'] / result['copy_tb_per_s']:.0%}",
            f"{row['first_call_s']:.1f}",
            errors,
        )
    return shown
