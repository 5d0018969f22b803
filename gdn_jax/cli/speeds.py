"""How fast an engine's calls are, but for those that compile."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gdn_jax.generation.engine import Engine
    from gdn_jax.generation.requests import Request

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event


@dataclasses.dataclass
class Speed:
    """Of calls of one kind: tokens, those of them that were timed, and their time."""

    tokens: int = 0
    timed: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float, compiled: bool) -> None:
        self.tokens += tokens
        if not compiled:
            self.timed += tokens
            self.seconds += seconds

    def __str__(self) -> str:
        parts = [f"{self.tokens} tokens"]
        if left_out := self.tokens - self.timed:
            parts[0] += f" ({left_out} while compiling, not timed)"
        if self.timed:
            parts.append(f"{self.timed / self.seconds:,.0f}/s")
        return ", ".join(parts)


@dataclasses.dataclass
class Speeds:
    """Of an engine's calls, by what they did."""

    prefill: Speed = dataclasses.field(default_factory=Speed)
    decode: Speed = dataclasses.field(default_factory=Speed)

    def step(self, engine: "Engine") -> "list[Request]":
        """As the engine's, and timed."""
        before = dataclasses.replace(engine.figures)
        with _compilations() as compilations:
            begin = time.perf_counter()
            changed = engine.step()
            seconds = time.perf_counter() - begin
        compiled = bool(compilations)
        if engine.figures.steps > before.steps:
            decoded = engine.figures.decoded - before.decoded
            self.decode.add(decoded, seconds, compiled)
        else:
            prefilled = engine.figures.prefilled - before.prefilled
            self.prefill.add(prefilled, seconds, compiled)
        return changed


@contextlib.contextmanager
def _compilations() -> Iterator[list[float]]:
    """The seconds of each that there is meanwhile."""
    from jax import monitoring

    found = []

    def note(event: str, duration_secs: float, **_: object) -> None:
        if event == COMPILED:
            found.append(duration_secs)

    monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        monitoring.unregister_event_duration_listener(note)
