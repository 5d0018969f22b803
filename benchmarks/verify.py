"""Speculative verify with a state per token: python benchmarks/verify.py [--quick]

Ours, XLA, the unfused pair, a copy and every peer that can be imported, in one run.
"""

import pathlib

import typer
from common import run_suite
from update import Problem, suite


def main(quick: bool = False, out: pathlib.Path | None = None) -> None:
    batches, tokens = ((8, 128), (4,)) if quick else ((8, 64, 128), (4, 8))
    states = ("float32", "bfloat16")
    problems = [
        Problem(N, T=T, state_dtype=state)
        for T in tokens
        for state in states
        for N in batches
    ]
    if not quick:
        problems += [Problem(64, T=4, gib=5, state_dtype=state) for state in states]
    run_suite(suite("verify"), problems, out, quick=quick)


if __name__ == "__main__":
    typer.run(main)
