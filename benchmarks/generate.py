"""Decoding by whole models: python benchmarks/generate.py [--model M] [--rows N]

A block of steps of `gdn_jax.Engine`, plain and speculative, in the geometry of Qwen3.5
and of as many layers of Qwen3-Next as fit one GPU, beside the time that reading and
writing the least bytes takes. What a layer takes ("fused") and an unfused update take
turns; where it takes one launch, so do the ops of that ("in turn"). Weights are random,
so which drafts stand is a pattern that no weights have a say in.
"""

import contextlib
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import typer
from common import (
    commit_of,
    console,
    header,
    need_gpu,
    results_folder,
    rows_besides,
)
from geometries import (
    CONTEXT,
    MODELS,
    ROOM,
    STEPS,
    Point,
    least_bytes,
    make_model,
    make_state,
    memory,
    param_shapes,
    random_of,
    rewind,
    state_shapes,
)
from layer import unfused_update
from rich.progress import track
from rich.table import Table

from gdn_jax import timing
from gdn_jax.generation import speculative, steps
from gdn_jax.nn import GatedDeltaNet, arguments
from gdn_jax.ops.layer_step.tuning import Step, pays

ROUNDS, MOST_ROUNDS = 7, 25  # blocks of each update that are timed: more where one
SECONDS = 2  # is short
SPARE = 0.96  # of the device's memory, what may be taken
BATCHES = (1, 8, 64, 256)
DRAFTS = (0, 1, 3)
STATES = ("float32", "bfloat16")
UPDATE_KERNELS = ("fused_update_kernel", "gates_kernel", "layer_step_kernel")
UPDATE_KERNELS += ("prepare_kernel", "meet_kernel")  # of replay
LONGEST = 12  # kernels of a step that a row names
COMPILERS = 8
INPUTS = (
    f"normal weights, states and caches; {CONTEXT} tokens read, room for {ROOM}; "
    "greedy; of the tokens of a speculative step 1, 2, .. 1 + drafts stand in turn"
)


def unfused(call, args, keywords, context):
    """The layers' update in two launches."""
    if isinstance(context.module, GatedDeltaNet) and context.method_name == "update":
        return unfused_update(context.module, *args, **keywords)
    return call(*args, **keywords)


def in_turn(model, params, state, emitted, *, greedy):
    """A speculative step after which as many tokens stand as the pattern says."""
    stand = state.num_accepted % (1 + state.drafts.tokens.shape[1]) + 1

    def accept(*args):
        return stand, accept_most_likely(*args)[1]

    with mock.patch.object(speculative, "accept_most_likely", accept):
        return speculative.speculative_step(
            model, params, state, emitted, greedy=greedy
        )


accept_most_likely = speculative.accept_most_likely


def updates_of(point: Point) -> tuple[str, ...]:
    config, tokens = point.config, 1 + point.drafts
    sizes = (
        *(config.linear_num_key_heads, config.linear_num_value_heads),
        *(config.linear_key_head_dim, config.linear_value_head_dim),
    )
    step = Step(point.rows, tokens, tokens, tokens > 1, *sizes, point.state_dtype)
    in_one = pays(None, jnp.zeros(()), step)
    return ("fused", "in turn", "unfused") if in_one else ("fused", "unfused")


def block_of(update: str):
    """`steps.decode`, traced anew with the update and the pattern."""

    def decode(model, params, state):
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(steps, "speculative_step", in_turn))
            if update != "fused":
                never = mock.patch.object(arguments, "pays", lambda *_: False)
                stack.enter_context(never)
            if update == "unfused":
                stack.enter_context(nn.intercept_methods(unfused))
            return steps.decode.__wrapped__(model, params, state, STEPS, True)

    return jax.jit(decode, static_argnums=0, donate_argnums=2)


Blocks = dict[str, Future]


def begin_compiling(point: Point, pool: ThreadPoolExecutor) -> Blocks:
    """Traced here, since what is traced depends on contexts; compiled in threads."""
    model = make_model(point.config)
    shapes = param_shapes(point.config), state_shapes(point)
    return {
        update: pool.submit(block_of(update).lower(model, *shapes).compile)
        for update in updates_of(point)
    }


def measure(
    point: Point, compiled: Blocks, params: Any, copy_tb_per_s: float
) -> list[dict[str, Any]]:
    """A row for each update; they take turns on one state."""
    blocks = {update: each.result() for update, each in compiled.items()}
    state = make_state(point)

    def run(update: str) -> float:
        nonlocal state
        state = jax.block_until_ready(rewind(state))
        begin = time.perf_counter()
        state, emitted = blocks[update](params, state)
        jax.block_until_ready(emitted)
        return 1e3 * (time.perf_counter() - begin) / STEPS

    updates = tuple(blocks)
    for update in updates:
        run(update)
    once = sum(map(run, updates)) * STEPS / 1e3
    rounds = min(max(ROUNDS, int(SECONDS / once)), MOST_ROUNDS)
    ms: dict[str, list[float]] = {update: [] for update in updates}
    for i in range(rounds):
        for update in updates if i % 2 else updates[::-1]:
            ms[update].append(run(update))
    floor = least_bytes(point)
    floor_ms = sum(floor.values()) / copy_tb_per_s / 1e9
    rows = []
    for update in updates:
        with timing.record() as kernels:
            run(update)
        step = statistics.median(ms[update])
        rows.append(
            dataclasses.asdict(point)
            | {
                "update": update,
                "rounds": rounds,
                "ms_a_step": step,
                "min_ms": min(ms[update]),
                "max_ms": max(ms[update]),
                "ms_a_token": step / point.tokens_a_step,
                "tokens_per_s": 1e3 * point.rows * point.tokens_a_step / step,
                "floor_ms": floor_ms,
                "gigabytes": {name: size / 1e9 for name, size in floor.items()},
            }
            | profile(kernels)
        )
    for name, update in (("saved", "unfused"), ("saved_in_one", "in turn")):
        if update not in updates:
            continue
        saved = [
            1e3 * (other - fused) / point.num_linear
            for fused, other in zip(ms["fused"], ms[update], strict=True)
        ]
        first, _, third = statistics.quantiles(saved, n=4)
        rows[0][f"{name}_us_a_layer"] = statistics.median(saved)
        rows[0][f"{name}_us_quartiles"] = first, third
    return rows


def profile(kernels: list[timing.Kernel]) -> dict[str, Any]:
    """Where the time of a block goes; a step's part of it."""
    by_name: dict[str, list[float]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append(kernel.duration_us / STEPS)
    busy = sum(map(sum, by_name.values()))
    of_update = sum(
        sum(us) for name, us in by_name.items() if name.startswith(UPDATE_KERNELS)
    )
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return {
        "kernels_ms_a_step": busy / 1e3,
        "kernels_a_step": len(kernels) / STEPS,
        "update_share": of_update / busy,
        "longest_us": {name: [sum(us), len(us) / STEPS] for name, us in longest},
    }


def absent(point: Point, reason: str) -> list[dict[str, Any]]:
    return [dataclasses.asdict(point) | {"update": "fused", "absent": reason}]


def points(
    model: str, quick: bool, batches: Iterable[int], drafts: Iterable[int]
) -> list[Point]:
    if quick:
        return [Point(model, *kind) for kind in ((8, 0, "float32"), (8, 3, "bfloat16"))]
    return [
        Point(model, N, count, dtype)
        for dtype in STATES
        for count in drafts
        for N in batches
    ]


def run_model(
    needed: dict[Point, tuple[int, int]], result: dict[str, Any], path: pathlib.Path
):
    """Programs are compiled first, so that nothing else runs while one is timed."""
    name = next(iter(needed)).model
    with ThreadPoolExecutor(COMPILERS) as pool:
        compiled = {
            point: begin_compiling(point, pool)
            for point, (size, room) in track(
                needed.items(), description=f"compile {name}", console=console
            )
            if size <= SPARE * room
        }
    params = random_of(param_shapes(MODELS[name]), 0)
    for point, (size, room) in needed.items():
        reason = f"{size / 1e9:.0f} of {room / 1e9:.0f} GB"
        if point in compiled:
            try:
                rows = measure(point, compiled[point], params, result["copy_tb_per_s"])
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                rows = absent(point, f"{reason}, and a step's own arrays")
        else:
            rows = absent(point, reason)
        console.print(table(rows))
        result["rows"] += [commit_of(result) | row for row in rows]
        path.write_text(json.dumps(result, indent=1) + "\n")


def main(
    model: list[str] = typer.Option(list(MODELS)),  # noqa: B008
    rows: list[int] = typer.Option(list(BATCHES)),  # noqa: B008
    drafts: list[int] = typer.Option(list(DRAFTS)),  # noqa: B008
    quick: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    need_gpu()
    result = header(INPUTS)
    result["time"] = (
        f"wall clock of a block of {STEPS} steps, median of {ROUNDS} to {MOST_ROUNDS}"
    )
    result["copy_tb_per_s"] = timing.copy_bandwidth()
    committed = results_folder(result["device"])
    folder = results_folder(result["device"], out, quick=quick)
    for name in model:
        file = f"generate_{name.split(',')[0].lower()}.json"
        needed = {point: memory(point) for point in points(name, quick, rows, drafts)}
        measured = [dataclasses.asdict(point) for point in needed]
        others = rows_besides(measured, folder / file, committed / file)
        run_model(needed, result | {"rows": others}, folder / file)


def table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    shown = Table(
        *("update", "ms a step", "kernels ms", "kernels", "share", "floor", "tokens/s"),
        *("us saved a layer", "by one launch"),
        title=f"{first['model']} N={first['rows']} drafts={first['drafts']} "
        f"state {first['state_dtype']}",
        title_justify="left",
    )
    for row in rows:
        if "absent" in row:
            shown.add_row(row["update"], f"needs {row['absent']}")
            continue
        saved = (row.get(f"{name}_us_a_layer") for name in ("saved", "saved_in_one"))
        shown.add_row(
            row["update"],
            f"{row['ms_a_step']:.3f}",
            f"{row['kernels_ms_a_step']:.3f}",
            f"{row['kernels_a_step']:.0f}",
            f"{row['update_share']:.1%}",
            f"{row['floor_ms']:.3f} ({row['ms_a_step'] / row['floor_ms']:.2f})",
            f"{row['tokens_per_s']:,.0f}",
            *("" if us is None else f"{us:.2f}" for us in saved),
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
