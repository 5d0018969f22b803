"""Requests in bursts, callbacks that raise, and who looks on."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from load_parts import Asked, submit

from gdn_jax import Engine
from gdn_jax.generation.requests import Request
from gdn_jax.generation.saved import faults_of_state

BURSTS = 0.2  # of calls, behind which more requests come
WHOLE_EVERY = 50  # calls; of every row all that was asked for is read, which is slow


class Fault(Exception):
    """What a user's callback raises."""


@dataclasses.dataclass
class Watch:
    """Looks at an engine after every call.

    Attributes:
      submitted, finished: requests so far.
      calls, raised: of the engine; callbacks that did not come back.
      faults: what was wrong, in words.
      live: bytes of JAX's arrays after each call; one number where nothing leaks.
    """

    submitted: int = 0
    finished: int = 0
    calls: int = 0
    raised: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)
    live: set[int] = dataclasses.field(default_factory=set)

    def look(self, engine: Engine) -> None:
        self.calls += 1
        running, waiting = engine.running, list(engine.queue)
        rows = range(engine.sizes.num_rows)
        owners = list(running.values())
        if any(row not in rows or x.row != row for row, x in running.items()):
            self.faults.append(f"rows {sorted(running)} are not of their requests")
        if len({id(x) for x in [*owners, *waiting]}) < len(owners) + len(waiting):
            self.faults.append("a request has two rows, or waits and has one")
        if any(x.finish_reason for x in [*owners, *waiting]):
            self.faults.append("a finished request has a row or waits")
        if len(owners) + len(waiting) + self.finished != self.submitted:
            self.faults.append(f"of {self.submitted} requests one is nowhere")
        self.live.add(sum(live_buffers().values()))
        self.faults += faults_of_rows(engine)
        if self.calls % WHOLE_EVERY == 0:
            vocab_size = engine.model.config.vocab_size
            self.faults += faults_of_state(
                engine.state, engine.sizes, engine.requests, vocab_size
            )


def faults_of_rows(engine: Engine) -> list[str]:
    """Whether the device goes on with the texts that the host believes to be there."""
    state, faults = engine.state, []
    active, length, position, token, limit = jax.device_get(
        (
            state.is_active,
            state.model.length,
            state.position,
            state.token,
            state.rows.limit,
        )
    )
    growing = {row for row, x in engine.running.items() if x.tokens}
    if set(active.nonzero()[0].tolist()) != growing:
        faults.append(f"rows {active.nonzero()[0]} go on, of {sorted(growing)}")
    for row, request in engine.running.items():
        if not request.prefilled:
            continue
        known: list[Any] = [(length[row], request.prefilled)]
        if request.tokens:
            count = len(request.prompt) + len(request.tokens)
            known = [(position[row], count), (token[row], request.tokens[-1])]
        known.append((limit[row], request.limit))
        if any(x != y for x, y in known):
            faults.append(f"row {row} is not request {request.number}'s: {known}")
    return faults


def live_buffers() -> dict[int, int]:
    """Bytes by address: on a CPU an array that was looked at is two of one buffer."""
    return {x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}


def serve(
    engine: Engine,
    asked: Sequence[Asked],
    watch: Watch,
    rng: random.Random,
    raise_after: Iterator[int],
) -> Iterator[tuple[int, Request]]:
    """Submits in bursts until all are finished; yields each that is, with its place in
    `asked`. Callbacks raise after each of `raise_after` further ones.

    The callback keeps what it is given. When it raises, some that gained tokens in
    that call were not told; the requests are asked for what they have.
    """
    order = list(range(len(asked)))
    rng.shuffle(order)
    open_: dict[int, tuple[int, Request]] = {}
    given: dict[int, list[int]] = {}
    left = next(raise_after)

    def give(request: Request) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            watch.raised, left = watch.raised + 1, next(raise_after)
            raise Fault
        told = given[request.number]
        told += request.tokens[len(told) :]

    def close() -> Iterator[tuple[int, Request]]:
        for number, (place, request) in list(open_.items()):
            if request.finish_reason is None or given[number] != request.tokens:
                continue
            del open_[number], given[number]
            watch.finished += 1
            yield place, request

    def burst() -> None:
        if rng.random() > BURSTS:
            return
        for _ in range(min(rng.randrange(engine.sizes.num_rows), len(order))):
            place = order.pop()
            request = submit(engine, asked[place])
            open_[request.number], given[request.number] = (place, request), []
            watch.submitted += 1

    while order or open_:
        burst()
        try:
            for _, request in list(open_.values()):
                if len(request.tokens) > len(given[request.number]):
                    give(request)
            yield from close()
            for changed in engine.run():
                for request in changed:
                    give(request)
                yield from close()
                watch.look(engine)
                burst()
        except Fault:
            continue
