"""Decode and verify."""

import itertools
import pathlib
import statistics
from collections.abc import Iterator

import matplotlib.pyplot as plt

from reports.style import STYLE, WIDTH, legend, line, markdown, source

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
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 7.5), sharex=True, sharey="row")
    for column, state in enumerate(STATES):
        time, share = axes[:, column]
        for name, rows in contenders(result, state, T=1):
            batches = sorted(rows)
            style = line(name) | dict(linestyle="--" if name in DASHED else "-")
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
    legend(figure, axes[0, 0])
    figure.savefig(path)


def plot_verify(result: dict, path: pathlib.Path) -> None:
    """Time in units of the copy of as many bytes: the lower, the better."""
    lengths = sorted({row["T"] for row in result["rows"]})
    panels = list(itertools.product(lengths, STATES))
    size = WIDTH, 1.4 + 1.9 * len(panels)
    figure, axes = plt.subplots(len(panels), figsize=size, sharex=True, sharey=True)
    for axis, (T, state) in zip(axes, panels, strict=True):
        floor = rows_of(result, state, "copy", T)
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
            axis.bar_label(bars, texts, fontsize=9, padding=1)
        axis.axhline(1, color="black", linestyle="--", linewidth=1)
        axis.set_title(f"T={T}, {state} state")
        axis.set_xticks(range(len(batches)), [str(n) for n in batches])
        axis.margins(y=0.15)
        axis.grid(alpha=0.3, axis="y", zorder=0)
        axis.set_ylabel("time / copy")
    axes[-1].set_xlabel("sequences")
    figure.suptitle(
        f"Verify of T tokens, a state stored for each, {result['device']}\n"
        f"(in units of a copy of as many bytes; on the bars: microseconds)"
    )
    legend(figure, axes[0])
    figure.savefig(path)


def table(result: dict) -> str:
    """Microseconds by batch, ours and the peers', as Markdown."""
    shape = [row for row in result["rows"] if (row["HV"], row["K"]) == (32, 128)]
    batches = sorted({row["N"] for row in shape})
    lengths = sorted({row["T"] for row in shape})
    lines = []
    for T, state in itertools.product(lengths, STATES):
        what = f"{state} state" + (f", T = {T}" if T > 1 else "")
        shown = (
            (STYLE[name][0], [f"{rows[n]['median_us']:.1f}" for n in batches])
            for name, rows in contenders(result, state, T)
        )
        lines += [*markdown(f"{what}, N =", map(str, batches), shown), ""]
    return "\n".join([*lines, source(result)])


def other_shapes(result: dict) -> str:
    """Decode at 64 sequences, the shapes that have no bar, as Markdown."""
    rows = [row for row in result["rows"] if row["N"] == 64 and row["T"] == 1]
    shapes = sorted({(r["K"], r["V"], r["H"], r["HV"], r.get("gib", 0)) for r in rows})
    names = [name for name in STYLE if any(r["contender"] == name for r in rows)]
    names = [name for name in names if name not in ("xla", "slots", "unfused")]
    lines = []
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
        lines.append((f"{state}, H={H} HV={HV} K={K} V={V}{pool}", cells))
    return "\n".join(markdown("N=64", (STYLE[name][0] for name in names), lines))


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


def decode(result: dict, folder: pathlib.Path) -> dict[str, str]:
    plot_decode(result, folder / "decode.png")
    return {"decode": table(result), "shapes": other_shapes(result)}


def verify(result: dict, folder: pathlib.Path) -> dict[str, str]:
    plot_verify(result, folder / "verify.png")
    return {"verify": table(result)}
