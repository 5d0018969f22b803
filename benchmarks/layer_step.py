"""A layer's step between its projections: python benchmarks/layer_step.py [--tokens 1]

One launch (`fused_layer_step`) beside the ops it is made of, beside `fused_update`
alone, and beside vLLM's update with norm, which has no convolution; or, with --replay,
its three launches of replay's states beside those of the ops, and `replay_update`.

A program is some steps one after another, as a model's layers are, on states of their
own. What is told of a step is its `span`, from the first kernel's start to the last
one's end, gaps included, and what its kernels take, `busy`; of vLLM, which Python
launches, `busy`.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import typer
import update
from common import (
    commit_of,
    console,
    header,
    need_gpu,
    passed,
    results_folder,
    rows_besides,
    wait,
)
from rich.progress import track
from rich.table import Table
from step_programs import (
    STEPS,
    Inputs,
    Problem,
    W,
    bare,
    chain,
    compile_program,
    contenders,
    make_inputs,
    make_state,
    make_states,
    program_of,
)

import gdn_jax
from gdn_jax import ReplayState, testing, timing

PROGRAMS = 12
COMPILERS = 16
PEER_TOLERANCE = 2e-2  # its out is rounded between the rule and the norm
INPUTS = update.INPUTS + "; normal z, convolution's inputs and weights"
SIZES = ((16, 32), (4, 8))  # Qwen3.5-9B's heads, and a quarter of them
ROWS, REPLAY_ROWS = (1, 8, 64, 256), (8, 32, 128)


def check(problem: Problem, inputs: Inputs, program: Any) -> dict[str, float]:
    """The largest difference from XLA's ops, after one program."""
    arguments = inputs.weights, inputs.tokens, inputs.tables[0]
    got, outs = program(make_states(problem), *arguments)
    want, wanted = in_turn(problem, program_of)(make_states(problem), *arguments)
    errors = [differences(*pair) for pair in zip(got, want, strict=True)]
    most = {name: worst(error[name] for error in errors) for name in errors[0]}
    return most | {"out": worst(map(relative_error, outs, wanted))}


def check_step(problem: Problem, inputs: Inputs, step: Any) -> dict[str, float]:
    """The same after one step."""
    arguments = inputs.weights, inputs.tokens[0], inputs.tables[0]
    got, out = step(make_state(problem), *arguments)
    want, wanted = in_turn(problem, jax.jit)(make_state(problem), *arguments)
    return differences(got, want) | {"out": relative_error(out, wanted)}


def worst(errors: Iterable[float]) -> float:
    """NaN is, which Python's max may drop."""
    return float(np.max(list(errors)))


@functools.cache
def in_turn(problem: Problem, made: Any) -> Any:
    return made(functools.partial(chain, split=problem.split, implementation="xla"))


def differences(got: Any, want: Any) -> dict[str, float]:
    dense = (conv.to_dense(W) for conv in (got[0], want[0]))  # wherever rings begin
    states = (in_full(each[1]) for each in (got, want))
    pairs = dict(state=tuple(states), conv=tuple(dense))
    return {name: relative_error(*pair) for name, pair in pairs.items()}


@jax.jit
def in_full(state: jax.Array | ReplayState) -> jax.Array:
    return state.to_dense() if isinstance(state, ReplayState) else state


def relative_error(got: jax.Array, want: jax.Array) -> float:
    return float(_relative_error(got, want))


@jax.jit
def _relative_error(got: jax.Array, want: jax.Array) -> jax.Array:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())


def tolerance(problem: Problem, what: str) -> float:
    """q, k, v and out are rounded on their way, here and there to a neighbour; products
    with replay's states are of bfloat16 parts, as those of chunks are."""
    if what == "conv":
        return 0.0
    return testing.TOLERANCE[f"chunked {what}" if problem.replay else what, "bfloat16"]


def time_program(problem: Problem, inputs: Inputs, program: Any) -> dict[str, Any]:
    states = make_states(problem)

    def run(i: int) -> None:
        nonlocal states
        table = inputs.tables[i % len(inputs.tables)]
        states, _ = program(states, inputs.weights, inputs.tokens, table)

    run(0)
    wait()
    with timing.record() as kernels:
        for i in range(PROGRAMS):
            run(i)
        wait()
    each = len(kernels) // PROGRAMS
    names = [kernel.name for kernel in kernels]
    if names != names[:each] * PROGRAMS:
        raise RuntimeError(f"{PROGRAMS} programs are not of the same kernels: {names}")
    spans, busy = [], []
    for i in range(0, len(kernels), each):
        mine = kernels[i : i + each]
        end = mine[-1].start_us + mine[-1].duration_us
        spans.append((end - mine[0].start_us) / STEPS)
        busy.append(sum(kernel.duration_us for kernel in mine) / STEPS)
    # rows of replay fold in one step and not in another
    middle = statistics.mean if problem.replay else statistics.median
    return dict(
        span_us=middle(spans),
        busy_us=middle(busy),
        launches=each / STEPS,  # what tables need is done once for all
    )


def measure(
    problem: Problem,
    inputs: Inputs,
    name: str,
    compiled: Future,
) -> dict[str, Any]:
    row = {"contender": name, **dataclasses.asdict(problem)}
    program = compiled.result()
    if name != problem.op:
        row["errors"] = check(problem, inputs, program)
        if not passed(functools.partial(tolerance, problem), row["errors"]):
            return row | {"absent": "errors above the tolerance"}
    return row | time_program(problem, inputs, program)


def measure_peer(problem: Problem, inputs: Inputs) -> dict[str, Any]:
    """vLLM's, on channels that were convolved before."""
    row = {"contender": "vllm_post_conv", **dataclasses.asdict(problem)}
    x, tables = inputs.tokens[0], inputs.tables
    given = {name: x[name].reshape(-1, *x[name].shape[2:]) for name in x}
    given |= inputs.weights | dict(
        state=make_state(problem)[1],
        slots=[table["slots"] for table in tables],
        num_accepted=tables[0].get("num_accepted"),
    )
    try:
        call = peers.vllm_post_conv(problem.rule, given)
        call.run(0)
        _, out = bare(
            (None, make_state(problem)[1]), inputs.weights, x, tables[0], "xla"
        )
        z = x["z"].reshape(out.shape)
        want = gdn_jax.gated_rms_norm(out, z, inputs.weights["norm_weight"])
        got = call.result()["out"].reshape(want.shape)
        row["errors"] = {"out": testing.relative_error(got, want)}
        if not passed(lambda what: PEER_TOLERANCE, row["errors"]):
            return row | {"absent": "errors above the tolerance"}
        found = timing.measure(
            call.run, STEPS * PROGRAMS, wait=wait, belongs=call.kernels
        )
        return row | dict(busy_us=found.median_us, launches=found.kernels)
    except peers.Unavailable as reason:
        return row | {"absent": str(reason)}
    except Exception as error:  # nothing that a peer does ends the run
        return row | {"absent": f"failed: {type(error).__name__}: {error}"[:400]}


def main(
    state_dtype: list[str] = typer.Option(["float32", "bfloat16"]),  # noqa: B008
    tokens: list[int] = typer.Option([1, 4]),  # noqa: B008
    replay: bool = False,
    quick: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    """state_dtype, tokens: what is measured; the results file keeps other rows. replay:
    of replay's states, in a file of their own. quick: the first heads alone."""
    need_gpu()
    result = header(INPUTS)
    middle = "mean" if replay else "median"
    result["time"] = f"a step of {STEPS} in a program, {middle} of {PROGRAMS} programs"
    result["copy_tb_per_s"] = timing.copy_bandwidth()
    committed = results_folder(result["device"])
    folder = results_folder(result["device"], out, quick=quick)
    problems = [
        Problem(N, T, *heads, dtype, replay=replay)
        for heads in SIZES[: 1 if quick or replay else None]
        for T in tokens
        for dtype in state_dtype
        for N in (REPLAY_ROWS if replay else ROWS)
    ]
    keys = "T", "state_dtype", "H"
    measured = [{key: getattr(problem, key) for key in keys} for problem in problems]
    file = "layer_step_replay.json" if replay else "layer_step.json"
    paths = [path / file for path in (folder, committed)]
    result["rows"] = rows_besides(measured, *paths)
    with ThreadPoolExecutor(COMPILERS) as pool:
        compiled = {
            (problem, name): pool.submit(compile_program, problem, step)
            for problem in problems
            for name, step in contenders(problem, None).items()
        }
    for problem in track(problems, description="layer step", console=console):
        inputs = make_inputs(problem)
        rows = [
            measure(problem, inputs, name, compiled[problem, name])
            for name in contenders(problem, None)
        ]
        if not replay:
            rows.append(measure_peer(problem, inputs))
        console.print(table(problem, rows))
        result["rows"] += [commit_of(result) | row for row in rows]
        paths[0].write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {paths[0]}")


def table(problem: Problem, rows: list[dict[str, Any]]) -> Table:
    shown = Table(
        *(
            "contender",
            "span us",
            "busy us",
            "launches",
            "errors",
            "why absent",
        ),
        title=" ".join(f"{k}={v}" for k, v in dataclasses.asdict(problem).items()),
        title_justify="left",
    )
    for row in rows:
        times = (row.get(key) for key in ("span_us", "busy_us"))
        errors = " ".join(f"{error:.1e}" for error in row.get("errors", {}).values())
        shown.add_row(
            row["contender"],
            *("" if us is None else f"{us:.2f}" for us in times),
            "" if "launches" not in row else f"{row['launches']:.2f}",
            errors,
            str(row.get("absent", "")),
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
