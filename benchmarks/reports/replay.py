"""Replay: its steps beside others', whole models, and drift."""

import pathlib

import matplotlib.pyplot as plt

from reports.style import WIDTH, absences, legend, markdown, name_of, source

DTYPES = ("float32", "bfloat16")
NAMES = {
    "replay": "gdn_jax, replay",
    "replayssm": "ReplaySSM",
    "replayssm_verify": "ReplaySSM, verifying",
    "flashinfer_ucache": "FlashInfer u-cache",
    "triton": "gdn_jax, writing every state",
    "copy": "copy of what states written and read take",
}
REPLAYING = "replay", "replayssm", "replayssm_verify", "flashinfer_ucache"
LOOKS = {
    "in place": ("token by token in place", "#0072B2", "--"),
    "replay": ("replay", "#D55E00", "-"),
    "replay, 2 parts": ("replay", "#D55E00", "-"),
    "replay, 3 parts": ("replay, three parts", "#009E73", "-."),
    "replay, bfloat16 records": ("replay, records rounded to bfloat16", "#CC79A7", ":"),
}


def label(contender: str) -> str:
    return NAMES.get(contender) or name_of(contender)


def us(row: dict) -> float:
    return row.get("mean_us", row.get("median_us"))


def rows_of(result: dict, **wanted) -> list[dict]:
    return [
        row
        for row in result["rows"]
        if all(row.get(key, value) == value for key, value in wanted.items())
    ]


def title_of(row: dict) -> str:
    what = "decode" if row["T"] == 1 else f"verify T={row['T']}"
    return f"{what}, N={row['N']}, {row['state_dtype']} state"


def replay(result: dict, folder: pathlib.Path) -> dict[str, str]:
    del folder
    lines = []
    for dtype in DTYPES:
        for T in sorted({row["T"] for row in result["rows"]}):
            lines += steps(result, dtype, T)
    lines += accepts(result)
    rows = rows_of(result, accepts="uniform")
    peers = [row for row in rows if row["contender"] in NAMES and row.get("note")]
    # what is said of a contender last: rows of an earlier run may say less
    notes = {
        label(row["contender"]): row["note"]
        for row in sorted(peers, key=lambda row: row.get("date", result["date"]))
    }
    lines += [f"{name}: {note}.\n" for name, note in sorted(notes.items())]
    # of what writes states the suites "decode" and "verify" tell
    replaying = [row for row in rows if row["contender"] in REPLAYING]
    lines += absences(replaying, title_of, label)
    lines += [f"{source(result)} Times: {result['time']}. Inputs: {result['inputs']}."]
    return {"replay": "\n".join(lines)}


def steps(result: dict, dtype: str, T: int) -> list[str]:
    """A table of N against contenders, of steps of which tokens stand at random."""
    found = rows_of(result, state_dtype=dtype, T=T, accepts="uniform")
    timed = {(row["contender"], row["N"]): us(row) for row in found if us(row)}
    if not timed:
        return []
    sizes = sorted({N for _, N in timed})
    order = list(NAMES)
    names = sorted(
        {name for name, _ in timed},
        key=lambda x: (order.index(x) if x in order else len(order), x),
    )
    cells = [
        (
            label(name),
            [f"{timed[name, N]:.1f}" if (name, N) in timed else "-" for N in sizes],
        )
        for name in names
    ]
    what = "decode" if T == 1 else f"verify T={T}"
    head = f"{what}, {dtype} state, us a step, N ="
    return [*markdown(head, map(str, sizes), cells), ""]


def accepts(result: dict) -> list[str]:
    """Of the problem that was measured with every way of accepting."""
    sizes = {(x["N"], x["T"]) for x in result["rows"] if x.get("accepts") == "all"}
    lines = []
    for N, T in sorted(sizes):
        counts = {"one": "1 a step", "uniform": f"1 to {T}", "all": f"all {T}"}
        cells = []
        for dtype in DTYPES:
            for name in REPLAYING:
                wanted = dict(contender=name, N=N, T=T, state_dtype=dtype)
                rows = {row["accepts"]: row for row in rows_of(result, **wanted)}
                timed = {kind: us(row) for kind, row in rows.items() if us(row)}
                if timed:
                    shown = [f"{timed[c]:.1f}" if c in timed else "-" for c in counts]
                    cells.append((f"{label(name)}, {dtype} state", shown))
        head = f"T={T}, N={N}, us a step, accepted:"
        lines += [*markdown(head, counts.values(), cells), ""]
    return lines


def schemes(result: dict, folder: pathlib.Path) -> dict[str, str]:
    del folder
    sizes = sorted({row["rows"] for row in result["rows"]})
    cells: dict[str, list[str]] = {}
    for row in sorted(result["rows"], key=lambda row: row["rows"]):
        how = row["decode"].replace("_", " ")
        what = f"{row['drafts']} drafts" if row["drafts"] else "plain"
        name = f"{row['state_dtype']} state, {what}, {how}"
        speed = "-" if "absent" in row else f"{row['tokens_per_s']:,.0f}"
        cells.setdefault(name, []).append(speed)
        if row["rows"] == sizes[-1]:
            of_row = row["bytes_a_row"]["states"] / 1e6
            cells[name] += [f"{of_row:.0f}", f"{row['most_rows']:,}"]
    room = "texts whose states and caches fit"
    columns = [*(f"N = {N}" for N in sizes), "MB of states a text", room]
    model = result["rows"][0]["model"]
    lines = markdown(f"{model}, tokens/s", columns, cells.items())
    note = f"{source(result)} Inputs: {result['inputs']}. Times: {result['time']}."
    return {"schemes": "\n".join([*lines, "", note])}


def drift(result: dict, folder: pathlib.Path) -> dict[str, str]:
    plot_drift(result, folder / "drift.png")
    last = {(row["state_dtype"], row["how"]): row for row in result["rows"]}
    names = list(dict.fromkeys(how for _, how in last))
    dtypes = list(dict.fromkeys(dtype for dtype, _ in last))
    cells = [
        (
            LOOKS[how][0],
            [
                f"{last[d, how]['error']:.1e}" if (d, how) in last else "-"
                for d in dtypes
            ],
        )
        for how in names
    ]
    head = f"relative error after {result['steps']:,} steps, state"
    note = f"{source(result)} Inputs: {result['inputs']}."
    return {"drift": "\n".join([*markdown(head, dtypes, cells), "", note])}


def plot_drift(result: dict, path: pathlib.Path) -> None:
    dtypes = list(dict.fromkeys(row["state_dtype"] for row in result["rows"]))
    size = WIDTH, 1 + 2 * len(dtypes)
    figure, grid = plt.subplots(len(dtypes), figsize=size, squeeze=False)
    axes = grid[:, 0]
    for axis, dtype in zip(axes, dtypes, strict=True):
        for how, (name, colour, dash) in LOOKS.items():
            rows = rows_of(result, state_dtype=dtype, how=how)
            if rows:
                x, y = zip(*((row["step"], row["error"]) for row in rows), strict=True)
                axis.loglog(x, y, dash, color=colour, label=name, linewidth=1.5)
        axis.set_title(f"{dtype} state")
        axis.set_ylabel("relative error")
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("steps of 1 to 4 tokens that stand")
    figure.suptitle(f"Drift from float64, {result['device']}")
    legend(figure, axes[0])
    figure.savefig(path)
    plt.close(figure)
