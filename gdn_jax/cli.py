"""What gdn_jax can do on this machine, and whether it does it right."""

import dataclasses
import functools
import importlib.metadata
import platform
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import gdn_jax
from gdn_jax import _dispatch, _triton, testing, timing

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()

REPEATS = 5
# Timed on a GPU beside the small cases: enough state to leave the L2 cache.
LARGE = testing.Case(
    "decode, N=64 K=V=128", (1,) * 64, H=16, HV=32, K=128, V=128, tokens="single"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a case on an implementation."""

    case: testing.Case
    implementation: str
    state_error: float
    out_error: float
    microseconds: float
    moved_bytes: int
    fault: str = ""  # what it raised instead

    @property
    def passed(self) -> bool:
        if self.fault:
            return False
        out = dict(self.case.options).get("out_dtype", self.case.act_dtype)
        state_bar = testing.TOLERANCE["state", self.case.state_dtype]
        out_bar = testing.TOLERANCE["out", np.dtype(jnp.dtype(out)).name]
        return self.state_error < state_bar and self.out_error < out_bar

    @property
    def gb_per_s(self) -> float:
        return self.moved_bytes / self.microseconds / 1e3


@app.command()
def check(
    implementation: Annotated[
        list[str] | None,
        typer.Option("--implementation", "-i", help="Default: see `gdn-jax info`."),
    ] = None,
    match: Annotated[
        str, typer.Option("--match", "-k", help="Only cases whose name contains this.")
    ] = "",
) -> None:
    """Compares the implementations with float64 NumPy, and times them."""
    try:
        for name in implementation or ():
            _dispatch.check_name(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    names = implementation or _available()
    if "triton" in names and not _has_triton():
        raise typer.BadParameter("triton needs an NVIDIA GPU; see `gdn-jax info`")
    gpu = "triton" in _available()
    cases = [c for c in (*testing.CASES, *([LARGE] if gpu else [])) if match in c.name]
    if not cases:
        raise typer.BadParameter(f"no case's name contains {match!r}", param_hint="-k")
    copy = 1e3 * timing.copy_bandwidth() if gpu else None
    columns = ("[progress.description]{task.description}",)
    rows = []
    with Progress(
        *map(TextColumn, columns), BarColumn(), MofNCompleteColumn(), console=console
    ) as progress:
        task = progress.add_task("", total=len(cases) * len(names))
        for case in cases:
            for name in names:
                progress.update(task, description=f"{name}: {case.name}")
                rows.append(_run_or_fail(case, name))
                progress.advance(task)
    console.print(_table(rows, copy))
    failed = [row for row in rows if not row.passed]
    for row in failed:
        if row.fault:
            where = f"{row.implementation}, {row.case.name}"
            console.print(f"{where}: {row.fault}", markup=False)
    device = jax.devices()[0].device_kind
    console.print(f"{len(rows) - len(failed)} of {len(rows)} passed on {device}.")
    if failed:
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Prints the device, versions, and what `implementation=None` picks."""
    table = Table(show_header=False)
    packages = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin")
    for device in jax.devices():
        table.add_row(
            "device", f"{device.id}: {device.device_kind} ({device.platform})"
        )
    table.add_row("python", platform.python_version())
    table.add_row("gdn-jax", gdn_jax.__version__)
    for package in packages:
        table.add_row(package, _version(package))
    table.add_row("check runs", ", ".join(_available()))
    able = (name for name in _dispatch.PREFERENCE if name in _available())
    table.add_row("None picks", next(able))
    console.print(table)


def main() -> None:
    app()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _has_triton() -> bool:
    try:
        _triton.device_kind(())
    except NotImplementedError:
        return False
    return True


def _available() -> list[str]:
    """What `check` runs: the kernel, compiled or else interpreted, and the others."""
    first = "triton" if _has_triton() else "interpret"
    return [first, "xla", "reference"]


def _run_or_fail(case: testing.Case, implementation: str) -> Row:
    """One failure must not lose the others' results."""
    try:
        return _run(case, implementation)
    except Exception as error:
        nan, fault = float("nan"), f"{type(error).__name__}: {error}"
        return Row(case, implementation, nan, nan, nan, 0, fault[:200])


def _run(case: testing.Case, implementation: str) -> Row:
    args, kwargs = testing.make(case)
    want_state, want_out, written = testing.oracle(args, kwargs)
    static = {k: v for k, v in kwargs.items() if not isinstance(v, np.ndarray)}
    arrays = {k: jnp.asarray(v) for k, v in kwargs.items() if k not in static}
    state, *tokens = (jnp.asarray(x) for x in args)
    kept = kwargs.get("per_token_states", False)

    @functools.partial(jax.jit, donate_argnums=() if kept else (0,))
    def update(state, tokens, arrays):
        return gdn_jax.fused_update(
            state, *tokens, **arrays, **static, implementation=implementation
        )

    held = {"state": jnp.array(state)}

    def step(_: int = 0) -> Any:
        new, out = update(held["state"], tokens, arrays)
        if not kept:
            held["state"] = new
        return jax.block_until_ready((new, out))

    new, out = step()
    new = np.asarray(new)
    errors = (
        testing.relative_error(new[written], want_state[written]),
        testing.relative_error(out, want_out),
    )
    untouched = np.zeros_like(new) if kept else np.asarray(args[0])
    if not np.array_equal(new[~written], untouched[~written], equal_nan=True):
        errors = (float("inf"), errors[1])  # a slot that is not the call's was written
    reads = case.N - len(case.dead | set(case.fresh))
    slots = reads + int(written.sum())
    moved = slots * state[0].nbytes + sum(x.nbytes for x in (*tokens, out))
    return Row(case, implementation, *errors, _microseconds(step), moved)


def _microseconds(step: Callable[[int], Any]) -> float:
    """On the device where the profiler sees one, else by the wall clock."""
    if jax.default_backend() == "gpu":
        return timing.measure(step, REPEATS, wait=lambda: None).median_us
    times = []
    for i in range(REPEATS):
        start = time.perf_counter()
        step(i)
        times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[REPEATS // 2]


def _table(rows: list[Row], copy: float | None) -> Table:
    clock = "device" if copy else "wall clock"
    title = f"copy {copy:.0f} GB/s, in the same run" if copy else None
    table_of_bars = testing.TOLERANCE.items()
    bars = ", ".join(f"{what} {dtype} {bar:g}" for (what, dtype), bar in table_of_bars)
    caption = f"Relative RMS errors against float64; passed below: {bars}."
    table = Table(title=title, title_justify="left", caption=caption)
    for name in ("case", "implementation"):
        table.add_column(name)
    for name in ("state error", "out error", f"us ({clock})", "GB/s"):
        table.add_column(name, justify="right")
    if copy:
        table.add_column("of copy", justify="right")
    table.add_column("")
    for row in rows:
        share = [f"{row.gb_per_s / copy:.1%}"] if copy else []
        table.add_row(
            row.case.name,
            row.implementation,
            f"{row.state_error:.1e}",
            f"{row.out_error:.1e}",
            f"{row.microseconds:.1f}",
            f"{row.gb_per_s:.2f}",
            *share,
            "ok" if row.passed else "[red]FAILED[/red]",
        )
    return table
