"""One case of an op on one implementation: compared with float64 NumPy, and timed."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gdn_jax
from gdn_jax import testing, timing
from gdn_jax.testing import Case, ConvCase

REPEATS = 5
# Timed on a GPU beside the small cases: enough state to leave the L2 cache.
LARGE = Case(
    "decode, N=64 K=V=128", (1,) * 64, H=16, HV=32, K=128, V=128, tokens="single"
)
# Of the longer tables, one of each kind.
OF_CHUNK_CASES = ("T=65", "bfloat16 state", "ragged", "K=128 V=128")
OF_REPLAY_CASES = (
    "decode, K=128 V=128",
    "decode, nulls",
    "dense, T=5",
    "packed, fresh",
)
OF_CONV_CASES = ("decode, nulls", "decode, bfloat16", "packed", "verify, packed")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case of the op of that name."""

    op: str
    case: Case | ConvCase

    @property
    def label(self) -> str:
        return f"{self.op}: {self.case.name}"


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of a problem on an implementation; bars are what errors stay below."""

    problem: Problem
    implementation: str
    errors: tuple[float, float] = (float("nan"), float("nan"))  # of state and out
    bars: tuple[float, float] = (0.0, 0.0)
    microseconds: float = float("nan")
    moved_bytes: int = 0
    fault: str = ""  # what it raised instead

    @property
    def passed(self) -> bool:
        pairs = zip(self.errors, self.bars, strict=True)
        return not self.fault and all(error < bar for error, bar in pairs)

    @property
    def gb_per_s(self) -> float:
        return self.moved_bytes / self.microseconds / 1e3


def problems(*, large: bool) -> list[Problem]:
    def some(cases: Any, names: tuple[str, ...]) -> list[Any]:
        return [case for case in cases if case.name in names]

    tables = {
        "fused_update": [*testing.CASES, *([LARGE] if large else [])],
        "chunk_update": some(testing.CHUNK_CASES, OF_CHUNK_CASES),
        "replay_update": some(testing.CASES, OF_REPLAY_CASES),
        "causal_conv1d": some(testing.CONV_CASES, OF_CONV_CASES),
    }
    return [Problem(op, case) for op, cases in tables.items() for case in cases]


def run_or_fail(problem: Problem, implementation: str) -> Row:
    """One failure must not lose the others' results."""
    try:
        if isinstance(problem.case, ConvCase):
            return _run_conv(problem, problem.case, implementation)
        if problem.op == "replay_update":
            return _run_replay(problem, problem.case, implementation)
        return _run_update(problem, problem.case, implementation)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
        return Row(problem, implementation, fault=fault[:200])


def _run_update(problem: Problem, case: Case, implementation: str) -> Row:
    args, kwargs = testing.make(case)
    want_state, want_out, written = testing.oracle(args, kwargs)
    kept = kwargs.get("per_token_states", False)
    step = _stepper(problem.op, args, kwargs, implementation, donate=not kept)
    new, out = step()
    new = np.asarray(new)
    errors = (
        testing.relative_error(new[written], want_state[written]),
        testing.relative_error(out, want_out),
    )
    untouched = np.zeros_like(new) if kept else args[0]
    if not np.array_equal(new[~written], untouched[~written], equal_nan=True):
        errors = (float("inf"), errors[1])  # a slot that is not the call's was written
    chunked = "chunked " if problem.op == "chunk_update" else ""
    bars = (
        testing.TOLERANCE[f"{chunked}state", case.state_dtype],
        testing.TOLERANCE[f"{chunked}out", out.dtype.name],
    )
    slots = case.N - len(case.dead | set(case.fresh)) + int(written.sum())
    moved = slots * args[0][0].nbytes + sum(x.nbytes for x in (*args[1:], out))
    return Row(problem, implementation, errors, bars, _microseconds(step), moved)


def _run_replay(problem: Problem, case: Case, implementation: str) -> Row:
    """One call on states without records; those that it does not name keep theirs."""
    args, kwargs = testing.make(case)
    want_state, want_out, written = testing.oracle(args, kwargs)
    begin = gdn_jax.ReplayState.from_dense(
        jnp.asarray(args[0]), num_key_heads=case.H, key_dtype=args[2].dtype
    )
    call = (begin, *args[1:])
    step = _stepper(problem.op, call, kwargs, implementation, donate=True)
    new, out = step()
    dense = np.asarray(new.to_dense())
    errors = (
        testing.relative_error(dense[written], want_state[written]),
        testing.relative_error(out, want_out),
    )
    if not np.array_equal(dense[~written], args[0][~written], equal_nan=True):
        errors = (float("inf"), errors[1])
    chunked = "chunked " if implementation in ("triton", "interpret") else ""
    bars = (
        testing.TOLERANCE[f"{chunked}state", case.state_dtype],
        testing.TOLERANCE[f"{chunked}out", out.dtype.name],
    )
    read = case.N - len(case.dead | set(case.fresh))
    moved = read * args[0][0].nbytes + sum(x.nbytes for x in (*args[1:], out))
    return Row(problem, implementation, errors, bars, _microseconds(step), moved)


def _run_conv(problem: Problem, case: ConvCase, implementation: str) -> Row:
    args, kwargs = testing.make_conv(case)
    want, histories = testing.conv_oracle(case, args, kwargs)
    step = _stepper(problem.op, args, kwargs, implementation, donate=True)
    state, y = step()
    state_error = 0.0
    for slot, counts in histories.items():
        for i, history in enumerate(counts):
            accepted = jnp.full(state.start.shape, i + 1) if case.speculative else None
            dense = state.to_dense(case.width, accepted)[slot]
            state_error = max(state_error, testing.relative_error(dense, history))
    others = [slot for slot in range(len(args[0].start)) if slot not in histories]
    old, new = args[0].buffer[others], np.asarray(state.buffer)[others]
    if not np.array_equal(new, old, equal_nan=True):
        state_error = float("inf")
    errors = (state_error, testing.relative_error(y.reshape(want.shape), want))
    bars = (
        testing.TOLERANCE["state", case.dtype],
        testing.TOLERANCE["out", case.dtype],
    )
    rings = 2 * len(histories) * args[0].buffer[0].nbytes
    moved = rings + sum(x.nbytes for x in (*args[1:], y))
    return Row(problem, implementation, errors, bars, _microseconds(step), moved)


def _stepper(
    op: str, args: Any, kwargs: Any, implementation: str, *, donate: bool
) -> Callable[..., Any]:
    """Each call goes on from the state that the last one left, if it is donated."""
    static = {k: v for k, v in kwargs.items() if not isinstance(v, np.ndarray)}
    arrays = {k: jnp.asarray(v) for k, v in kwargs.items() if k not in static}
    rest = [jnp.asarray(x) for x in args[1:]]
    held = {"state": jax.tree.map(jnp.array, args[0])}

    @functools.partial(jax.jit, donate_argnums=(0,) if donate else ())
    def update(state, rest, arrays):
        function = getattr(gdn_jax, op)
        return function(state, *rest, **arrays, **static, implementation=implementation)

    def step(_: int = 0) -> Any:
        new, out = update(held["state"], rest, arrays)
        if donate:
            held["state"] = new
        return jax.block_until_ready((new, out))

    return step


def _microseconds(step: Callable[[int], Any]) -> float:
    """On the device where the profiler sees one, else by the wall clock."""
    if jax.default_backend() == "gpu":
        return timing.measure(step, REPEATS, wait=lambda: None).median_us
    times = []
    for i in range(REPEATS):
        start = time.perf_counter()
        step(i)
        times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[REPEATS // 2]
