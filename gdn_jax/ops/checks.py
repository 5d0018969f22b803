"""Checks at the door that every op shares.

Every message names the argument, what came, what was wanted and a way out.
"""

import contextlib
import operator
import reprlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.errors import JaxRuntimeError

from gdn_jax.ops.batch import Batch

FLOATS = ("float32", "bfloat16", "float16")
STATIC = "It is static: close over it instead of passing it through jit."
# Of faults in an error, and of a fault's characters: a file may have any number.
MOST_LISTED = 20
MOST_SHOWN = 300

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxlist, _repr.maxtuple = 3, 8, 16, 16
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def fail(name: str, got: object, wanted: str, remedy: str) -> None:
    raise ValueError(f"{name} must be {wanted}; got {got}. {remedy}")


def shown(x: object) -> str:
    """Its repr, as far as a line has room for it: what a file holds may be of any
    length and nested as deep."""
    return cut(_repr.repr(x))


def cut(text: str) -> str:
    """A line of it at most, and nothing that a terminal obeys."""
    if len(text) > MOST_SHOWN:
        half = MOST_SHOWN // 2
        text = f"{text[:half]}...{text[-half:]}"
    return text if text.isprintable() else ascii(text)[1:-1]


def listed(faults: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    faults = list(faults)
    more = len(faults) - MOST_LISTED
    text = "; ".join(map(cut, faults[:MOST_LISTED]))
    return text + (f"; and {more} more" if more > 0 else "")


@contextlib.contextmanager
def memory_errors(text: Callable[[], str]) -> Iterator[None]:
    """Turns the device's lack of memory into an error that says what to do."""
    try:
        yield
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(text()) from error


def floating(name: str, x: Any) -> Array:
    if x is None:
        fail(name, "None", "an array", "It has no default.")
    if hasattr(x, "checkpoint"):
        remedy = (
            "It is for replay_update. Prompts go into its .checkpoint, at slots that "
            "were reset; .to_dense() gives its states."
        )
        fail(name, type(x).__name__, "an array", remedy)
    if not hasattr(x, "dtype"):  # a list of numbers
        return jnp.asarray(x, jnp.float32)
    given = np.dtype(x.dtype)  # before JAX narrows float64
    if given.name not in FLOATS:
        fail(name, given, f"one of {', '.join(FLOATS)}", "Cast it first.")
    return jnp.asarray(x)


def integers(name: str, x: Any) -> Array:
    if not hasattr(x, "dtype"):
        x = _integers_of_list(x)
    if x.dtype != jnp.int32:
        fail(name, x.dtype, "int32", f"Pass jnp.asarray({name}, jnp.int32).")
    # of that type for good: Pallas lowers no sum of what jnp.where made of plain ints
    return jnp.asarray(x, jnp.int32)


def booleans(name: str, x: Any) -> Array:
    x = jnp.asarray(x)
    if x.dtype != jnp.bool_:
        fail(name, x.dtype, "bool", "Compare it first, as in x > 0.")
    return x


def _integers_of_list(x: Any) -> np.ndarray | Array:
    """int32 where that holds every number, whatever width JAX's own default has."""
    try:
        values = np.asarray(x)
    except jax.errors.TracerArrayConversionError:
        return jnp.asarray(x)
    if values.size == 0:
        return values.astype(np.int32)
    limits = np.iinfo(np.int32)
    fits = (values >= limits.min) & (values <= limits.max)
    return (
        values.astype(np.int32) if values.dtype.kind == "i" and fits.all() else values
    )


def flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool | np.bool_):
        fail(name, type(x).__name__, "a Python bool", STATIC)
    return bool(x)


def number(name: str, x: Any) -> float:
    try:
        if isinstance(x, bool | str):
            raise TypeError
        return float(x)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a Python number, it is static; got {type(x).__name__}. "
            f"Close over it instead of passing it through jit."
        ) from None


def count(name: str, x: Any, remedy: str) -> None:
    try:
        number = operator.index(x)
    except TypeError:
        number = 0
    if number < 1:
        got = f"an array {x.shape}" if getattr(x, "shape", ()) else repr(x)
        fail(name, got, "an int >= 1", remedy)


def float_dtype(name: str, x: Any, remedy: str) -> np.dtype:
    try:
        dtype = np.dtype(x)
    except TypeError:  # no dtype at all
        dtype = np.dtype(object)
    if dtype.name not in FLOATS:
        fail(name, x, f"one of {', '.join(FLOATS)}", remedy)
    return dtype


def check_sharding(arrays: dict[str, Array | None]) -> None:
    """Sharding in types leaves every gather to the caller; a kernel needs shard_map."""
    for name, x in arrays.items():
        spec = () if x is None else jax.typeof(x).sharding.spec
        if any(axis is not None for axis in spec):
            fail(
                name,
                f"{spec} over explicit mesh axes",
                "whole, or split over automatic mesh axes or by shard_map",
                "Split heads or rows with jax.shard_map, or make the axes "
                "AxisType.Auto.",
            )


def tables(slots: Any, cu_seqlens: Any, num_accepted: Any, has_state: Any) -> Batch:
    def table(name: str, x: Any) -> Array | None:
        return None if x is None else integers(name, x)

    if has_state is not None:
        has_state = booleans("has_state", has_state)
    return Batch(
        table("slots", slots),
        table("cu_seqlens", cu_seqlens),
        table("num_accepted", num_accepted),
        has_state,
    )


def rows_of(
    lead: tuple[int, ...], cu_seqlens: Array | None
) -> tuple[int, int | None, str]:
    """Rows, tokens of each where all have as many, and where that comes from; `lead`
    are the tokens' axes, [N T] dense or [L] packed."""
    if cu_seqlens is not None:
        if len(lead) == 2:
            fail(
                "cu_seqlens",
                "dense tokens [N, T, ..]",
                "given with packed tokens [L, ..] alone",
                "Leave it out, or flatten the tokens to [N * T, ..].",
            )
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
            remedy = "It starts with 0 and ends with the number of tokens."
            fail("cu_seqlens", cu_seqlens.shape, "[N + 1]", remedy)
        rows = cu_seqlens.shape[0] - 1
        return rows, None, f"cu_seqlens of {rows + 1} entries makes {rows} rows"
    if len(lead) == 2:
        return *lead, f"dense tokens {lead} are {lead[0]} rows"
    [rows] = lead
    return rows, 1, f"without cu_seqlens each of {rows} packed tokens is a row"


def check_per_row(tables: Batch, rows: int, source: str) -> None:
    for name in ("num_accepted", "has_state"):
        x = getattr(tables, name)
        if x is not None and x.shape != (rows,):
            fail(name, x.shape, f"[N] = ({rows},)", f"One entry a row: {source}.")


def null_slot_of(null_slot: Any, num_slots: int, slots: Array | None) -> int | None:
    """None where it names no slot of the pool."""
    is_int = isinstance(null_slot, int | np.integer) and not isinstance(null_slot, bool)
    if null_slot is not None and not is_int:
        fail("null_slot", repr(null_slot), "an int or None", STATIC)
    if null_slot is None:
        return None
    if slots is None:
        remedy = "Without slots no row is null: leave it out."
        fail("null_slot", "no slots", "given with slots, among which it is one", remedy)
    return int(null_slot) if 0 <= null_slot < num_slots else None
