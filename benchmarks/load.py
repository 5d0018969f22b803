"""Continuous batching under load, and its faults: python benchmarks/load.py [--quick]

Ragged prompts come in bursts, again and again, to one engine of the shipped model.
Every text has to be that of its prompt alone, every row one request's, memory flat.
Callbacks raise and processes are killed on the way. Writes results/<device>/load.json
as it goes; runs on a CPU too.

A prompt alone is the same engine with no other request. Prompts are read in pieces of
16 tokens, one a call, so that all calls are of the same shapes however many there are,
and texts and log-probabilities are compared bit for bit. `generate` reads several
prompts at once, by other products: its texts may part where two tokens are as likely.
"""

import dataclasses
import gc
import itertools
import json
import os
import pathlib
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import load_killed
import typer
from common import console, header, results_folder
from load_parts import (
    Load,
    Text,
    cut,
    load_model,
    make_asked,
    make_engine,
    submit,
    text_of,
)
from load_serve import Fault, Watch, live_buffers, serve
from rich.progress import track

from gdn_jax import Engine, generate

KILLED = 500  # prompts at most of the processes that are killed
# Largest difference of log-probabilities that is taken for rounding; a logit of 16 has
# eight digits in bfloat16.
TIE = dict(float32=0.01, float16=0.1, bfloat16=0.5)
# Bytes by which memory may differ: allocators keep some of their own.
DEVICE_SPARE, HOST_SPARE = 2**20, 2**25


class Memory(NamedTuple):
    """Bytes, with no request on its way; of the device where it tells them."""

    buffers: int
    live: int
    device: int | None
    host: int

    @classmethod
    def now(cls) -> "Memory":
        gc.collect()
        buffers = live_buffers()
        stats = jax.local_devices()[0].memory_stats() or {}
        total = sum(buffers.values())
        return cls(len(buffers), total, stats.get("bytes_in_use"), host_bytes())


def host_bytes() -> int:
    """Resident."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def alone(engine: Engine, load: Load) -> list[Text]:
    """Each prompt's longest text with no other beside it; others' are parts of it."""
    texts = []
    for each in track(make_asked(load), description="alone", console=console):
        request = submit(engine, each._replace(max_tokens=load.new, stop=()))
        for _ in engine.run():
            pass
        texts.append(text_of(request))
    return texts


def differences(want: Text, got: Text) -> str | None:
    if want == got:
        return None
    pairs = zip(want.tokens, got.tokens, strict=False)
    place = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
    return f"wanted {want.finish_reason}, got {got.finish_reason}; parts at {place}"


def waves(
    engine: Engine,
    load: Load,
    want: Sequence[Text],
    seconds: float,
    least: int,
) -> Iterator[dict[str, Any]]:
    """A row for each time that all prompts were served. The first makes programs and
    what the host keeps of them; memory is compared with after it."""
    asked, begin = make_asked(load), time.perf_counter()
    for number in itertools.count():
        rng = random.Random(number)
        gaps = (rng.randrange(1, 2 * len(asked)) for _ in itertools.count())
        watch, wrong, tokens = Watch(), [], 0
        gc.collect()  # arrays that nobody has any more are not this wave's
        started = time.perf_counter()
        for place, request in serve(engine, asked, watch, rng, gaps):
            tokens += len(request.tokens)
            fault = differences(cut(want[place], asked[place]), text_of(request))
            if fault:
                wrong.append(f"prompt {place}: {fault}")
        now = time.perf_counter()
        yield {
            "wave": number,
            "texts": watch.finished,
            "tokens": tokens,
            "seconds": now - started,
            "calls": watch.calls,
            "callbacks_raised": watch.raised,
            "texts_not_as_alone": len(wrong),
            "row_faults": len(watch.faults),
            "first_faults": [*wrong[:3], *watch.faults[:3]],
            "live_bytes_between_calls": sorted(watch.live),
            "memory": Memory.now()._asdict(),
        }
        if now - begin > seconds and number + 1 >= least:
            return


def by_generate(engine: Engine, load: Load, want: Sequence[Text]) -> dict[str, Any]:
    """The same prompts and model by `generate`, whose callback first raises on the
    way."""
    model, params = engine.model, engine.params
    prompts = [each.prompt for each in make_asked(load)]
    given: dict[int, list[int]] = {}
    left = random.Random(0).randrange(1, len(prompts))

    def give(index: int, tokens: list[int]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Fault
        given.setdefault(index, []).extend(tokens)

    keywords: dict[str, Any] = dict(max_tokens=load.new, stop=(), details=True)
    keywords |= dict(num_rows=load.rows, speculative=load.drafts, decode=load.decode)
    before = Memory.now()
    try:
        generate(model, params, prompts, on_tokens=give, **keywords)
        raised = False
    except Fault:
        raised = True
    after = Memory.now()
    acknowledged = given
    begin = time.perf_counter()
    results: Any = generate(model, params, prompts, **keywords)
    seconds = time.perf_counter() - begin
    # the same call does the same work: what it gave before are its texts' beginnings
    lost = sum(
        results[i].tokens[: len(tokens)] != tokens for i, tokens in acknowledged.items()
    )
    parted, gaps = 0, [0.0]
    for one, got in zip(want, results, strict=True):
        pairs = enumerate(zip(one.tokens, got.tokens, strict=True))
        place = next((i for i, (x, y) in pairs if x != y), None)
        end = len(one.tokens) if place is None else place + 1
        parted += place is not None
        gaps += [
            abs(x - y)
            for x, y in zip(
                one.log_probabilities[:end], got.log_probabilities[:end], strict=True
            )
        ]
    return {
        "dtype": jnp.dtype(model.dtype).name,
        "texts": len(results),
        "seconds": seconds,
        "callback_raised": raised,
        "texts_with_tokens_given_before": len(acknowledged),
        "of_these_not_the_same_again": lost,
        "live_bytes_left_by_the_raise": after.live - before.live,
        "texts_parted_from_alone": parted,
        "largest_gap_of_log_probabilities": max(gaps),
    }


def verdict(result: dict[str, Any]) -> list[str]:
    """What is wrong, in words; nothing if all is well."""
    faults = []
    for row in result["rows"]:
        if row["texts_not_as_alone"] or row["row_faults"]:
            faults.append(f"wave {row['wave']}: {row['first_faults']}")
        if not row["callbacks_raised"]:
            faults.append(f"wave {row['wave']}: no callback raised")
        if len(row["live_bytes_between_calls"]) > 1:
            faults.append(f"wave {row['wave']}: live arrays' bytes change")
    # the first one makes programs, and what the host keeps of them
    kept = [row["memory"] for row in result["rows"]][1:]
    spare = dict(buffers=0, live=0, device=DEVICE_SPARE, host=HOST_SPARE)
    for name, most in spare.items():
        found = [memory[name] for memory in kept if memory[name] is not None]
        if found and max(found) - found[0] > most:
            faults.append(f"{name}: {found}")
    if found := result.get("generate"):
        if (
            found["of_these_not_the_same_again"]
            or found["live_bytes_left_by_the_raise"]
        ):
            faults.append(f"generate: {found}")
        if not found["callback_raised"]:
            faults.append("generate: no callback raised")
        if found["largest_gap_of_log_probabilities"] > TIE[found["dtype"]]:
            faults.append("generate: texts part where tokens are not as likely")
    if (found := result.get("killed")) is None:
        faults.append("killed: nothing was")
    elif found["faults"]:
        faults.append(f"killed: {found['faults'][:3]}")
    return faults


def main(
    prompts: int = 2000,
    rows: int = 64,
    seconds: float = 45.0,
    kills: int = 2,
    drafts: int = 0,
    decode: str | None = None,
    model: pathlib.Path | None = None,
    quick: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    if quick:
        prompts, rows, seconds, kills = 40, 4, 0.0, 1
    folder = None if model is None else str(model)
    load = Load(prompts, rows, drafts, decode, folder=folder)
    result = header(
        f"{prompts} slices of this package's sources, 1 to {load.prompt} bytes, "
        f"greedy, 1 to {load.new} new tokens, a third of the texts up to a line's end"
    )
    result["time"] = "wall clock"
    path = results_folder(result["device"], out, quick=quick)
    path /= f"load_{drafts}_drafts.json" if drafts else "load.json"
    result |= {"load": dataclasses.asdict(load), "rows": []}

    def write(**more: Any) -> None:
        result.update(more)
        path.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as temporary:
        cache = pathlib.Path(temporary) / "programs"
        load_killed.share_programs(cache)
        engine = make_engine(*load_model(load), load)
        begin = time.perf_counter()
        want = alone(engine, load)
        write(alone_seconds=time.perf_counter() - begin)
        console.print(f"alone: {result['alone_seconds']:.0f} s")
        for row in waves(engine, load, want, seconds, least=3):
            result["rows"].append(row)
            write()
            console.print(row)
        write(generate=by_generate(engine, load, want))
        console.print(result["generate"])
        folder_of_kills = pathlib.Path(temporary) / "killed"
        few = dataclasses.replace(load, count=min(prompts, KILLED))
        found = load_killed.kill_and_restore(
            folder_of_kills, few, want[:KILLED], kills, cache
        )
        write(killed=found)
        console.print(found)
    write(faults=verdict(result))
    console.print(result["faults"] or "all is well", f"wrote {path}")
    if result["faults"]:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
