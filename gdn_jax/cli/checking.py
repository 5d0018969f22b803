"""`gdn-jax check` and `gdn-jax info`."""

import importlib.metadata
import platform
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import gdn_jax
from gdn_jax import _check, _dispatch, _triton, testing, timing

console = Console()


def check(
    implementation: Annotated[
        list[str] | None,
        typer.Option("--implementation", "-i", help="Default: see `gdn-jax info`."),
    ] = None,
    match: Annotated[
        str,
        typer.Option(
            "--match",
            "-k",
            help="Only cases whose `op: name` contains this.",
        ),
    ] = "",
) -> None:
    """Compares the implementations with float64 NumPy, and times them."""
    for name in implementation or ():
        if name not in _dispatch.IMPLEMENTATIONS:
            known = ", ".join(_dispatch.IMPLEMENTATIONS)
            raise typer.BadParameter(f"{name!r} is none of {known}", param_hint="-i")
    names = implementation or _available()
    if "triton" in names and not _has_triton():
        wanted = "triton needs an NVIDIA GPU; see `gdn-jax info`"
        raise typer.BadParameter(wanted, param_hint="-i")
    gpu = "triton" in _available()
    problems = [p for p in _check.problems(large=gpu) if match in p.label]
    if not problems:
        raise typer.BadParameter(f"no case's name contains {match!r}", param_hint="-k")
    copy = 1e3 * timing.copy_bandwidth() if gpu else None
    columns = ("[progress.description]{task.description}",)
    rows = []
    with Progress(
        *map(TextColumn, columns), BarColumn(), MofNCompleteColumn(), console=console
    ) as progress:
        task = progress.add_task("", total=len(problems) * len(names))
        for problem in problems:
            for name in names:
                progress.update(task, description=f"{name}: {problem.case.name}")
                rows.append(_check.run_or_fail(problem, name))
                progress.advance(task)
    console.print(_table(rows, copy))
    failed = [row for row in rows if not row.passed]
    for row in failed:
        if row.fault:
            where = f"{row.problem.label}, {row.implementation}"
            console.print(f"{where}: {row.fault}", markup=False)
    device = jax.devices()[0].device_kind
    console.print(f"{len(rows) - len(failed)} of {len(rows)} passed on {device}.")
    if failed:
        raise typer.Exit(1)


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


def _table(rows: list[_check.Row], copy: float | None) -> Table:
    """At most 80 columns wide, what a pipe gets."""
    clock = "the device's clock" if copy else "the wall clock"
    beside = f"; copy {copy:.0f} GB/s, in the same run" if copy else ""
    bars = ", ".join(
        f"{what} {dtype} {bar:g}"
        for (what, dtype), bar in testing.TOLERANCE.items()
        if what != "gradient"
    )
    table = Table(
        title=f"Microseconds by {clock}{beside}.",
        title_justify="left",
        caption=f"Relative RMS errors against float64; passed below: {bars}.",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("case")
    table.add_column("by")
    for name in ("state\nerror", "out\nerror", "us", "GB/s"):
        table.add_column(name, justify="right")
    if copy:
        table.add_column("of\ncopy", justify="right")
    table.add_column("")
    op = None
    for row in rows:
        if row.problem.op != op:
            op = row.problem.op
            table.add_row(f"[bold]{op}[/bold]")
        speed = row.gb_per_s
        share = [f"{speed / copy:.0%}"] if copy else []
        table.add_row(
            row.problem.case.name,
            row.implementation,
            *(f"{error:.1e}" for error in row.errors),
            f"{row.microseconds:.1f}",
            f"{speed:.0f}" if speed >= 100 else f"{speed:.2f}",
            *share,
            "ok" if row.passed else "[red]FAILED[/red]",
        )
    return table
