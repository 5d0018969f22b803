"""What a peer is: the problem it is given, and the call that comes back."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np


class Problem(Protocol):
    """The sizes and dtypes of one measurement; dtypes are "float32" or "bfloat16"."""

    @property
    def N(self) -> int: ...  # rows
    @property
    def T(self) -> int: ...  # tokens of a row: 1 decodes, more verify drafts
    @property
    def H(self) -> int: ...  # key heads
    @property
    def HV(self) -> int: ...  # value heads
    @property
    def K(self) -> int: ...  # key head dim
    @property
    def V(self) -> int: ...  # value head dim
    @property
    def P(self) -> int: ...  # slots of the state pool, where there is one
    @property
    def state_dtype(self) -> str: ...
    @property
    def act_dtype(self) -> str: ...


class ConvProblem(Protocol):
    """One measurement of the convolution."""

    @property
    def N(self) -> int: ...  # rows
    @property
    def T(self) -> int: ...  # tokens of a row, where `lengths` is empty
    @property
    def lengths(self) -> tuple[int, ...]: ...  # of packed rows
    @property
    def C(self) -> int: ...  # channels
    @property
    def W(self) -> int: ...  # taps of the filter
    @property
    def S(self) -> int: ...  # more than 1: a speculative step of so many tokens at most


Inputs: TypeAlias = Mapping[str, Any]
Result: TypeAlias = dict[str, np.ndarray]


class Unavailable(Exception):
    """A peer is not installed here, or does not do this problem; says why."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A peer that is compiled and ready to be timed.

    run(i): launches the i-th call, on slot table or set i modulo their number.
    result(): float32 arrays by name, those that can be told: after calls of an update
        the pool "state" [P, HV, V, K] and the last call's "out" [N*T, HV, V]; after
        calls of prefill or train the last call's "state" and "out", and gradients as
        "d_q" and so on, all shaped like the set's arrays; after calls of the
        convolution the last call's "state" [N, C, W - 1 + S - 1], the inputs its rows
        still need, oldest first, and "out" of its x's shape.
    kernels(name): whether a device kernel of this name belongs to the peer.
    note: what this peer does less or more than our kernel.
    moved_bytes: least traffic of a call, where that is not the problem's.
    """

    run: Callable[[int], None]
    result: Callable[[], Result]
    kernels: Callable[[str], bool]
    note: str
    moved_bytes: int | None = None


Peer: TypeAlias = Callable[[Problem, Inputs], Call]
ConvPeer: TypeAlias = Callable[[ConvProblem, Inputs], Call]


def require(condition: bool, reason: str) -> None:
    """Raises Unavailable unless the peer does this problem."""
    if not condition:
        raise Unavailable(reason)


def load(name: str) -> ModuleType:
    """A peer's module; some ask what the device is, so any error may come back."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Unavailable(
            f"{name} does not import ({type(error).__name__}: {error}); put the peers "
            "on PYTHONPATH as the head of benchmarks/peers/__init__.py says"
        ) from error
