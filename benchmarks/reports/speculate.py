"""Speculative decoding by the shipped model."""

import pathlib

from reports.style import markdown, source


def kinds_of(result: dict) -> dict[str, dict[int, dict]]:
    """Rows by how many texts grow at once and how, and by drafts."""
    kinds: dict[str, dict[int, dict]] = {}
    for row in result["rows"]:
        texts = "1 text" if row["rows"] == 1 else f"{row['rows']} texts at once"
        how = f"temperature {row['temperature']:g}" if row["temperature"] else "greedy"
        kinds.setdefault(f"{texts}, {how}", {})[row["drafts"]] = row
    return kinds


def cell(rows: dict[int, dict], drafts: int) -> str:
    if drafts not in rows:
        return "-"
    row, plain = rows[drafts], rows[0]
    speed = f"{row['tokens_per_s']:,.0f}"
    if not drafts:
        return speed
    ratio = row["tokens_per_s"] / plain["tokens_per_s"]
    return f"{speed} ({ratio:.2f}; {row['mean_accepted']:.2f})"


def table(result: dict) -> list[str]:
    kinds = kinds_of(result)
    drafts = sorted({count for rows in kinds.values() for count in rows})
    shown = [(kind, [cell(rows, n) for n in drafts]) for kind, rows in kinds.items()]
    head = "tokens/s (times plain; tokens of a step), drafts ="
    lines = markdown(head, map(str, drafts), shown)
    return [*lines, "", source(result) + spread(result)]


def spread(result: dict) -> str:
    """How far single runs were from the medians, where the file says so."""
    rows = [row for row in result["rows"] if "min_tokens_per_s" in row]
    if not rows:
        return ""
    least = min(row["min_tokens_per_s"] / row["tokens_per_s"] for row in rows)
    most = max(row["max_tokens_per_s"] / row["tokens_per_s"] for row in rows)
    return f" Single runs: {least:.2f} to {most:.2f} times their medians."


def speculate(results: list[dict], folder: pathlib.Path) -> dict[str, str]:
    """Of every device that has results, the fastest first."""
    del folder
    results = sorted(results, key=lambda r: -max(x["tokens_per_s"] for x in r["rows"]))
    return {"speculate": "\n\n".join("\n".join(table(r)) for r in results)}
