"""An engine whose process is killed at any time, and goes on in the next one.

What a process gives its users it first writes to a journal: it may be killed right
after. The engine is saved behind that, every few calls. So a text that goes on from
what was saved last gives some tokens again, the same ones, and none is missing.
"""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from load_parts import (
    Load,
    Text,
    cut,
    load_model,
    make_asked,
    make_engine,
    submit,
)

from gdn_jax import Engine

SAVE_EVERY = 5  # calls
JOURNAL, SAVED = "journal", "engine.safetensors"
DEADLINE = 600  # seconds of one process, more than any takes


def share_programs(cache: pathlib.Path) -> None:
    """Compiled once for all processes: it is faster, and a GPU's products may be tuned
    otherwise when they are compiled again, to other bits."""
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def kill_and_restore(
    folder: pathlib.Path,
    load: Load,
    want: Sequence[Text],
    kills: int,
    cache: pathlib.Path | None,
) -> dict[str, Any]:
    """Processes until one comes to its end; the first `kills` of them do not."""
    folder.mkdir(parents=True)
    asked = make_asked(load)
    rng, begin = random.Random(0), time.perf_counter()
    killed_at, amid_save = [], 0
    wanted = sum(len(cut(*pair).tokens) for pair in zip(want, asked, strict=True))
    for number in range(kills + 1):
        process = start(folder, load, cache)
        try:
            if number < kills:
                share = (number + rng.random()) / (kills + 0.5)
                wait_for(process, folder, share * wanted)
                time.sleep(rng.random() / 50)
                process.send_signal(signal.SIGKILL)
            process.wait(DEADLINE)
        finally:
            process.kill()
            process.wait()
        if number < kills:
            killed_at.append(sum(map(len, read(folder)[0].values())))
            amid_save += (folder / f"{SAVED}.partial").exists()
        elif process.returncode:
            raise RuntimeError(f"the last process ended with {process.returncode}")
    tokens, reasons, faults, again = read(folder)
    for place, (one, each) in enumerate(zip(want, asked, strict=True)):
        text = cut(one, each)
        got = tokens.get(place, {})
        pairs = [[*x] for x in zip(text.tokens, text.log_probabilities, strict=True)]
        if [got.get(i) for i in range(len(got))] != pairs:
            faults.append(f"prompt {place} has not its text alone")
        if reasons.get(place) != text.finish_reason:
            faults.append(f"prompt {place} ends with {reasons.get(place)}")
    return {
        "kills": kills,
        "tokens": wanted,
        "acknowledged_when_killed": killed_at,
        "killed_amid_save": amid_save,
        "tokens_given_again": again,
        "faults": faults,
        "seconds": time.perf_counter() - begin,
    }


def start(
    folder: pathlib.Path, load: Load, cache: pathlib.Path | None
) -> subprocess.Popen:
    # a GPU's memory is this process' by now but for a rest
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    task = dict(folder=str(folder), load=dataclasses.asdict(load))
    task |= dict(cache=str(cache) if cache else None)
    command = [sys.executable, __file__, json.dumps(task)]
    return subprocess.Popen(command, env=environment)


def wait_for(process: subprocess.Popen, folder: pathlib.Path, tokens: float) -> None:
    """Until so many were acknowledged."""
    deadline = time.monotonic() + DEADLINE
    while sum(map(len, read(folder)[0].values())) < tokens:
        if process.poll() is not None:
            raise RuntimeError(f"a process ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{tokens:.0f} tokens took more than {DEADLINE} s")
        time.sleep(0.01)


def read(
    folder: pathlib.Path,
) -> tuple[dict[int, dict[int, list]], dict[int, str], list[str], int]:
    """(token and log-probability by request and place, why each ended, faults, tokens
    that were given again)."""
    path = folder / JOURNAL
    tokens: dict[int, dict[int, list]] = {}
    reasons: dict[int, str] = {}
    faults, again = [], 0
    lines = path.read_text().splitlines() if path.is_file() else []
    for line in lines:
        number, first, pairs, reason = json.loads(line)
        known = tokens.setdefault(number, {})
        for place, pair in enumerate(pairs, first):
            again += place in known
            if known.setdefault(place, pair) != pair:
                faults.append(f"token {place} of {number} is another one again")
        if reason is not None:
            reasons[number] = reason
    return tokens, reasons, faults, again


def work(folder: pathlib.Path, load: Load) -> None:
    """Goes on from what was saved last, or begins."""
    model, params = load_model(load)
    saved = folder / SAVED
    if saved.is_file():
        engine = Engine.restore(saved, model, params)
    else:
        engine = make_engine(model, params, load)
        for each in make_asked(load):
            submit(engine, each)
    given = {request.number: len(request.tokens) for request in engine.requests}
    journal = os.open(folder / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for call, changed in enumerate(engine.run()):
        for request in changed:
            first = given[request.number]
            given[request.number] = len(request.tokens)
            new = zip(
                request.tokens[first:], request.log_probabilities[first:], strict=True
            )
            line = [request.number, first, list(new), request.finish_reason]
            os.write(journal, json.dumps(line).encode() + b"\n")
        if call % SAVE_EVERY == 0:
            engine.save(saved)


if __name__ == "__main__":
    TASK = json.loads(sys.argv[1])
    if TASK["cache"]:
        share_programs(pathlib.Path(TASK["cache"]))
    work(pathlib.Path(TASK["folder"]), Load(**TASK["load"]))
