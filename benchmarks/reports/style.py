"""How contenders look, and what pictures and tables of all suites share."""

from collections.abc import Callable, Iterable

import matplotlib

matplotlib.use("Agg")

# A phone shows a picture 360 pixels wide: of 6 inches, so that 10 points are 8 pixels.
WIDTH = 6
matplotlib.rcParams |= {
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.titlesize": 11,
    "savefig.dpi": 140,
}

SHOWN = 10  # digits of a commit
# Okabe and Ito's colours, for the colour-blind too, and a marker for each.
STYLE = {
    "triton": ("gdn_jax", "#D55E00", "o"),
    "unfused": ("gdn_jax, unfused pair", "#E69F00", "v"),
    "flashinfer_decode": ("FlashInfer", "#0072B2", "s"),
    "flashinfer_mtp": ("FlashInfer, cached MTP", "#0072B2", "s"),
    "vllm_packed_decode": ("vLLM packed decode", "#009E73", "^"),
    "vllm_fused_sigmoid_gating": ("vLLM PR 35777", "#56B4E9", "D"),
    "vllm_fused_sigmoid_gating_verify": ("vLLM PR 35777", "#56B4E9", "D"),
    "fla_fused_recurrent": ("FLA (no gates, no pool)", "#CC79A7", "P"),
    "fla_chunk": ("FLA", "#CC79A7", "P"),
    "fla_chunk_given_gates": ("FLA (gates given)", "#CC79A7", "X"),
    "fla_chunk_forward": ("FLA, forward alone", "#CC79A7", "P"),
    "fla_chunk_train": ("FLA, forward and backward", "#CC79A7", "X"),
    "vllm_conv_update": ("vLLM", "#009E73", "^"),
    "vllm_conv": ("vLLM", "#009E73", "^"),
    "fla_conv_update": ("FLA (rows gathered beforehand)", "#CC79A7", "P"),
    "fla_conv": ("FLA (rows gathered beforehand, new caches)", "#CC79A7", "P"),
    "token_by_token": ("gdn_jax, token by token", "#0072B2", "s"),
    "xla": ("XLA", "#666666", "x"),
    "slots": ("slots copied in place", "#999999", "1"),
    "copy": ("copy of as many bytes", "#000000", "_"),
}


def line(name: str) -> dict:
    """Keywords of `plot`; ours lies on top."""
    label, colour, marker = STYLE[name]
    style = dict(color=colour, marker=marker, label=label, linewidth=1.5)
    return style | dict(zorder=3 if name == "triton" else 2)


def legend(figure, axis) -> None:
    """Below the panels, in two columns."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False)
    inches = 0.16 + 0.21 * -(-len(labels) // 2)
    figure.tight_layout(rect=(0, inches / figure.get_figheight(), 1, 1))


def markdown(
    head: str, columns: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]
) -> list[str]:
    """The lines of a table whose first column is names."""
    columns = list(columns)
    return [
        f"| {head} | {' | '.join(columns)} |",
        "| --- |" + " ---: |" * len(columns),
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
    ]


def name_of(contender: str) -> str:
    return STYLE[contender][0]


def absences(
    rows: list[dict],
    title_of: Callable[[dict], str],
    name_of: Callable[[str], str] = name_of,
) -> list[str]:
    """Who is absent where, and why: a paragraph each."""
    titles = list(dict.fromkeys(map(title_of, rows)))
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "absent" in row:
            places = found.setdefault((row["contender"], row["absent"]), [])
            places.append(title_of(row))
    return [
        f"{name_of(name)} is absent"
        + ("" if places == titles else f" at {'; '.join(places)}")
        + f": {reason}\n"
        for (name, reason), places in found.items()
    ]


def source(result: dict) -> str:
    """With the commits of all rows, the oldest first; those that name none are of the
    file's own."""
    about = {key: result[key] for key in ("commit", "date")}
    runs = [about | row for row in result.get("rows") or [about]]
    runs.sort(key=lambda run: run["date"])
    dates = dict.fromkeys(run["date"][:10] for run in (runs[0], runs[-1]))
    commits = dict.fromkeys(run["commit"][:SHOWN] for run in runs)
    text = (
        f"{result['device']}, JAX {result['versions']['jax']}, {' to '.join(dates)}, "
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    )
    if "copy_tb_per_s" not in result:
        return f"{text}."
    return f"{text}; a copy moves {result['copy_tb_per_s']:.2f} TB/s."
