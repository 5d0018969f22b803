"""Draws the results files and writes their numbers into the README:
python benchmarks/report.py

Numbers in the README stand between markers and come from here alone.
"""

import json
import pathlib
import re

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
    "vllm_packed_decode": ("vLLM packed decode", "#009E73", "^"),
    "vllm_fused_sigmoid_gating": ("vLLM PR 35777", "#56B4E9", "D"),
    "fla_fused_recurrent": ("FLA (no gates, no pool)", "#CC79A7", "P"),
    "xla": ("XLA", "#666666", "x"),
    "slots": ("slots copied in place", "#999999", "1"),
    "copy": ("copy of as many bytes", "#000000", "_"),
}
STATES = ("float32", "bfloat16")


def rows_of(result: dict, state: str, contender: str) -> dict[int, dict]:
    """By batch, at the shape that has a bar: H=16, HV=32, K=V=128."""
    shape = {"H": 16, "HV": 32, "K": 128, "V": 128}
    return {
        row["N"]: row
        for row in result["rows"]
        if row["contender"] == contender
        and row["state_dtype"] == state
        and "median_us" in row
        and all(row[key] == value for key, value in shape.items())
    }


def plot(result: dict, path: pathlib.Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 8), sharex=True)
    for column, state in enumerate(STATES):
        time, share = axes[:, column]
        for name, (label, colour, marker) in STYLE.items():
            rows = rows_of(result, state, name)
            if not rows:
                continue
            batches = sorted(rows)
            style = dict(color=colour, marker=marker, label=label, linewidth=1.5)
            style["linestyle"] = "--" if name in ("copy", "slots", "unfused") else "-"
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
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.suptitle(f"Decode, H=16 HV=32 K=V=128, {result['device']}")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)


def table(result: dict) -> str:
    """Microseconds by batch, ours and the peers', as Markdown."""
    batches = (1, 8, 64, 256, 1024)
    lines = []
    for state in STATES:
        lines += [f"| {state} state, N = | {' | '.join(map(str, batches))} |"]
        lines += ["| --- |" + " ---: |" * len(batches)]
        for name, (label, _, _) in STYLE.items():
            rows = rows_of(result, state, name)
            if rows:
                cells = [f"{rows[n]['median_us']:.1f}" for n in batches]
                lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    versions = result["versions"]
    lines.append(
        f"{result['device']}, JAX {versions['jax']}, {result['date'][:10]}, commit "
        f"{result['commit'][:10]}; a copy moves {result['copy_tb_per_s']:.2f} TB/s."
    )
    return "\n".join(lines)


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
    result = json.loads((RESULTS / "decode.json").read_text())
    plot(result, RESULTS / "decode.png")
    splice(ROOT / "README.md", "decode", table(result))


if __name__ == "__main__":
    main()
