"""Decoding by models that GPUs share out: python benchmarks/sharded.py [--gpus N]

Blocks of steps of `gdn_jax.Engine` on 1 and on N GPUs: one model's heads over all of
them (tensor parallel), and sequences over all of them (data parallel), beside the time
of an all-reduce alone. XLA reads its options once, and Python traces one model at a
time, so that each model has a process of its own, with each set of options: all of them
compile at once, and then are timed one after another.
"""

import dataclasses
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import typer
from common import (
    commit_of,
    console,
    header,
    need_gpu,
    results_folder,
    rows_besides,
)
from rich.table import Table
from shared_work import AllReduce, Decoding, Work

from gdn_jax import timing

# By name; of the default those that a ShardedModel tells XLA, of others flags. XLA's
# own are kernels that read peers' memory, each launched between the CUDA graphs that it
# captures of all else. NCCL's can be captured too.
DEFAULT = "default"
NCCL = "--xla_gpu_experimental_use_collective_kernels="
OPTIONS = {
    DEFAULT: "",
    "XLA's own": "",
    "NCCL": NCCL,
    "NCCL in graphs": (
        f"{NCCL} --xla_gpu_enable_command_buffer=+COLLECTIVES "
        f"--xla_gpu_graph_min_graph_size=1"
    ),
    "NCCL, symmetric": (
        f"{NCCL} --xla_gpu_experimental_enable_nccl_symmetric_buffers=true"
    ),
    "no graphs": "--xla_gpu_enable_command_buffer=",
}
TENSOR, TENSOR_ROWS = "Qwen3.5-27B", 64
DATA, DATA_ROWS = "Qwen3.5-4B", 1024
ROUNDS = 7
LONGEST = 12  # kernels of a step that a row names
COMPILERS = 8
# bytes of an all-reduce: of 64 tokens of 27B 655,360
MESSAGES = (2**13, 2**15, 2**17, 2**19, 655360, 2**21, 2**23)
TIME = f"wall clock of a block of steps, median of {ROUNDS}"


def works(options: str, gpus: int, quick: bool) -> dict[str, list[Work]]:
    """What each process measures, by name; other options than the default matter to
    all-reduces."""
    messages: list[Work] = [AllReduce(size, gpus) for size in MESSAGES]
    messages = messages if gpus > 1 else []
    tensor = Decoding("tensor", TENSOR, TENSOR_ROWS, gpus)
    found: dict[str, list[Work]] = {f"heads on {gpus}": [*messages, tensor]}
    if options != DEFAULT:
        return found
    if gpus > 1:
        found["heads on 1"] = [Decoding("tensor", TENSOR, TENSOR_ROWS, 1)]
    if not quick:
        pairs = (DATA_ROWS, gpus), (DATA_ROWS // gpus, 1), (DATA_ROWS, 1)
        for rows, n in dict.fromkeys(pairs):
            name = f"{rows} sequences on {n}"
            found[name] = [Decoding("data", DATA, rows, n)]
    return found


def measure(work: Work, program: Any) -> dict[str, Any]:
    run = work.prepare(program)
    run()
    ms = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        run()
        ms.append(1e3 * (time.perf_counter() - begin) / work.steps)
    with timing.record() as kernels:
        run()
    return {
        "ms_a_step": statistics.median(ms),
        "min_ms": min(ms),
        "max_ms": max(ms),
        "rounds": ROUNDS,
        **work.figures(statistics.median(ms)),
        **profile(kernels, work.steps * work.gpus),
    }


def profile(kernels: list[timing.Kernel], shares: int) -> dict[str, Any]:
    """Where the time of a step goes, on a GPU; an all-reduce's has its wait in it."""
    by_name: dict[str, list[float]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append(kernel.duration_us)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return {
        "kernels_ms_a_step": sum(map(sum, by_name.values())) / 1e3 / shares,
        "kernels_a_step": len(kernels) / shares,
        "longest_us": {
            name: [sum(us) / shares, len(us) / shares] for name, us in longest
        },
    }


def say(kind: str, what: Any) -> None:
    print(f"{kind} {json.dumps(what)}", flush=True)


def run_worker(options: str, todo: list[Work]) -> None:
    """Compiles, says so, waits for a line, and gives a row for each of its works."""
    need_gpu()
    begin = time.perf_counter()
    with ThreadPoolExecutor(COMPILERS) as pool:
        programs: dict[Work, Future] = {}
        for work in todo:  # traced here: what is traced depends on contexts
            told = work.compiler_options if options == DEFAULT else {}
            programs[work] = pool.submit(work.lower().compile, told)
            pool.submit(work.compile_inputs)
            say("NOTE", f"traced {work.title}")
        for work in todo:
            programs[work].exception()
            seconds = time.perf_counter() - begin
            say("NOTE", f"compiled {work.title} by {seconds:.0f} s")
    say("READY", None)
    sys.stdin.readline()
    inputs = "normal weights, states and caches, made in shards; greedy"
    say("HEADER", header(inputs, ROUNDS) | {"time": TIME})
    if todo[0].gpus == 1 or isinstance(todo[0], AllReduce):
        say("COPY", timing.copy_bandwidth())
    for work in todo:
        row = dataclasses.asdict(work) | {"options": options, "flags": OPTIONS[options]}
        if options == DEFAULT:
            row["compiler_options"] = work.compiler_options
        try:
            program = programs[work].result()
            row |= {"collectives": work.collectives(program.as_text())}
            say("ROW", row | measure(work, program))
        except Exception as error:
            row["absent"] = f"{type(error).__name__}: {error}"[:400]
            say("ROW", row)


class Worker:
    """A process with XLA's options, and what it says."""

    def __init__(self, options: str, name: str, words: list[str]):
        self.name = f"{options}: {name}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {OPTIONS[options]}".strip()
        # The workers are on the same GPUs: none may take them before it is its turn.
        others = {
            "XLA_FLAGS": flags,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", self.name, *words],
            env=os.environ | others,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.ready = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            kind, _, text = line.partition(" ")
            if kind == "READY":
                self.ready.set()
            elif kind == "NOTE":
                self._print(json.loads(text))
            elif kind in ("HEADER", "COPY", "ROW"):
                self.said.put((kind, json.loads(text)))
            else:
                self._print(line.rstrip())
        self.said.put(("END", self.process.wait()))
        self.ready.set()

    def _print(self, text: str) -> None:
        console.print(f"[{self.name}] {text}", markup=False, highlight=False)

    def go(self) -> None:
        if self.process.poll() is None:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()


def main(
    gpus: int = typer.Option(2, help="GPUs to share the work out to"),
    options: str = typer.Option(
        "; ".join(OPTIONS), help=f"sets of XLA's, by ';': {'; '.join(OPTIONS)}"
    ),
    quick: bool = False,
    worker: str = typer.Option("", hidden=True),
    out: pathlib.Path | None = None,
) -> None:
    if worker:
        named, _, name = worker.partition(": ")
        run_worker(named, works(named, gpus, quick)[name])
        return
    names = [name.strip() for name in options.split(";")]
    if unknown := set(names) - OPTIONS.keys():
        raise SystemExit(f"no options {', '.join(unknown)}; there are {[*OPTIONS]}")
    names = [DEFAULT, *(name for name in names if name != DEFAULT)]
    words = ["--gpus", str(gpus), *(["--quick"] if quick else [])]
    begin = time.perf_counter()
    workers = [
        Worker(options, name, words)
        for options in names
        for name in works(options, gpus, quick)
    ]
    for each in workers:
        each.ready.wait()
    console.print(f"all compiled by {time.perf_counter() - begin:.0f} s")
    result: dict[str, Any] = {}
    for each in workers:
        each.go()
        while True:
            kind, what = each.said.get()
            if kind == "END":
                each._print(f"ended with {what}")
                break
            if kind == "HEADER":
                result = result or begin_file(what, names, gpus, quick, out)
            elif kind == "COPY":
                result.setdefault("copy_tb_per_s", what)
            elif result:
                result["rows"].append(commit_of(result) | what)
                write(result, path_of(result, out, quick))
                console.print(said_of(what), highlight=False)
    if result:
        console.print(table(result["rows"]))
        path, seconds = path_of(result, out, quick), time.perf_counter() - begin
        console.print(f"wrote {path} by {seconds:.0f} s")


def path_of(
    result: dict[str, Any], out: pathlib.Path | None = None, quick: bool = False
) -> pathlib.Path:
    return results_folder(result["device"], out, quick=quick) / "sharded.json"


def begin_file(
    result: dict[str, Any], names: list[str], gpus: int, quick: bool, out: Any
) -> dict[str, Any]:
    """With the rows of earlier runs that this one does not measure again, of options
    that there still are."""
    measured = [
        dataclasses.asdict(work) | {"options": name}
        for name in names
        for todo in works(name, gpus, quick).values()
        for work in todo
    ]
    kept = rows_besides(measured, path_of(result, out, quick), path_of(result))
    return result | {"rows": [row for row in kept if row["options"] in OPTIONS]}


def write(result: dict[str, Any], path: pathlib.Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


def said_of(row: dict[str, Any]) -> str:
    names = ("case", "model", "rows", "bytes", "gpus", "options")
    what = ", ".join(f"{name} {row[name]}" for name in names if name in row)
    if "absent" in row:
        return f"{what}: {row['absent']}"
    return f"{what}: {row['ms_a_step']:.4f} ms, {row['collectives']}"


def table(rows: list[dict[str, Any]]) -> Table:
    """For people; speed-up against one GPU with the same work, or with a GPU's part."""
    shown = Table(title="tokens a second", title_justify="left")
    for name in ("case", "model", "rows", "GPUs", "options", "ms", "tokens/s", "x one"):
        shown.add_column(name)
    done = [row for row in rows if "tokens_per_s" in row]
    for row in done:
        ones = [
            other["tokens_per_s"]
            for other in done
            if (other["case"], other["gpus"]) == (row["case"], 1)
            and other["model"] == row["model"]
            and other["rows"] == row["rows"]
        ]
        parts = [
            row["gpus"] * other["tokens_per_s"]
            for other in done
            if (other["case"], other["gpus"]) == ("data", 1) == (row["case"], 1)
            and other["rows"] * row["gpus"] == row["rows"]
        ]
        ratios = [row["tokens_per_s"] / one for one in ones]
        ratios += [row["tokens_per_s"] / each for each in parts]
        shown.add_row(
            *(str(row[name]) for name in ("case", "model", "rows", "gpus", "options")),
            f"{row['ms_a_step']:.3f}",
            f"{row['tokens_per_s']:,.0f}",
            ", ".join(f"{ratio:.2f}" for ratio in ratios),
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
