"""Draws the results files and writes their numbers into the README:
python benchmarks/report.py

Numbers in the README stand between markers and come from here alone.
"""

import itertools
import json
import pathlib
import re
import statistics
from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "nvidia_h200"

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
    "xla": ("XLA", "#666666", "x"),
    "slots": ("slots copied in place", "#999999", "1"),
    "copy": ("copy of as many bytes", "#000000", "_"),
}
DASHED = ("copy", "slots", "unfused")
STATES = ("float32", "bfloat16")


def rows_of(result: dict, state: str, contender: str, T: int) -> dict[int, dict]:
    """By batch, at the shape that has a bar: H=16, HV=32, K=V=128."""
    wanted = {"H": 16, "HV": 32, "K": 128, "V": 128, "T": T, "state_dtype": state}
    wanted["contender"] = contender
    return {
        row["N"]: row
        for row in result["rows"]
        if "median_us" in row
        and not row.get("gib")
        and all(row[key] == value for key, value in wanted.items())
    }


def contenders(result: dict, state: str, T: int) -> Iterator[tuple[str, dict]]:
    for name in STYLE:
        rows = rows_of(result, state, name, T)
        if rows:
            yield name, rows


def plot_decode(result: dict, path: pathlib.Path) -> None:
    """Time, and the share of a copy's bandwidth, against batch."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 8), sharex=True)
    for column, state in enumerate(STATES):
        time, share = axes[:, column]
        for name, rows in contenders(result, state, T=1):
            label, colour, marker = STYLE[name]
            batches = sorted(rows)
            style = dict(color=colour, marker=marker, label=label, linewidth=1.5)
            style["linestyle"] = "--" if name in DASHED else "-"
            style["zorder"] = 3 if name == "triton" else 2
            time.plot(batches, [rows[n]["median_us"] for n in batches], **style)
            if name == "xla":
                continue
            copied = [rows[n]["tb_per_s"] / result["copy_tb_per_s"] for n in batches]
            share.plot(batches, [100 * c for c in copied], **style)
        time.set_title(f"{state} state")
        time.set_yscale("log")
        share.set_ylim(0, 105)
        for axis in (time, share):
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
        share.set_xticks(batches, [str(n) for n in batches])
        share.set_xlabel("sequences, one token each")
    axes[0, 0].set_ylabel("microseconds on the device")
    axes[1, 0].set_ylabel("% of a 1 GiB copy's bandwidth")
    figure.suptitle(f"Decode, H=16 HV=32 K=V=128, {result['device']}")
    _legend(figure, axes[0, 0])
    figure.savefig(path, dpi=130)


def plot_verify(result: dict, path: pathlib.Path) -> None:
    """Time in units of the copy of as many bytes: the lower, the better."""
    lengths = sorted({row["T"] for row in result["rows"]})
    figure, axes = plt.subplots(len(lengths), 2, figsize=(9, 8), sharex=True)
    for (row, T), (column, state) in itertools.product(
        enumerate(lengths), enumerate(STATES)
    ):
        axis, floor = axes[row, column], rows_of(result, state, "copy", T)
        shown = [
            found
            for found in contenders(result, state, T)
            if found[0] not in ("xla", "copy")
        ]
        for i, (name, rows) in enumerate(shown):
            label, colour, _ = STYLE[name]
            batches = sorted(rows)
            at = [n + 0.8 * (i + 0.5) / len(shown) - 0.4 for n in range(len(batches))]
            times = [rows[n]["median_us"] / floor[n]["median_us"] for n in batches]
            bars = axis.bar(
                at, times, 0.8 / len(shown), color=colour, label=label, zorder=2
            )
            texts = [f"{rows[n]['median_us']:.0f}" for n in batches]
            axis.bar_label(bars, texts, fontsize=7, rotation=90, padding=2)
        axis.axhline(1, color="black", linestyle="--", linewidth=1)
        axis.set_title(f"T={T}, {state} state")
        axis.set_xticks(range(len(batches)), [str(n) for n in batches])
        axis.margins(y=0.15)
        axis.grid(alpha=0.3, axis="y", zorder=0)
    for axis in axes[:, 0]:
        axis.set_ylabel("time / copy of as many bytes")
    for axis in axes[-1]:
        axis.set_xlabel("sequences")
    figure.suptitle(
        f"Verify of T tokens, a state stored for each, {result['device']} "
        f"(microseconds on the bars)"
    )
    _legend(figure, axes[0, 0])
    figure.savefig(path, dpi=130)


def _legend(figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))


def table(result: dict) -> str:
    """Microseconds by batch, ours and the peers', as Markdown."""
    shape = [row for row in result["rows"] if (row["HV"], row["K"]) == (32, 128)]
    batches = sorted({row["N"] for row in shape})
    lengths = sorted({row["T"] for row in shape})
    lines = []
    for T, state in itertools.product(lengths, STATES):
        what = f"{state} state" + (f", T = {T}" if T > 1 else "")
        lines += [f"| {what}, N = | {' | '.join(map(str, batches))} |"]
        lines += ["| --- |" + " ---: |" * len(batches)]
        for name, rows in contenders(result, state, T):
            cells = [f"{rows[n]['median_us']:.1f}" for n in batches]
            lines.append(f"| {STYLE[name][0]} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, source(result)])


def other_shapes(result: dict) -> str:
    """Decode at 64 sequences, the shapes that have no bar, as Markdown."""
    rows = [row for row in result["rows"] if row["N"] == 64 and row["T"] == 1]
    shapes = sorted({(r["K"], r["V"], r["H"], r["HV"], r.get("gib", 0)) for r in rows})
    names = [name for name in STYLE if any(r["contender"] == name for r in rows)]
    names = [name for name in names if name not in ("xla", "slots", "unfused")]
    lines = [f"| N=64 | {' | '.join(STYLE[name][0] for name in names)} |"]
    lines += ["| --- |" + " ---: |" * len(names)]
    for state, shape in itertools.product(STATES, shapes):
        K, V, H, HV, gib = shape
        times = {
            row["contender"]: row["median_us"]
            for row in rows
            if (row["K"], row["V"], row["H"], row["HV"], row.get("gib", 0)) == shape
            and row["state_dtype"] == state
            and "median_us" in row
        }
        cells = [f"{times[name]:.1f}" if name in times else "-" for name in names]
        pool = f", pool of {gib} GiB" if gib else ""
        lines.append(
            f"| {state}, H={H} HV={HV} K={K} V={V}{pool} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def first_call(decode: dict, verify: dict) -> str:
    def median(result: dict) -> float:
        return statistics.median(
            row["first_call_s"]
            for row in result["rows"]
            if row["contender"] == "triton" and "first_call_s" in row
        )

    return (
        f"The first call of a shape, tracing and compiling included, takes "
        f"{median(decode):.1f} s for decode and {median(verify):.1f} s for verify "
        f"(medians of the runs above)."
    )


def source(result: dict) -> str:
    return (
        f"{result['device']}, JAX {result['versions']['jax']}, {result['date'][:10]}, "
        f"commit {result['commit'][:10]}; a copy moves "
        f"{result['copy_tb_per_s']:.2f} TB/s."
    )


def splice(path: pathlib.Path, name: str, text: str) -> None:
    """Replaces what stands between <!-- name --> and <!-- /name -->."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    page = path.read_text()
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    if not re.search(pattern, page, re.DOTALL):
        raise SystemExit(f"{path} has no {begin} ... {end}")
    new = f"{begin}\n{text}\n{end}"
    path.write_text(re.sub(pattern, lambda _: new, page, flags=re.DOTALL))


def main() -> None:
    decode, verify = (
        json.loads((RESULTS / f"{suite}.json").read_text())
        for suite in ("decode", "verify")
    )
    plot_decode(decode, RESULTS / "decode.png")
    plot_verify(verify, RESULTS / "verify.png")
    readme = ROOT / "README.md"
    splice(readme, "decode", table(decode))
    splice(readme, "shapes", other_shapes(decode))
    splice(readme, "verify", table(verify))
    splice(readme, "first call", first_call(decode, verify))
    print(f"wrote {RESULTS}/decode.png, verify.png and the tables of {readme}")


if __name__ == "__main__":
    main()
