"""Speculative decoding by the shipped model: python benchmarks/speculate.py

Held-out documents are gone on with, plainly and with drafts of the model's own head.
Writes results/<device>/speculate.json; runs on a CPU too.
"""

import dataclasses
import json
import os
import pathlib
import platform
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import typer
from common import RESULTS, console, header
from rich.progress import track
from rich.table import Table

from gdn_jax import models
from gdn_jax.generation.engine import Engine, Figures
from gdn_jax.training import text

PROMPT, NEW, ROUNDS = 64, 256, 7  # bytes, bytes, runs of each


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


def row_of(setting: Setting, figures: Figures, seconds: list[float]) -> dict[str, Any]:
    return dataclasses.asdict(setting) | {
        "tokens_per_s": figures.decoded / statistics.median(seconds),
        "min_tokens_per_s": figures.decoded / max(seconds),
        "max_tokens_per_s": figures.decoded / min(seconds),
        "ms_a_step": 1e3 * statistics.median(seconds) / figures.steps,
        "mean_accepted": figures.mean_accepted,
    }


def measure(
    model: models.Model, params: Any, asked: list[list[int]]
) -> list[dict[str, Any]]:
    """A row for each setting, each compiled first. They take turns, so that what else
    the machine does slows no setting alone."""
    engines: dict[tuple[int, int], Engine] = {}
    for each in track(settings(), description="compile", console=console):
        kind = each.rows, each.drafts
        if kind not in engines:
            engines[kind] = Engine(
                model,
                params,
                num_rows=each.rows,
                num_positions=512,
                speculative=each.drafts,
            )
        run(engines[kind], asked[: each.rows], each.temperature)
    seconds: dict[Setting, list[float]] = {each: [] for each in settings()}
    figures: dict[Setting, Figures] = {}
    for _ in track(range(ROUNDS), description="speculate", console=console):
        for each in settings():
            engine = engines[each.rows, each.drafts]
            seconds[each].append(run(engine, asked, each.temperature))
            figures[each] = engine.figures
    return [row_of(each, figures[each], seconds[each]) for each in settings()]


def processor() -> str:
    """Of a CPU, of which JAX says no more than that it is one."""
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


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
    inputs = f"{PROMPT} bytes of 8 held-out documents, {NEW} new bytes"
    result = header(f"{inputs}; in {jnp.dtype(model.dtype)}", ROUNDS)
    folder = out or RESULTS / result["device"].lower().replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    if on_cpu:
        result["device"] = processor()
    result["text"] = dict(python=corpus.python, sha256=list(corpus.sha256))
    result["time"] = f"wall clock of decoding, median of {ROUNDS} runs that take turns"
    result["rows"] = measure(model, params, asked)
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
