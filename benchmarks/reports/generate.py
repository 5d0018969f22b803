"""Decoding by whole models: a file each."""

import pathlib

import matplotlib.pyplot as plt

from reports.style import SHOWN, WIDTH, legend, markdown, source

STATE = "float32"
DRAFTS = (0, 3)  # that are shown
PARTS = {"update": "#D55E00", "other kernels": "#0072B2", "between kernels": "#999999"}
NOTE = (
    "A token's ms are a step's wall clock over the tokens that a text gains by it; in "
    "brackets, how many times its floor a step takes: the time of copying the bytes "
    "that no step can do without, weights that are used, keys and values, states. "
    "Saved are the microseconds of the fused update against gates and rule in two "
    "launches, in turn with it; from 64 texts on the GPU's clock, which its power "
    "limits, moves by more from block to block."
)


def title_of(drafts: int) -> str:
    return f"{drafts} drafts" if drafts else "plain"


def rows_of(result: dict, drafts: int) -> dict[int, dict]:
    """With the fused update, by how many texts grow at once."""
    wanted = {"state_dtype": STATE, "update": "fused", "drafts": drafts}
    return {
        row["rows"]: row
        for row in result["rows"]
        if all(row[key] == value for key, value in wanted.items())
    }


def batches_of(result: dict) -> list[int]:
    return sorted({N for drafts in DRAFTS for N in rows_of(result, drafts)})


def model_of(result: dict) -> str:
    return result["rows"][0]["model"]


def size_of(result: dict) -> float:
    """Bytes of the weights that most texts use, to order the models by."""
    timed = [row for row in result["rows"] if "absent" not in row]
    return max((row["gigabytes"]["weights"] for row in timed), default=0.0)


def saved(row: dict, name: str = "saved") -> str:
    """With the quartiles of single rounds, where the file has them."""
    if f"{name}_us_a_layer" not in row:
        return "-"
    spread = row.get(f"{name}_us_quartiles")
    within = "" if spread is None else " ({:.1f} to {:.1f})".format(*spread)
    return f"{row[f'{name}_us_a_layer']:.1f}{within}"


CELLS = {
    "ms a token": lambda row: (
        f"{row['ms_a_token']:.2f} ({row['ms_a_step'] / row['floor_ms']:.2f})"
    ),
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
    "us saved a layer": saved,
    "us of those by one launch": lambda row: saved(row, "saved_in_one"),
}


def table(result: dict) -> list[str]:
    batches = batches_of(result)
    shown, absences = [], []
    for drafts in DRAFTS:
        rows = rows_of(result, drafts)
        timed = {N: row for N, row in rows.items() if "absent" not in row}
        for what, form in CELLS.items():
            cells = [form(timed[N]) if N in timed else "-" for N in batches]
            if set(cells) != {"-"}:
                shown.append((f"{title_of(drafts)}, {what}", cells))
        absences += [
            f"Absent: {title_of(drafts)}, N = {N}, which needs {row['absent']}.\n"
            for N, row in rows.items()
            if "absent" in row
        ]
    head = f"{model_of(result)}, {STATE} state, N ="
    return [
        *markdown(head, map(str, batches), shown),
        "",
        *absences,
        source(result),
        *earlier(result),
    ]


def earlier(result: dict) -> list[str]:
    """What of a table was measured at other commits than its file's last run."""
    batches: dict[tuple[str, int], list[int]] = {}
    for drafts in DRAFTS:
        for N, row in sorted(rows_of(result, drafts).items()):
            commit = row.get("commit", result["commit"])[:SHOWN]
            if commit != result["commit"][:SHOWN]:
                batches.setdefault((commit, drafts), []).append(N)
    return [
        f"Of commit {commit}: {title_of(drafts)}, N = {', '.join(map(str, each))}."
        for (commit, drafts), each in batches.items()
    ]


def parts_of(row: dict) -> list[float]:
    """Milliseconds a token of PARTS; kernels are of a run that was not timed."""
    tokens = row["ms_a_step"] / row["ms_a_token"]
    kernels = min(row["kernels_ms_a_step"], row["ms_a_step"])
    update = row["update_share"] * kernels
    parts = update, kernels - update, row["ms_a_step"] - kernels
    return [part / tokens for part in parts]


def draw(axis, result: dict) -> None:
    """Bars of a model: plain and, hatched, with drafts beside."""
    batches, width = batches_of(result), 0.8 / len(DRAFTS)
    above = dict(textcoords="offset points", ha="center", fontsize=9)
    highest = 0.0
    for i, drafts in enumerate(DRAFTS):
        look = dict(edgecolor="white", linewidth=0, hatch="///" if drafts else None)
        for N, row in rows_of(result, drafts).items():
            at = batches.index(N) + width * (i + 0.5) - 0.4
            if "absent" in row:
                axis.annotate("no room", (at, 0), (0, 4), rotation=90, **above)
                continue
            top = 0.0
            for part, colour in zip(parts_of(row), PARTS.values(), strict=True):
                axis.bar(at, part, 0.94 * width, top, color=colour, **look)
                top += part
            ratio = row["ms_a_step"] / row["floor_ms"]
            ends = at - width / 2, at + width / 2
            axis.hlines(row["ms_a_token"] / ratio, *ends, "black", linewidth=1.5)
            axis.annotate(f"{ratio:.2f}", (at, top), (0, 2), **above)
            highest = max(highest, top)
    axis.set_title(model_of(result))
    axis.set_xticks(range(len(batches)), [str(N) for N in batches])
    axis.set_xlim(-0.6, len(batches) - 0.4)
    axis.set_ylim(0, 1.12 * highest)
    axis.grid(alpha=0.3, axis="y")
    axis.set_axisbelow(True)


def plot(results: list[dict], path: pathlib.Path) -> None:
    size = WIDTH, 1.2 + 2.2 * len(results)
    figure, axes = plt.subplots(len(results), figsize=size, squeeze=False)
    for axis, result in zip(axes[:, 0], results, strict=True):
        draw(axis, result)
        axis.set_ylabel("ms for a token")
    first, last = axes[0, 0], axes[-1, 0]
    last.set_xlabel("texts at once")
    for part, colour in PARTS.items():
        first.fill_between([], [], color=colour, label=part)
    first.plot([], [], color="black", label="floor")
    figure.suptitle(
        f"Decoding by whole models, {STATE} state, {results[0]['device']}\n"
        f"(hatched: {title_of(DRAFTS[1])}; on the bars: times the floor)"
    )
    legend(figure, first)
    figure.savefig(path)
    plt.close(figure)


def generate(results: list[dict], folder: pathlib.Path) -> dict[str, str]:
    """With its heading, since there is nothing to say before there are results."""
    results = sorted(results, key=size_of)
    plot(results, folder / "generate.png")
    first, picture = results[0], f"benchmarks/results/{folder.name}/generate.png"
    lines = ["### Whole models: steps of decoding", ""]
    lines += [f"![time of a token against its floor]({picture})", ""]
    for result in results:
        lines += [*table(result), ""]
    lines += [f"{NOTE} Inputs: {first['inputs']}. Times: {first['time']}."]
    return {"generate": "\n".join(lines)}
