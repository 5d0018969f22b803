"""Bits per byte of held-out text: python benchmarks/held_out.py [--text FILE]

Kneser-Ney models of every order, on the text of the Python that runs or on a saved one.
Needs no GPU. Writes results/held_out.json where the text is the pinned one.
"""

import json
import pathlib
from typing import Annotated, Any

import common
import typer
from rich.table import Table

from gdn_jax.training import kneser_ney, text


def main(
    saved: Annotated[
        pathlib.Path | None,
        typer.Option("--text", help="Text that gdn_jax.training.text.save wrote."),
    ] = None,
    out: Annotated[
        pathlib.Path | None, typer.Option(help="Folder of the results, for any text.")
    ] = None,
) -> None:
    corpus = text.load(saved) if saved else text.corpus()
    if not corpus.is_pinned and not out:
        raise SystemExit(
            f"The published figures are of the text of Python {text.PINNED}; this is "
            f"another, of {corpus.python}. Pass --text or --out."
        )
    result = describe(corpus) | {"kneser_ney": rows(corpus)}
    common.console.print(table(result))
    path = (out or common.RESULTS) / "held_out.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    common.console.print(f"wrote {path}")


def describe(corpus: text.Corpus) -> dict[str, Any]:
    parts = zip(
        ("train", "held_out"),
        (corpus.train, corpus.held_out),
        corpus.sha256,
        strict=True,
    )
    return {"python": corpus.python} | {
        name: {
            "bytes": len(part),
            "documents": part.count(text.SEPARATOR),
            "sha256": digest,
        }
        for name, part, digest in parts
    }


def rows(corpus: text.Corpus) -> list[dict[str, Any]]:
    return [
        {
            "order": order,
            "discounts": "modified" if modified else "plain",
            "bits_per_byte": kneser_ney.bits_per_byte(
                corpus.train, corpus.held_out, order, modified=modified
            ),
        }
        for order in range(1, kneser_ney.MAX_ORDER + 1)
        for modified in (False, True)
    ]


def table(result: dict[str, Any]) -> Table:
    sizes = ", ".join(
        f"{result[name]['bytes']} {name}" for name in ("train", "held_out")
    )
    shown = Table(title=f"Python {result['python']}, bytes: {sizes}")
    for column in ("order", "discounts", "bits per byte"):
        shown.add_column(column, justify="right")
    for row in result["kneser_ney"]:
        order, discounts, bits = row.values()
        shown.add_row(str(order), discounts, f"{bits:.4f}")
    return shown


if __name__ == "__main__":
    typer.run(main)
