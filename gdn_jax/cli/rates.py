"""How fast a model reads and writes: tokens by the time of the calls that gave them."""

import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdn_jax.generation.requests import Figures

COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of JAX's


@dataclasses.dataclass
class Rate:
    """`timed` are the tokens of calls that compiled nothing."""

    tokens: int = 0
    timed: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = f", {self.timed / self.seconds:,.0f}/s" if self.timed else ""
        return f"{self.tokens} tokens{rate}"


@dataclasses.dataclass
class Rates:
    prefill: Rate = dataclasses.field(default_factory=Rate)
    decode: Rate = dataclasses.field(default_factory=Rate)

    def __str__(self) -> str:
        return f"prefill {self.prefill}, decode {self.decode}"

    @contextlib.contextmanager
    def call(self, figures: "Figures") -> Iterator[None]:
        """Around a call of an engine that has these figures."""
        compiled, before = _compilations(), copy.copy(figures)
        count, begin = len(compiled), time.perf_counter()
        yield
        passed = time.perf_counter() - begin
        for rate, tokens in (
            (self.prefill, figures.prefilled - before.prefilled),
            (self.decode, figures.decoded - before.decoded),
        ):
            rate.tokens += tokens
            if tokens and len(compiled) == count:
                rate.timed += tokens
                rate.seconds += passed


@functools.cache
def _compilations() -> list[float]:
    """Grows by the seconds of each compilation from now on."""
    import jax

    done: list[float] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            done.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    return done
