"""Whole sequences, forward: python benchmarks/prefill.py [--quick] [--tune]

The chunked form by Triton and by XLA, the walk token by token, and every peer that can
be imported, in one run; with --tune by other launches of our kernels too.
"""

import pathlib

import chunked
import typer
from chunked import Problem
from common import run_suite

DENSE = ((1, 2048), (1, 8192), (4, 2048), (1, 32768), (8, 1024))
MIXED = (1, 63, 64, 65, 500, 1000, 2403, 4096)


def problems(quick: bool = False) -> list[Problem]:
    if quick:
        return [Problem(N, T) for N, T in DENSE[:2]]
    return [
        *(Problem(N, T) for N, T in DENSE),
        Problem(1, 8192, state_dtype="bfloat16"),
        Problem(len(MIXED), sum(MIXED) // len(MIXED), lengths=MIXED),
    ]


def main(
    quick: bool = False, tune: bool = False, out: pathlib.Path | None = None
) -> None:
    run_suite(chunked.prefill(tune=tune), problems(quick), out, quick=quick)


if __name__ == "__main__":
    typer.run(main)
