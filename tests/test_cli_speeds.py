"""The figures of `gdn-jax generate`."""

import time
from typing import Any

import jax

from gdn_jax.cli.speeds import Speed, Speeds
from gdn_jax.generation.requests import Figures


class Calls:
    """An engine of calls of 5 tokens and 20 ms; those in `compiles` also compile."""

    def __init__(self, *compiles):
        self.figures, self.compiles, self.count = Figures(), compiles, 0

    def step(self):
        time.sleep(0.02)
        if self.count in self.compiles:
            jax.jit(lambda x: x + 1)(1.0)  # a new function, so a new program
            time.sleep(0.5)
        self.count += 1
        if self.count % 2:
            self.figures.prefilled += 5
        else:
            self.figures.decoded += 5
            self.figures.steps += 5
        return []


def test_calls_that_compile_are_not_timed():
    jax.jit(lambda x: x + 1)(1.0)  # what else a first call compiles
    engine: Any = Calls(0, 3)
    speeds = Speeds()
    for _ in range(6):
        speeds.step(engine)
    for speed in (speeds.prefill, speeds.decode):
        assert (speed.tokens, speed.timed) == (15, 10)
        assert 0.04 <= speed.seconds < 0.5


def test_what_is_not_timed_is_told():
    speed = Speed()
    assert str(speed) == "0 tokens"
    speed.add(5, 9.0, compiled=True)
    assert str(speed) == "5 tokens (5 while compiling, not timed)"
    speed.add(3000, 0.5, compiled=False)
    assert str(speed) == "3005 tokens (5 while compiling, not timed), 6,000/s"
