"""Calls of `fused_update` for fuzz.py: what is drawn, who says what is right."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from peers.vllm_drawn import tensor, view, vllm_update

import gdn_jax
from gdn_jax import testing
from gdn_jax.testing import draws

INPUTS = (
    "normal v, b; q, k of size 0.01, 1 or 30 (at times one of zeros), a 1, 5 or 40, "
    "state 0.1, 1 or 10; A in [0.5, 8]; NaN wherever nothing may be read"
)
TOLERANCE = (
    "relative RMS error below twice that of gdn_jax.testing.TOLERANCE, once for each "
    "kernel, and what log(1 + exp(x)) in vLLM's loses of a row's decays, 2^-24 A a "
    "token; and of every value that of the last place twice and "
    f"{testing.FLOOR} of the values' size"
)
TOLERANCE_TO_ORACLE = (
    "relative RMS error below gdn_jax.testing.TOLERANCE; and of every value half of "
    f"the last place and {testing.FLOOR} of the values' size"
)

Found = dict[str, testing.Deviation]


class Wrong(Exception):
    """A result that is; says which and by how much."""


def check(
    shapes: draws.Shapes,
    drawn: draws.Drawn,
    got: tuple[Any, Any],
    want: tuple[Any, Any],
    before: Any,
    take: Callable[[Any, np.ndarray], Any],
    equal_bits: Callable[[Any, Any], bool],
    roundings: int,
    more: float = 0.0,
) -> Found:
    """Of arrays of NumPy or torch: what the call had to write, in the tolerance; zeros
    where no live row is; all other slots by their bits."""
    live, written = drawn.live, drawn.written(shapes)
    found = {}
    dtypes = dict(state=shapes.state_dtype, out=shapes.act_dtype)
    for what, mine, other, where in (
        ("state", got[0], want[0], written),
        ("out", got[1], want[1], live),
    ):
        if where.any():
            pair = take(mine, where), take(other, where)
            found[what] = testing.deviation(*pair, dtypes[what], roundings)
            if not found[what].is_within(what, dtypes[what], roundings, more):
                raise Wrong(f"{what} deviates: {found[what]}")
    if not live.all() and bool((take(got[1], ~live) != 0).any()):
        raise Wrong("out of tokens of no live row is not zero")
    if not written.all():
        rest = take(got[0], ~written, exact=False)
        if shapes.per_token_states:
            if bool((rest != 0).any()):
                raise Wrong("states of tokens of no live row are not zero")
        elif not equal_bits(rest, take(before, ~written, exact=False)):
            raise Wrong("a slot that no row writes has other bits than before")
    return found


def take_numpy(x: np.ndarray, where: np.ndarray, exact: bool = True) -> np.ndarray:
    return x[where].astype(np.float64) if exact else x[where]


def equal_bits_numpy(x: np.ndarray, y: np.ndarray) -> bool:
    return x.tobytes() == y.tobytes()


def take_torch(x: Any, where: np.ndarray, exact: bool = True) -> Any:
    import torch

    rows = x.index_select(0, torch.from_numpy(np.flatnonzero(where)).to(x.device))
    return rows.double() if exact else rows


def equal_bits_torch(x: Any, y: Any) -> bool:
    import torch

    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def packed(shapes: draws.Shapes, state: Any, out: Any) -> tuple[Any, Any]:
    """Without the axis of rows, where tokens are dense."""
    if shapes.tokens != "dense":
        return state, out
    if shapes.per_token_states:
        state = state.reshape(-1, *state.shape[2:])
    return state, out.reshape(-1, *out.shape[2:])


def against_vllm(update: Callable, shapes: draws.Shapes, drawn: draws.Drawn) -> Found:
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    before = tensor(drawn.args[0], device)
    want = vllm_update(shapes, drawn, before)
    args, tables = jax.device_put((drawn.args, drawn.tables))
    got = map(view, packed(shapes, *update(args, tables)))
    compare = take_torch, equal_bits_torch
    return check(
        shapes,
        drawn,
        tuple(got),
        want,
        before,
        *compare,
        roundings=2,
        more=lost_by_vllm(shapes, drawn),
    )


def lost_by_vllm(shapes: draws.Shapes, drawn: draws.Drawn) -> float:
    """Its softplus is log(1 + exp(x)), where 1 + exp(x) is rounded: half a last place
    of 1, times A in a token's decay; for x < -17 it is 0, which loses less."""
    A = float(np.exp(np.asarray(drawn.args[4], np.float64)).max())
    beta = shapes.statics.get("softplus_beta", 1.0)
    return int(drawn.length.max()) * A / beta * 2.0**-24


def against_oracle(update: Callable, shapes: draws.Shapes, drawn: draws.Drawn) -> Found:
    state, out, _ = testing.oracle(drawn.args, drawn.tables | shapes.statics)
    want = packed(shapes, state, out)
    args, tables = jax.device_put((drawn.args, drawn.tables))
    got = map(np.asarray, packed(shapes, *update(args, tables)))
    compare = take_numpy, equal_bits_numpy
    return check(shapes, drawn, tuple(got), want, drawn.args[0], *compare, roundings=1)


def compiled(shapes: draws.Shapes, seed: int, implementation: str) -> Callable:
    """Our op on calls of these shapes, the pool donated."""

    def update(args, tables):
        return gdn_jax.fused_update(
            *args, **tables, **shapes.statics, implementation=implementation
        )

    def donating(state, rest, tables):
        return update((state, *rest), tables)

    drawn = draws.draw(shapes, seed, 0)
    state, *rest = drawn.args
    call = (
        jax.jit(donating, donate_argnums=() if shapes.per_token_states else 0)
        .lower(state, tuple(rest), drawn.tables)
        .compile()
    )
    return lambda args, tables: call(args[0], tuple(args[1:]), tables)


AGAINST = {"vllm": against_vllm, "oracle": against_oracle}


class Calls:
    """A subject of the fuzzer; those of fuzz_steps.py have the same attributes.

    A set's `shapes` are a dataclass, what one program is compiled for; `update` is that
    program, and `drawn` one of its calls, of which `words` says what it is.
    """

    op, known = "fused_update", tuple(AGAINST)  # the first by default
    inputs = INPUTS

    def __init__(self, against: str, implementation: str):
        self.against, self.implementation = against, implementation
        self.tolerance = TOLERANCE if against == "vllm" else TOLERANCE_TO_ORACLE

    def shapes(self, seed: int, number: int) -> draws.Shapes:
        return draws.draw_shapes(seed, number, shared=self.against == "vllm")

    def compile(self, shapes: draws.Shapes, seed: int) -> Callable:
        return compiled(shapes, seed, self.implementation)

    def draw(self, shapes: draws.Shapes, seed: int, case: int) -> draws.Drawn:
        return draws.draw(shapes, seed, case)

    def check(
        self, update: Callable, shapes: draws.Shapes, drawn: draws.Drawn
    ) -> Found:
        """Raises Wrong."""
        return AGAINST[self.against](update, shapes, drawn)

    def words(self, drawn: draws.Drawn) -> dict[str, Any]:
        names = ("begin", "length", "read", "write")
        return drawn.tables | {name: getattr(drawn, name) for name in names}
