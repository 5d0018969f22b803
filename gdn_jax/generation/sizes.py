"""How large an engine is, and what it says when that is too much."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn_jax import _triton
from gdn_jax.models.sharded import AnyModel, ShardedModel
from gdn_jax.nn import arguments
from gdn_jax.ops import checks
from gdn_jax.ops.gated_delta.replay_tuning import replay_pays
from gdn_jax.sharding.grid import Axis

SHORTEST_PIECE = 16  # of a prompt; shorter ones are padded to it
CONTAINER = pathlib.Path("/sys/fs/cgroup/memory.max")  # of Linux; bytes
# A draft hangs on those before it, so that fewer and fewer stand; and each is a part of
# the step's program, so that many compile without end.
MOST_DRAFTS = 8


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What `Engine` takes under these names; recurrent_dtype is the dtype's name, and
    decode what was chosen."""

    num_rows: int
    num_positions: int
    speculative: int
    steps_per_call: int
    prefill_tokens: int
    max_stop: int
    recurrent_dtype: str
    decode: str | None = None


def check_sizes(
    model: AnyModel, *, recurrent_dtype: Any, decode: str | None, **sizes: Any
) -> Sizes:
    drafts = integer("speculative", sizes.pop("speculative"))
    if not 0 <= drafts <= MOST_DRAFTS:
        remedy = "It is a count of drafts, of which the first few stand most often."
        checks.fail("speculative", drafts, f"in [0, {MOST_DRAFTS}]", remedy)
    layers = model.config.num_mtp_layers
    if drafts and layers != 1:
        wanted = f"0 for a model with {layers} MTP layers"
        remedy = "One layer drafts; without it, or with more, decode plainly."
        checks.fail("speculative", drafts, wanted, remedy)
    arguments.check_decode(decode, 1 + drafts)
    for name, size in sizes.items():
        checks.count(name, size, "It is a size.")
    if isinstance(model, ShardedModel):
        model.grid.check(Axis("rows", "num_rows", sizes["num_rows"]))
    if sizes["prefill_tokens"] < SHORTEST_PIECE:
        wanted, remedy = f">= {SHORTEST_PIECE}", "Shorter pieces are padded to it."
        checks.fail("prefill_tokens", sizes["prefill_tokens"], wanted, remedy)
    remedy = "float32 keeps most of a long text."
    dtype = checks.float_dtype("recurrent_dtype", recurrent_dtype, remedy)
    sizes = {name: int(size) for name, size in sizes.items()}
    # A longer block would run no further, and take memory for what it might write.
    sizes["steps_per_call"] = min(sizes["steps_per_call"], sizes["num_positions"])
    if decode is None:
        decode = _fastest(model, sizes["num_rows"], drafts, dtype)
    return Sizes(speculative=drafts, recurrent_dtype=dtype.name, decode=decode, **sizes)


def _fastest(model: AnyModel, rows: int, drafts: int, dtype: Any) -> str:
    """Replay where the kernels run and it was measured to be faster for so many."""
    try:
        device_kind = _triton.device_kind(())
    except NotImplementedError:
        device_kind = ""
    if isinstance(model, ShardedModel):
        model, rows = model.part, rows // model.groups
    config = model.own_config
    heads = config.linear_num_value_heads, config.linear_num_key_heads
    sizes = config.linear_value_head_dim, config.linear_key_head_dim
    state = jax.ShapeDtypeStruct((rows, heads[0], *sizes), dtype)
    is_measured = jnp.dtype(model.dtype).itemsize == 2  # with records of 16 bits
    kernels = is_measured and model.implementation in (None, "triton")
    if kernels and replay_pays(device_kind, 1 + drafts, state, heads[1], rows):
        return "replay"
    return "checkpoints" if drafts else "in_place"


def integer(name: str, x: Any) -> int:
    if not isinstance(x, int | np.integer):
        checks.fail(name, repr(x), "an int", "Convert it first.")
    return int(x)


def power_of_two(size: int) -> int:
    """The next one: few shapes, so few compilations."""
    return 1 << (size - 1).bit_length()


def block_bytes(sizes: Sizes) -> int:
    """Of the tokens and log-probabilities that a block may give."""
    return 8 * sizes.num_rows * sizes.steps_per_call * (1 + sizes.speculative)


def check_memory(sizes: Sizes, num_bytes: int) -> None:
    """Refuses a state that no allocator could place. A CPU's would take it, and the
    system kill the process once it is written to.

    Raises:
      MemoryError: it is larger than the device's memory.
    """
    there = _device_bytes()
    if there is not None and num_bytes > there:
        raise MemoryError(too_large(sizes, num_bytes))


def _device_bytes() -> int | None:
    """Of the device where a state is made, the default one, also for parameters on a
    mesh; None where it is not told."""
    device = next(iter(jnp.zeros(()).devices()))
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    limits = []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if CONTAINER.is_file() and (text := CONTAINER.read_text().strip()).isdecimal():
        limits.append(int(text))  # "max" where there is none
    return min(limits, default=None)


def too_large(sizes: Sizes, num_bytes: int) -> str:
    """What to reduce of an engine for whose state the device has no room."""
    return (
        f"the device has too little memory beside the model's for a state of "
        f"{num_bytes / 1e9:.3g} GB (num_rows = {sizes.num_rows}, num_positions = "
        f"{sizes.num_positions}, speculative = {sizes.speculative}) and calls of "
        f"prefill_tokens = {sizes.prefill_tokens}. Make the engine with less of "
        "one of these; num_positions holds a prompt and its max_tokens."
    )
