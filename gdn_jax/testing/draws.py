"""Random calls of `fused_update`: shapes to compile for, and calls of those shapes.

A seed and the numbers of shapes and call replay one call alone, on any machine.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# (tokens, slots) as in `Case`; shapes take turns, speculative batches most of all.
MODES = (
    ("packed", "checkpoints"),
    ("single", "paged"),
    ("dense", "checkpoints"),
    ("packed", "checkpoints"),
    ("packed", "paged"),
    ("single", "checkpoints"),
    ("packed", "checkpoints"),
    ("dense", "paged"),
    ("single", "paged"),
    ("packed", "none"),
    ("dense", "none"),
)
DIMS = (1, 7, 8, 16, 20, 32, 48, 64, 64, 96, 128, 128, 128, 192, 256)
HEADS = (1, 1, 2, 2, 3, 4, 8, 16)
GROUPS = (1, 1, 2, 2, 3, 4, 8)  # value heads of a key head
VALUES = 800_000  # of a pool, at most; of one in eight, MANY_VALUES
MANY_VALUES = 4_000_000


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What one compiled program takes; the letters are those of `fused_update`.

    Attributes:
      tokens, slots: as in `Case`.
      L: tokens of all rows together, those of no row too.
      longest: tokens of a row at most; of each where they are dense.
      S: columns of the table of slots, 1 where there is none.
      head_dtype: of A_log and dt_bias.
      tells_fresh: `has_state` is given.
      options: further keyword arguments, static.
    """

    tokens: str
    slots: str
    N: int
    L: int
    longest: int
    S: int
    P: int
    H: int
    HV: int
    K: int
    V: int
    kda: bool
    state_dtype: str
    act_dtype: str
    head_dtype: str
    tells_fresh: bool
    options: tuple[tuple[str, Any], ...]

    @property
    def statics(self) -> dict[str, Any]:
        return dict(self.options)

    @property
    def null_slot(self) -> int | None:
        return self.statics["null_slot"]

    @property
    def per_token_states(self) -> bool:
        return self.statics["per_token_states"]


class Drawn(NamedTuple):
    """A call, `fused_update(*args, **tables, **shapes.statics)`, and what it is of.

    `args` are as `testing.make` has them: NaN wherever nothing may be read. `begin`,
    `length` [N]: each row's tokens. `read` [N]: its slot, -1 where the row is null.
    `fresh` [N]. `write` [L]: the slot that takes the state after each token, or -1.
    """

    args: tuple[Any, ...]
    tables: dict[str, Any]
    begin: np.ndarray
    length: np.ndarray
    read: np.ndarray
    fresh: np.ndarray
    write: np.ndarray

    @property
    def live(self) -> np.ndarray:
        """[L], tokens of live rows."""
        live = np.zeros(len(self.write), bool)
        for n in np.flatnonzero(self.read >= 0):
            live[self.begin[n] : self.begin[n] + self.length[n]] = True
        return live

    def written(self, shapes: Shapes) -> np.ndarray:
        """[P], or [L] where every token's state comes back."""
        if shapes.per_token_states:
            return self.live
        written = np.zeros(shapes.P, bool)
        written[self.write[self.write >= 0]] = True
        return written


class _Dice:
    def __init__(self, *seeds: int):
        self.random = np.random.default_rng(seeds)

    def one_of(self, *values: Any) -> Any:
        return values[self.random.integers(len(values))]

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)


def draw_shapes(seed: int, number: int, *, shared: bool = False) -> Shapes:
    """`shared`: such alone as vLLM's kernel takes as well (softplus gates; a decay for
    each K with one token a row and a K that is a power of two)."""
    dice = _Dice(seed, number)
    one_of, chance, random = dice.one_of, dice.chance, dice.random
    tokens, slots = MODES[number % len(MODES)]
    N, spare = one_of(1, 2, 3, 4, 5, 7, 9, 13), one_of(1, 2, 5)
    longest = 1 if tokens == "single" else one_of(1, 2, 4, 5, 8, 17)
    S = one_of(2, 3, 4, 8) if slots == "checkpoints" else 1
    if slots == "checkpoints":
        past = one_of(0, 0, 2) if tokens == "packed" else 0
        longest = min(longest, S) + past
    spare = 0 if slots == "none" else spare
    most = (MANY_VALUES if chance(1 / 8) else VALUES) // (N * S + spare)
    K, V, H = one_of(*DIMS), one_of(*DIMS), one_of(*HEADS)
    while most < H * K * V:
        H, V = ((H + 1) // 2, V) if H > 1 else (H, (V + 1) // 2)
    HV = H * one_of(*(group for group in GROUPS if group * H * K * V <= most))
    L = N * longest
    if tokens == "packed":
        L = max(longest, math.ceil(L * random.uniform(0.5, 1.1)))
    act = one_of("bfloat16", "bfloat16", "float32", "float16")
    state = one_of("float32", "float32", "bfloat16", act)
    is_power = K & (K - 1) == 0
    kda = chance(0.15) and (not shared or (tokens == "single" and is_power))
    options = _draw_options(
        dice, can_reserve=slots != "none" and spare > 1, shared=shared
    )
    return Shapes(
        tokens=tokens,
        slots=slots,
        N=N,
        L=L,
        longest=longest,
        S=S,
        P=N * S + spare,
        H=H,
        HV=HV,
        K=K,
        V=V,
        kda=kda,
        state_dtype=state,
        act_dtype=act,
        head_dtype=one_of("float32", act),
        tells_fresh=chance(0.3),
        options=tuple(options.items()),
    )


def _draw_options(dice: _Dice, *, can_reserve: bool, shared: bool) -> dict[str, Any]:
    one_of, chance = dice.one_of, dice.chance
    options: dict[str, Any] = dict(
        null_slot=0 if can_reserve and chance(0.4) else None,
        per_token_states=chance(0.15),
    )
    if chance(0.2):
        options |= dict(qk_l2norm=False)
    if chance(0.3):
        options |= dict(scale=round(dice.random.uniform(0.05, 2), 3))
    if chance(0.2):
        options |= dict(
            softplus_beta=one_of(0.5, 2.0), softplus_threshold=one_of(3.0, 20.0)
        )
    elif not shared and chance(0.2):
        options |= dict(gate_lower_bound=-5.0)
    if not shared and chance(0.2):
        options |= dict(allow_neg_eigval=True)
    return options


def draw(shapes: Shapes, seed: int, number: int) -> Drawn:
    """The call of that number: its values, lengths, slots, accepts and nulls."""
    x, random = shapes, np.random.default_rng([seed, number, 1])
    begin, length, bounds = _draw_lengths(x, random)
    own, accepted, read = _draw_slots(x, random, length)
    fresh = np.zeros(x.N, bool)
    if x.tells_fresh:
        fresh = random.random(x.N) < 0.3
    table, write = _draw_table(x, own, accepted, read, begin, length)
    tables: dict[str, Any] = {}
    if x.slots != "none":
        tables["slots"] = table if x.slots == "checkpoints" else table[:, 0]
    if x.slots == "checkpoints":
        tables["num_accepted"] = accepted
    if x.tokens == "packed":
        tables["cu_seqlens"] = bounds
    if x.tells_fresh:
        tables["has_state"] = ~fresh
    drawn = Drawn((), tables, begin, length, read, fresh, write)
    return drawn._replace(args=_draw_values(x, random, drawn))


def _draw_lengths(x: Shapes, random: np.random.Generator):
    """Of each row, where it begins and its length; and `cu_seqlens`, where numbers past
    either end and steps that fall may stand for the ends and for empty rows."""
    if x.tokens != "packed":
        length = np.full(x.N, x.longest)
        bounds = np.arange(x.N + 1) * x.longest
        return bounds[:-1], length, bounds.astype(np.int32)
    length = random.integers(1, x.longest + 1, x.N)
    length[random.random(x.N) < 0.15] = 0
    if random.random() < 0.3:
        length[:] = x.longest
    while length.sum() > x.L:
        length[length.argmax()] -= 1
    first = random.integers(0, x.L - length.sum() + 1)
    bounds = first + np.concatenate([[0], np.cumsum(length)])
    begin = bounds[:-1].copy()
    falls, outside = random.random(2) < (0.1, 0.3)
    if falls:
        bounds[0], length[0] = x.L + 3, 0
    elif outside and bounds[0] == 0:
        bounds[0] = -4
    if outside and bounds[-1] == x.L:
        bounds[-1] = 2**31 - 1
    elif falls:
        bounds[-1], length[-1] = -1, 0
    return begin, length, bounds.astype(np.int32)


def _draw_slots(x: Shapes, random: np.random.Generator, length: np.ndarray):
    """Slots [N, S] of each row's own, some null; counts, some bad; the slot [N] that a
    row reads, -1 where it is null."""
    if x.slots == "none":
        own = np.arange(x.N, dtype=np.int32)[:, None]
        return own, np.ones(x.N, np.int32), np.where(length > 0, own[:, 0], -1)
    usable = np.setdiff1d(np.arange(x.P), [-1 if x.null_slot is None else x.null_slot])
    own = random.permutation(usable)[: x.N * x.S].reshape(x.N, x.S)
    null = -1 if x.null_slot is None else x.null_slot
    nulls = np.array([-1, null, null, x.P, x.P + 7, -x.P, -(2**31), 2**31 - 1])
    share = random.choice([0, 0.1, 0.1, 0.5])
    hit = random.random(own.shape) < share
    own = np.where(hit, random.choice(nulls, own.shape), own)
    accepted = random.integers(1, x.S + 1, x.N)
    if x.slots == "checkpoints":
        bad = random.random(x.N) < 0.1
        accepted = np.where(
            bad, random.choice([0, x.S + 1, -1, 2**31 - 1], x.N), accepted
        )
    is_count = (accepted >= 1) & (accepted <= x.S)
    read = own[np.arange(x.N), np.where(is_count, accepted - 1, 0)]
    is_slot = (read >= 0) & (read < x.P) & (read != x.null_slot)
    read = np.where(is_count & is_slot & (length > 0), read, -1)
    return own.astype(np.int32), accepted.astype(np.int32), read


def _draw_table(x: Shapes, own, accepted, read, begin, length):
    """The table to pass: what a row does not use names another row's slot. And where
    each token's state goes."""
    table, write = np.roll(own, 1, axis=0), np.full(x.L, -1)
    if x.slots == "none":
        table = own
    for n in range(x.N):
        if 1 <= accepted[n] <= x.S and length[n] > 0:
            table[n, accepted[n] - 1] = own[n, accepted[n] - 1]
        if read[n] < 0 or x.per_token_states:
            continue
        tokens = slice(begin[n], begin[n] + length[n])
        if x.slots != "checkpoints":
            write[tokens.stop - 1] = read[n]
            continue
        used = min(length[n], x.S)
        table[n, :used] = own[n, :used]
        is_slot = (own[n] >= 0) & (own[n] < x.P) & (own[n] != x.null_slot)
        write[begin[n] : begin[n] + used] = np.where(is_slot, own[n], -1)[:used]
    return table, write


def _draw_values(x: Shapes, random: np.random.Generator, drawn: Drawn):
    def normal(*shape, size: float = 1.0):
        values = random.standard_normal(shape, np.float32)
        return values if size == 1 else values * np.float32(size)

    def one_of(*values: float) -> float:
        return values[random.integers(len(values))]

    act = jnp.dtype(x.act_dtype)
    state = np.full((x.P, x.HV, x.V, x.K), np.nan, jnp.dtype(x.state_dtype))
    size = one_of(0.1, 1.0, 10.0)
    for slot in drawn.read[(drawn.read >= 0) & ~drawn.fresh]:
        state[slot] = normal(x.HV, x.V, x.K, size=size).astype(state.dtype)
    # not normalised, a key no longer than 1 keeps the state from growing
    normalised = x.statics.get("qk_l2norm", True)
    long = one_of(0.01, 1.0, 1.0, 30.0) if normalised else 0.5 * x.K**-0.5
    decays = (x.HV, x.K) if x.kda else (x.HV,)
    spread = one_of(1.0, 1.0, 5.0, 40.0)
    values = [
        normal(x.L, x.H, x.K, size=long),
        normal(x.L, x.H, x.K, size=long),
        normal(x.L, x.HV, x.V),
        normal(x.L, *decays, size=spread),
        normal(x.L, x.HV),
    ]
    if random.random() < 0.1:
        values[random.integers(2)][random.integers(x.L)] = 0  # a q or k of length 0
    for each in values:
        each[~drawn.live] = np.nan
    if x.tokens == "dense":
        values = [each.reshape(x.N, x.longest, *each.shape[1:]) for each in values]
    q, k, v, a, b = (each.astype(act) for each in values)
    head = jnp.dtype(x.head_dtype)
    A_log = np.log(random.uniform(0.5, 8, x.HV)).astype(head)
    return state, q, k, v, A_log, a, b, normal(*decays).astype(head)
