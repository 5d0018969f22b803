"""Prefill and train."""

import pathlib
from collections.abc import Mapping

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from reports.style import STYLE, WIDTH, absences, legend, line, markdown, source


def title_of(row: dict) -> str:
    """A problem's column: rows x tokens."""
    if row["lengths"]:
        return f"{len(row['lengths'])} ragged, {sum(row['lengths'])} in all"
    state = "" if row["state_dtype"] == "float32" else f", {row['state_dtype']} state"
    return f"{row['N']} x {row['T']}{state}"


def times_of(result: dict) -> dict[str, dict[str, dict]]:
    """The rows that have a time, by contender and problem."""
    titles = dict.fromkeys(title_of(row) for row in result["rows"])
    times: dict[str, dict[str, dict]] = {name: {} for name in STYLE}
    for title in titles:
        for row in result["rows"]:
            known = row["contender"] in times  # not a launch timed for tuning
            if known and title_of(row) == title and "median_us" in row:
                times[row["contender"]][title] = row
    return {name: rows for name, rows in times.items() if rows}


def tables(result: dict) -> str:
    """Microseconds; how many times as long others take as gdn_jax; how exact they are;
    who is absent."""
    times = times_of(result)
    titles = list(dict.fromkeys(title_of(row) for row in result["rows"]))

    def cells(rows: Mapping[str, dict], form) -> list[str]:
        return [form(title) if title in rows else "-" for title in titles]

    def microseconds(rows: dict[str, dict]) -> list[str]:
        return cells(rows, lambda title: f"{rows[title]['median_us']:.0f}")

    lines = markdown(
        "microseconds, N x T =",
        titles,
        ((STYLE[name][0], microseconds(rows)) for name, rows in times.items()),
    )
    ours = times.get("triton", {})
    compared = [
        (STYLE[name][0], cells(ours.keys() & rows, _ratio(rows, ours)))
        for name, rows in times.items()
        if name != "triton"
    ]
    copy = result["copy_tb_per_s"]
    share = cells(ours, lambda title: f"{ours[title]['tb_per_s'] / copy:.0%}")
    compared.append(("gdn_jax, share of a copy's bandwidth", share))
    lines += ["", *markdown("time / gdn_jax's", titles, compared), ""]
    errors = [
        (STYLE[name][0], cells(rows, lambda t, rows=rows: _worst_error(rows[t])))
        for name, rows in times.items()
    ]
    what = {name for row in result["rows"] for name in row.get("errors", {})}
    of = "of state and gradients" if what - {"state", "out"} else "of the state"
    lines += [*markdown(f"relative error {of}", titles, errors), ""]
    lines += absences(result["rows"], title_of)
    return "\n".join([*lines, source(result)])


def _worst_error(row: dict) -> str:
    """Of the state and the gradients; `out` is rounded to the activations' dtype."""
    errors = [error for what, error in row["errors"].items() if what != "out"]
    return f"{max(errors):.1e}" if errors else "-"


def _ratio(rows: dict[str, dict], ours: dict[str, dict]):
    return lambda title: f"{rows[title]['median_us'] / ours[title]['median_us']:.2f}"


def plot(result: dict, what: str, path: pathlib.Path) -> None:
    """One row of tokens: time, and others' time in units of ours, against length."""
    figure, (time, ratio) = plt.subplots(1, 2, figsize=(WIDTH, 4))
    times = {
        name: {
            row["T"]: row["median_us"]
            for row in rows.values()
            if row["N"] == 1 and row["state_dtype"] == "float32"
        }
        for name, rows in times_of(result).items()
    }
    ours = times.get("triton", {})
    ticks = sorted({T for rows in times.values() for T in rows})
    for name, rows in times.items():
        style, lengths = line(name), sorted(rows)
        time.plot(lengths, [rows[T] for T in lengths], **style)
        both = [T for T in lengths if T in ours]
        ratio.plot(both, [rows[T] / ours[T] for T in both], **style)
    for axis in (time, ratio):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ticks, [str(T) for T in ticks])
        axis.set_xlabel("tokens of one sequence")
        axis.grid(alpha=0.3, which="both")
    ratio.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ratio.yaxis.set_major_formatter("{x:g}")
    ratio.yaxis.set_minor_formatter("")
    time.set_ylabel("microseconds on the device")
    ratio.set_ylabel("time / gdn_jax's")
    figure.suptitle(f"{what}, H=16 HV=32 K=V=128, {result['device']}")
    legend(figure, time)
    figure.savefig(path)


def prefill(result: dict, folder: pathlib.Path) -> dict[str, str]:
    plot(result, "Prefill", folder / "prefill.png")
    return {"prefill": tables(result)}


def train(result: dict, folder: pathlib.Path) -> dict[str, str]:
    plot(result, "Forward and backward", folder / "train.png")
    return {"train": tables(result)}
