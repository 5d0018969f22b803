"""States after a long horizon: errors by kind of head, and what rounding costs."""

import pathlib

import matplotlib.pyplot as plt

from reports.style import WIDTH, markdown, source

COLOURS = {"float32": "#009E73", "bfloat16": "#D55E00", "float16": "#0072B2"}
SHORT = {"float32": "float32", "bfloat16": "bf16", "float16": "fp16"}


def title_of(row: dict) -> tuple[str, str]:
    return row["state_dtype"], row.get("rounding", "nearest")


def named(kind: tuple[str, str]) -> str:
    dtype, rounding = kind
    return SHORT[dtype] + ", stochastic" * (rounding == "stochastic")


def horizon(result: dict, folder: pathlib.Path) -> dict[str, str]:
    plot(result, folder / "horizon.png")
    kinds = list(dict.fromkeys(map(title_of, result["rows"])))
    heads = list(dict.fromkeys(row["head"] for row in result["rows"]))
    last = {(row["head"], title_of(row)): row for row in result["rows"]}
    cells = [
        (head, [f"{last[head, kind]['error']:.1e}" for kind in kinds]) for head in heads
    ]
    count = max(row["step"] for row in result["rows"])
    head = f"relative error after {count:,} steps, head"
    lines = markdown(head, map(named, kinds), cells)
    if result.get("times"):
        lines += ["", *costs(result["times"])]
    note = f"{source(result)} Inputs: {result['inputs']}."
    return {"horizon": "\n".join([*lines, "", note])}


def costs(times: list[dict]) -> list[str]:
    sizes = sorted({row["N"] for row in times})
    cells = []
    for dtype in dict.fromkeys(row["state_dtype"] for row in times):
        of = {row["N"]: row for row in times if row["state_dtype"] == dtype}
        for rounding in ("nearest", "stochastic"):
            found = [f"{of[N][f'{rounding}_us']:.1f}" for N in sizes]
            cells.append((f"{dtype} state, {rounding}", found))
    return markdown("us a decoding step, N =", map(str, sizes), cells)


def plot(result: dict, path: pathlib.Path) -> None:
    heads = list(dict.fromkeys(row["head"] for row in result["rows"]))
    size = WIDTH, 1.2 + 1.7 * -(-len(heads) // 2)
    figure, grid = plt.subplots(
        -(-len(heads) // 2), 2, figsize=size, squeeze=False, sharex=True, sharey=True
    )
    for axis, head in zip(grid.flat, heads, strict=False):
        for kind in dict.fromkeys(map(title_of, result["rows"])):
            rows = [
                row
                for row in result["rows"]
                if row["head"] == head and title_of(row) == kind
            ]
            x, y = zip(*((row["step"], row["error"]) for row in rows), strict=True)
            dash = "--" if kind[1] == "stochastic" else "-"
            axis.loglog(x, y, dash, color=COLOURS[kind[0]], label=named(kind))
        axis.set_title(head)
        axis.grid(alpha=0.3)
    for axis in grid[-1]:
        axis.set_xlabel("steps")
    for axis in grid[:, 0]:
        axis.set_ylabel("relative error")
    figure.suptitle(f"Distance from float64, {result['device']}")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.55 / size[1], 1, 1))
    figure.savefig(path)
    plt.close(figure)
