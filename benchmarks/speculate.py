"""Speculative decoding by the shipped model: python benchmarks/speculate.py

Held-out documents are gone on with, plainly and with drafts of the model's own head.
Writes results/<device>/speculate.json; runs on a CPU too.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import typer
from common import RESULTS, console, header
from rich.progress import track
from rich.table import Table

from gdn_jax import models
from gdn_jax.generation.engine import Engine, Figures
from gdn_jax.training import text

PROMPT, NEW, ROUNDS = 64, 256, 3  # bytes, bytes, runs of each


@dataclasses.dataclass(frozen=True)
class Setting:
    rows: int
    temperature: float
    drafts: int


def settings() -> list[Setting]:
    kinds = (1, 0), (1, 3), (8, 0), (8, 3), (1, 1), (1, 2), (1, 4)
    return [
        Setting(rows, temperature, drafts)
        for rows, drafts in kinds
        for temperature in (0.0, 1.0)
    ]


def prompts(corpus: text.Corpus) -> list[list[int]]:
    """The beginnings of eight held-out documents, from all over the text."""
    long = [
        document
        for document in corpus.held_out.split(text.SEPARATOR)
        if len(document) >= 2 * PROMPT
    ]
    return [list(long[i * len(long) // 8][:PROMPT]) for i in range(8)]


def run(engine: Engine, asked: list[list[int]], temperature: float) -> float:
    """Seconds of the decoding, prefill left out."""
    engine.figures = Figures()
    for seed, prompt in enumerate(asked):
        engine.submit(
            prompt, max_tokens=NEW, temperature=temperature, seed=seed, stop=()
        )
    seconds = 0.0
    while engine.requests:
        begin, steps = time.perf_counter(), engine.figures.steps
        engine.step()
        if engine.figures.steps > steps:
            seconds += time.perf_counter() - begin
    return seconds


def measure(engine: Engine, setting: Setting, asked: list[list[int]]) -> dict[str, Any]:
    seconds = [run(engine, asked, setting.temperature) for _ in range(ROUNDS)]
    figures = engine.figures
    return dataclasses.asdict(setting) | {
        "tokens_per_s": figures.decoded / statistics.median(seconds),
        "ms_a_step": 1e3 * statistics.median(seconds) / figures.steps,
        "mean_accepted": figures.mean_accepted,
    }


def main(
    saved: pathlib.Path | None = typer.Option(None, "--text"),  # noqa: B008
    out: pathlib.Path | None = None,
) -> None:
    corpus = text.load(saved) if saved else text.corpus()
    if not corpus.is_pinned:  # another's held-out part may have been trained on
        raise SystemExit(f"--text: the text of Python {text.PINNED}, saved, is wanted.")
    asked = prompts(corpus)
    on_cpu = jax.default_backend() == "cpu"
    model, params = models.load(models.SMALL, dtype="float32" if on_cpu else None)
    result = header(f"{PROMPT} bytes of 8 held-out documents, {NEW} new bytes", ROUNDS)
    result["text"] = dict(python=corpus.python, sha256=list(corpus.sha256))
    result["time"] = f"wall clock of decoding, median of {ROUNDS}"
    result["rows"], engines = [], {}
    folder = out or RESULTS / result["device"].lower().replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    for setting in track(settings(), description="speculate", console=console):
        kind = setting.rows, setting.drafts
        if kind not in engines:
            engines[kind] = Engine(
                model,
                params,
                num_rows=setting.rows,
                num_positions=512,
                speculative=setting.drafts,
            )
            run(engines[kind], asked[: setting.rows], 0.0)  # compiles
        result["rows"].append(measure(engines[kind], setting, asked))
        (folder / "speculate.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(table(result["rows"]))


def table(rows: list[dict[str, Any]]) -> Table:
    plain = {
        (row["rows"], row["temperature"]): row["tokens_per_s"]
        for row in rows
        if row["drafts"] == 0
    }
    shown = Table("rows", "temperature", "drafts", "tokens/s", "of plain", "accepted")
    for row in rows:
        speed = row["tokens_per_s"]
        shown.add_row(
            str(row["rows"]),
            str(row["temperature"]),
            str(row["drafts"]),
            f"{speed:,.0f}",
            f"{speed / plain[row['rows'], row['temperature']]:.2f}",
            f"{row['mean_accepted']:.2f}",
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
