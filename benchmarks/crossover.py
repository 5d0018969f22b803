"""From how many rows on replay is faster than writing every state:
python benchmarks/crossover.py

`replay_update` beside `fused_update` with few rows, in place or from a checkpoint a
token. What it finds it writes for the package, which chooses by it.
"""

import itertools
import json
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import typer
from common import RESULTS, commit_of, console, header, need_gpu, rows_besides
from replay import INPUTS, begin_compiling, measure, others, table
from replay_steps import STEPS, Problem
from rich.progress import track
from tune import FOLDER

from gdn_jax import timing

ROWS = 1, 2, 4, 8, 16, 32, 64
TOKENS = 1, 2, 4
STATE_DTYPES = "float32", "bfloat16"
CONTENDERS = {"replay": "mean_us", "triton": "median_us"}


def crossover_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of one number of tokens and dtype: the fewest rows from which on replay always
    was faster, as a row of the package's table; None where not all was measured."""
    us: dict[int, dict[str, float]] = {}
    for row in rows:
        name = row["contender"]
        us.setdefault(row["N"], {})[name] = row[CONTENDERS[name]]
    if sorted(us) != sorted(ROWS) or any(
        set(x) != set(CONTENDERS) for x in us.values()
    ):
        return None
    faster = itertools.takewhile(
        lambda N: us[N]["replay"] < us[N]["triton"], sorted(us, reverse=True)
    )
    least = min(faster, default=None)
    first, near = rows[0], least or max(us)
    told = [N for N in sorted(us) if near / 2 <= N <= 2 * near]
    times = (f"{us[N]['replay']:.1f} / {us[N]['triton']:.1f} at N={N}" for N in told)
    return dict(
        K=first["K"],
        V=first["V"],
        group=first["HV"] // first["H"],
        tokens=first["T"],
        state_dtype=first["state_dtype"],
        heads=least and least * first["HV"],
        reason=f"us of replay / every state: {', '.join(times)}",
    )


def main(
    state_dtype: list[str] = typer.Option(list(STATE_DTYPES)),  # noqa: B008
    tokens: list[int] = typer.Option(list(TOKENS)),  # noqa: B008
    rows: list[int] = typer.Option(list(ROWS)),  # noqa: B008
    value_heads: list[int] = typer.Option([32]),  # noqa: B008
    out: pathlib.Path | None = None,
) -> None:
    """state_dtype, tokens, rows, value_heads (of 16 key heads): what is measured; the
    files keep other rows."""
    need_gpu()
    result = header(INPUTS)
    result["time"] = f"device kernels, mean of {STEPS} steps; of others the median"
    result["copy_tb_per_s"] = timing.copy_bandwidth()
    device = result["device"].lower().replace(" ", "_")
    committed, file = RESULTS / device, "replay_crossover.json"
    folder = out or committed
    folder.mkdir(parents=True, exist_ok=True)
    parts = list(itertools.product(state_dtype, tokens, rows, value_heads))
    measured: list[dict[str, Any]] = [
        dict(zip(("state_dtype", "T", "N", "HV"), part, strict=True)) for part in parts
    ]
    result["rows"] = rows_besides(measured, folder / file, committed / file)
    problems = [Problem(N, T, dtype, HV=HV) for dtype, T, N, HV in parts]
    with ThreadPoolExecutor() as pool:
        compiled = begin_compiling(problems, [None], pool)
    for problem in track(problems, description="crossover", console=console):
        rows = [measure(problem, None, compiled), *others(problem, alone=True)]
        console.print(table(problem, rows))
        result["rows"] += [commit_of(result) | row for row in rows]
        (folder / file).write_text(json.dumps(result, indent=1) + "\n")
    write_table(result, FOLDER / f"{device}.json", out)


def write_table(
    result: dict[str, Any], package: pathlib.Path, out: pathlib.Path | None
) -> None:
    """A row that is not of this run says which one it is of: of several the newest."""
    table = []
    sizes = sorted({row["HV"] for row in result["rows"]})
    for part in itertools.product(sizes, STATE_DTYPES, TOKENS):
        rows = [
            x for x in result["rows"] if (x["HV"], x["state_dtype"], x["T"]) == part
        ]
        if found := crossover_of(rows):
            run = commit_of(max(rows, key=lambda row: row["date"]))
            table.append(found if run == commit_of(result) else run | found)
    kept = json.loads(package.read_text()) if package.is_file() else {"runs": []}
    about = {key: result[key] for key in ("date", "commit", "versions", "inputs")}
    kept["replay"] = about | {"rows": table}
    path = package if out is None else out / package.name
    path.write_text(json.dumps(kept, indent=1) + "\n")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
