"""What a model carries from call to call, and which tokens a call brings."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from gdn_jax.nn.attention import KVCache
from gdn_jax.nn.state import GatedDeltaNetState
from gdn_jax.ops import checks
from gdn_jax.ops.gated_delta.replay_state import ReplayState

LayerState = GatedDeltaNetState | KVCache


class ModelState(NamedTuple):
    """P sequences, each in a row of every array.

    Attributes:
      layers: each layer's state. A Gated DeltaNet has S recurrent states a sequence,
        one after another, S = 1 + drafts; or a `ReplayState`, with one.
      length: [P] int32, tokens of each sequence so far. After a speculative call they
        are counted as if one of its tokens stood: `num_accepted` of the next call
        says how many do.
    """

    layers: tuple[LayerState, ...]
    length: Array

    @property
    def columns(self) -> int | None:
        """S, most tokens of a speculative step, as far as the recurrent states say: a
        replay state's own convolution may have room for fewer. None without them,
        where it is any number."""
        for layer in self.layers:
            if isinstance(layer, GatedDeltaNetState):
                if isinstance(layer.recurrent, ReplayState):
                    return layer.recurrent.window
                return layer.slots_each
        return None

    @property
    def positions(self) -> int | None:
        """M: tokens of the longest sequence; None without attention, where there is no
        end."""
        for layer in self.layers:
            if isinstance(layer, KVCache):
                return layer.k.shape[2]
        return None


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Which tokens of which sequences a call brings.

    Attributes:
      lead: N and T.
      rows: [N], each sequence's row of the state; None: n.
      num_tokens: [N], how many of the T count; None: all.
      takes_part: [N] bool, where num_tokens are all of the T or none; None: where they
        may be some.
      start: [N], how many tokens are before each sequence's first; None: 0 everywhere,
        and there is no state.
      has_state, num_accepted: [N] or None, as in `fused_update`.
    """

    lead: tuple[int, int]
    rows: Array | None = None
    num_tokens: Array | None = None
    start: Array | None = None
    has_state: Array | None = None
    num_accepted: Array | None = None
    takes_part: Array | None = None

    @property
    def live(self) -> Array | None:
        """[N, T], whether a token counts; None if all do."""
        if self.num_tokens is None:
            return None
        return jnp.arange(self.lead[1], dtype=jnp.int32) < self.num_tokens[:, None]

    def find_rows(self) -> Array:
        if self.rows is None:
            return jnp.arange(self.lead[0], dtype=jnp.int32)
        return self.rows


def find_tokens(
    shape: tuple[int, ...],
    state: ModelState | None,
    rows: ArrayLike | None,
    num_tokens: ArrayLike | None,
    has_state: ArrayLike | None,
    num_accepted: ArrayLike | None,
    takes_part: ArrayLike | None,
) -> Tokens:
    """Checks a call's tables."""
    if len(shape) != 2:
        checks.fail("tokens", shape, "[N, T]", "One row for each sequence.")
    if 0 in shape:
        checks.fail("tokens", shape, "[N, T] of one at least", "Leave the call out.")
    if state is not None and not isinstance(state, ModelState):
        remedy = "Give what init_state or the last call gave."
        checks.fail("state", f"a {type(state).__name__}", "a ModelState", remedy)
    N, T = shape
    tables: dict[str, Any] = dict(
        rows=rows,
        num_tokens=num_tokens,
        has_state=has_state,
        num_accepted=num_accepted,
        takes_part=takes_part,
    )
    if num_tokens is not None and takes_part is not None:
        remedy = "takes_part is for calls of all the T tokens or none."
        checks.fail("takes_part", "given with num_tokens", "one of the two", remedy)
    for name, table in tables.items():
        if table is None:
            continue
        if state is None:
            checks.fail("state", "None", f"given with {name}", "See model.init_state.")
        if name in ("has_state", "takes_part"):
            table = checks.booleans(name, table)
        else:
            table = checks.integers(name, table)
        if table.shape != (N,):
            checks.fail(name, table.shape, f"[N] = ({N},)", "One entry a sequence.")
        tables[name] = table
    if state is None:
        return Tokens((N, T))
    # With num_tokens the rest of the T may be padding, for which there is no room.
    M = state.positions
    if num_tokens is None and M is not None and T > M:
        remedy = "Make the state with init_state(num_rows, num_positions) of more."
        checks.fail("tokens", f"T = {T}", f"at most num_positions = {M}", remedy)
    if takes_part is not None:
        tables["num_tokens"] = jnp.where(tables["takes_part"], jnp.int32(T), 0)
    P, S = state.length.shape[0], state.columns
    if rows is None and N != P:
        remedy = "Give rows, which say which of the state's each is."
        checks.fail("tokens", f"{N} sequences", f"{P}, as the state has", remedy)
    _check_rows(rows, P)
    if num_accepted is not None and S is not None and T > S:
        remedy = "Make the state with init_state(.., drafts=T - 1)."
        checks.fail("tokens", f"T = {T}", f"at most S = {S} with num_accepted", remedy)
    start = state.length if rows is None else state.length[tables["rows"]]
    if has_state is not None:
        start = jnp.where(tables["has_state"], start, 0)
    if num_accepted is not None:
        start = start - 1 + tables["num_accepted"]
    return Tokens((N, T), start=start, **tables)


def _check_rows(rows: Any, P: int) -> None:
    """NumPy's alone: for a device's the call would have to wait."""
    if not isinstance(rows, np.ndarray):
        return
    is_there = (rows >= 0) & (rows < P)
    if not is_there.all() or np.unique(rows).size < rows.size:
        wanted = f"all different and in [0, {P})"
        checks.fail("rows", rows.tolist(), wanted, "A sequence has a row of its own.")


def new_length(state: ModelState, tokens: Tokens) -> Array:
    """`state.length` behind a call."""
    T = tokens.lead[1]
    added = jnp.full(tokens.lead[:1], T, jnp.int32)
    if tokens.num_tokens is not None:
        added = tokens.num_tokens
    is_live = added > 0
    if tokens.num_accepted is not None:
        added = jnp.minimum(added, 1)
    rows = tokens.find_rows()
    length = jnp.where(is_live, tokens.start + added, state.length[rows])
    return length if tokens.rows is None else state.length.at[rows].set(length)
