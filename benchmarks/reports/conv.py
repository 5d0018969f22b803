"""The causal convolution."""

import pathlib

from reports.style import STYLE, absences, markdown, source


def kind_of(row: dict) -> str:
    if row["S"] > 1:
        return f"verify {row['T']} tokens, N ="
    return "one token, N =" if row["T"] == 1 else "whole sequences, N x T ="


def title_of(row: dict) -> str:
    """A problem's column in the table of its kind."""
    if row["S"] > 1:
        return f"{row['N']}{', packed' if row['lengths'] else ''}"
    if row["lengths"]:
        return f"{len(row['lengths'])} ragged, {sum(row['lengths'])} in all"
    return str(row["N"]) if row["T"] == 1 else f"{row['N']} x {row['T']}"


def table(rows: list[dict], copy_tb_per_s: float) -> list[str]:
    """Microseconds at the problems of one kind; how close ours is to a copy."""
    titles = list(dict.fromkeys(map(title_of, rows)))
    shown = []
    for name, (label, *_) in STYLE.items():
        found = {
            title_of(row): f"{row['median_us']:.1f}"
            for row in rows
            if row["contender"] == name and "median_us" in row
        }
        if found:
            shown.append((label, [found.get(title, "-") for title in titles]))
    share = {
        title_of(row): f"{row['tb_per_s'] / copy_tb_per_s:.0%}"
        for row in rows
        if row["contender"] == "triton"
    }
    label = "gdn_jax, share of a copy's bandwidth"
    shown.append((label, [share.get(title, "-") for title in titles]))
    lines = markdown(f"microseconds, {kind_of(rows[0])}", titles, shown)
    return [*lines, "", *absences(rows, title_of)]


def conv(result: dict, folder: pathlib.Path) -> dict[str, str]:
    """Other launches of our kernel, timed for tuning, are not shown."""
    del folder
    rows = [row for row in result["rows"] if row["contender"] in STYLE]
    lines = []
    for kind in dict.fromkeys(map(kind_of, rows)):
        of_kind = [row for row in rows if kind_of(row) == kind]
        lines += table(of_kind, result["copy_tb_per_s"])
    return {"conv": "\n".join([*lines, source(result)])}
