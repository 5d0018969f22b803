"""Whole sequences, forward and backward: python benchmarks/train.py [--quick]

Gradients for q, k, v, a, b, A_log, dt_bias and the initial state, from cotangents of
out and of the final state, by Triton, by XLA and by every peer that can be imported.
"""

import pathlib

import chunked
import typer
from chunked import Problem
from common import run_suite

DENSE = ((1, 2048), (1, 8192), (4, 2048))


def problems(quick: bool = False) -> list[Problem]:
    return [Problem(N, T, backward=True) for N, T in (DENSE[:1] if quick else DENSE)]


def main(quick: bool = False, out: pathlib.Path | None = None) -> None:
    run_suite(chunked.train(), problems(quick), out, quick=quick)


if __name__ == "__main__":
    typer.run(main)
