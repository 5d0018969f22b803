"""One token per row: python benchmarks/decode.py [--quick]

Ours, XLA, the unfused pair, a copy and every peer that can be imported, in one run.
"""

import pathlib

import typer
from common import run_suite
from update import Problem, suite

BATCHES = (1, 8, 64, 256, 1024)
STATES = ("float32", "bfloat16")


def main(quick: bool = False, out: pathlib.Path | None = None) -> None:
    problems = [Problem(N, state_dtype=s) for s in STATES for N in BATCHES]
    if not quick:
        problems += [
            Problem(64, HV=HV, H=min(16, HV), state_dtype=s)
            for s in STATES
            for HV in (8, 16, 48, 64)
        ]
        problems += [
            Problem(64, H=30, HV=30, K=96, V=192, state_dtype=s) for s in STATES
        ]
        problems += [Problem(64, gib=5, state_dtype=s) for s in STATES]
    run_suite(suite("decode"), problems, out, quick=quick)


if __name__ == "__main__":
    typer.run(main)
