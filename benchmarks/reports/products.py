"""Products of few rows, and the experts'."""

import pathlib
from collections.abc import Callable

import numpy as np

from reports.style import STYLE, absences, markdown, source

NOT_MEASURED = "What has a dash was not measured."


def table(result: dict, product_of: Callable[[dict], str], count: str) -> list[str]:
    """Ours and XLA's of each product, by `row[count]`. Other launches, timed for
    tuning, are not shown."""
    rows = [row for row in result["rows"] if row["contender"] in STYLE]
    counts = sorted({row[count] for row in rows})
    times = {
        (product_of(row), row["contender"], row[count]): (
            f"{row['median_us']:.1f} ({row['tb_per_s'] / result['copy_tb_per_s']:.0%})"
        )
        for row in rows
        if "median_us" in row
    }
    products = dict.fromkeys(map(product_of, rows))
    shown = (
        (
            f"{product}: {STYLE[name][0]}",
            [times.get((product, name, n), "-") for n in counts],
        )
        for product in products
        for name in ("triton", "xla")
    )
    us = {
        (product_of(row), row["contender"], row[count]): row["median_us"]
        for row in rows
        if "median_us" in row
    }
    behind = [
        f"{product} at {n}"
        for product in products
        for n in counts
        if us.get((product, "xla", n), np.inf) < us.get((product, "triton", n), 0)
    ]
    slower = [f"XLA's are faster: {'; '.join(behind)}."] if behind else []
    head = f"microseconds (share of a copy's bandwidth), {count} ="
    lines = markdown(head, map(str, counts), shown)
    missing = absences(rows, lambda row: f"{product_of(row)}, {count} = {row[count]}")
    dashes = [] if len(times) == 2 * len(products) * len(counts) else [NOT_MEASURED]
    return [*lines, "", *missing, " ".join([source(result), *slower, *dashes])]


def few_rows(result: dict, folder: pathlib.Path) -> dict[str, str]:
    """With its heading, as `experts`: there is nothing to say before its results."""
    del folder

    def product_of(row: dict) -> str:
        return f"{row['name']}, {row['D']} x {sum(row['columns'])}"

    lines = table(result, product_of, "L")
    heading = "### Products of few rows: a layer's matrices in decoding"
    text = "L rows of bfloat16 by matrices that no earlier call left in the cache."
    return {"few_rows": "\n".join([heading, "", *lines, "", text])}


def experts(result: dict, folder: pathlib.Path) -> dict[str, str]:
    del folder

    def product_of(row: dict) -> str:
        product = f"{row['product']}, {row['D']} x {row['F']}"
        return f"{row['model']} ({row['k']} of {row['E']} experts), {product}"

    lines = table(result, product_of, "N")
    heading = "### The experts' products: `grouped_dot`"
    text = (
        "N tokens of bfloat16, whose experts are drawn evenly; bandwidth is of the "
        "weights of those that any token chose, and of the rows."
    )
    return {"experts": "\n".join([heading, "", *lines, "", text])}
