"""The public causal convolution, with its state in slots."""

from __future__ import annotations  # so that help() names types and expands none

import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import ArrayLike

from gdn_jax import _dispatch, _triton
from gdn_jax.ops import checks, vjp
from gdn_jax.ops.batch import Batch
from gdn_jax.ops.causal_conv1d.call import (
    ConvState,
    Inputs,
    Options,
    split_channels,
)
from gdn_jax.ops.causal_conv1d.reference import reference
from gdn_jax.ops.causal_conv1d.triton import triton
from gdn_jax.ops.causal_conv1d.tuning import ConvConfig, heuristic
from gdn_jax.ops.causal_conv1d.xla import xla

ACTIVATIONS = ("silu", None)


def causal_conv1d(
    state: ConvState,
    x: ArrayLike,
    weight: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    activation: str | None = "silu",
    slots: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    num_accepted: ArrayLike | None = None,
    has_state: ArrayLike | None = None,
    null_slot: int | None = None,
    split: Sequence[int] | None = None,
    implementation: str | None = None,
    config: ConvConfig | None = None,
) -> tuple[ConvState, Array | tuple[Array, ...]]:
    """Depthwise causal convolution of each sequence's channels: (state, y).

    For token t of a sequence and channel c, in float32:

        y[t, c] = activation(bias[c] + sum_w weight[c, w] * x[t - W + 1 + w, c])

    where the inputs before the first token come from the state. Prefill of any length,
    decoding and speculative decoding are one call; a call of T tokens equals T calls of
    one.

    Args:
      state: `ConvState(buffer [P, C, W - 1 + S], start [P])`, a slot per sequence.
        Donate it under `jax.jit` and it is updated in place; slots that are not written
        keep their bits. Inputs are rounded to the buffer's dtype where they are stored:
        in x's own they are kept as they are.
      x: [N, T, C] (dense) or [L, C] (packed), channels flat as [q | k | v].
      weight: [C, W].
      bias: [C].
      activation: "silu" or None.
      slots: [N] int32: sequence n has state slots[n], also in speculative decoding.
        None: state n is sequence n's.
      cu_seqlens, has_state, null_slot: as in `fused_update`.
      num_accepted: [N] int32 in 1..S, how many tokens of the last step stand: 1 + the
        drafts accepted, and 1 after a plain step. Sequence n goes on behind them. Dense
        T <= S; packed tokens past the S-th give `y` and are not kept. A step without it
        behind a speculative one takes one token of that step to stand.
      split: how many channels each array has that y is returned in, such as those of q,
        k and v: what the kernel writes apart nobody has to take apart. None: y is one.
      implementation: "triton" (one Pallas kernel; NVIDIA, compute capability >= 8.0),
        "interpret" (that kernel in Pallas' interpreter, any machine), "xla" or
        "reference"; None: triton where it can run, else xla.
      config: the kernel's launch; None takes a heuristic of the sizes. Otherwise as in
        `fused_update`.

    Null rule: as in `fused_update`; a null row's `y` is exactly zero and its slot keeps
    its bits. Undefined: one slot given to two live rows, and one token to two rows, by
    a falling cu_seqlens.

    Returns:
      state: as given, moved on behind this call's tokens; with `num_accepted` it waits
        for the next call to say how many of them stand. Implementations put the same
        inputs at different columns of the ring, with `start` to tell; a call may take
        the state of any of them.
      y: of x's shape and dtype; with `split` a tuple, of those channels each.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
      NotImplementedError: the implementation asked for cannot run here.

    Transformations: as in `fused_update`. `jax.grad` of the kernel runs `xla` backward.

    Example, sums of three: five tokens into slot 2, then one more.

        >>> import functools, jax, jax.numpy as jnp
        >>> from gdn_jax import ConvState, causal_conv1d
        >>> sums = functools.partial(causal_conv1d, activation=None)
        >>> sums = jax.jit(sums, donate_argnums=0)
        >>> state = ConvState.zeros(4, channels=2, width=3, dtype=jnp.float32)
        >>> x = jnp.arange(12.0).reshape(1, 6, 2)
        >>> weight, slots = jnp.ones((2, 3)), jnp.array([2], jnp.int32)
        >>> state, y = sums(state, x[:, :5], weight, slots=slots)
        >>> y[0, :, 0].tolist()
        [0.0, 2.0, 6.0, 12.0, 18.0]
        >>> state, y = sums(state, x[:, 5:], weight, slots=slots)
        >>> y.tolist()
        [[[24.0, 27.0]]]
    """
    _dispatch.check_name(implementation)
    _dispatch.check_config(config, ConvConfig, implementation)
    inputs, options, shape = _pack(
        state,
        x,
        weight,
        bias,
        activation,
        checks.tables(slots, cu_seqlens, num_accepted, has_state),
        null_slot,
        split,
    )
    _check_config(config, inputs, options)
    buffer, start = inputs.state
    varying = ConvState(
        _triton.varying_like(buffer, inputs),
        _triton.varying_like(start, (start, inputs.tables)),
    )
    inputs = inputs._replace(state=varying)
    new, parts = _dispatch.run(_paths(inputs, options, config), implementation)
    parts = tuple(y.reshape(*shape[:-1], y.shape[-1]) for y in parts)
    return new, parts[0] if split is None else parts


def _paths(
    x: Inputs, options: Options, config: ConvConfig | None
) -> dict[str, Callable[[], tuple[ConvState, tuple[Array, ...]]]]:
    if 0 in (*x.x.shape, x.num_rows, *x.state.buffer.shape):
        nothing = x.state, split_channels(jnp.zeros_like(x.x), options)
        return dict.fromkeys(_dispatch.IMPLEMENTATIONS, lambda: nothing)

    num_tokens, channels = x.x.shape
    launch = config or heuristic(
        num_tokens,
        x.num_rows,
        channels,
        x.weight.shape[1],
        x.x.dtype.itemsize,
        ragged=options.tokens_per_row is None,
    )

    def run_triton():
        _triton.device_kind(x)
        return _launched(COMPILED, options, launch, x)

    return {
        "triton": run_triton,
        "interpret": lambda: _launched(INTERPRETED, options, launch, x),
        "xla": lambda: _xla(x, options),
        "reference": lambda: _reference(x, options),
    }


def _interpreted(x: Inputs, options: Options, config: ConvConfig):
    return triton(x, options, config, interpret=True)


def _as_launched(x: Inputs, options: Options) -> tuple[ConvState, tuple[Array, ...]]:
    """What the kernel's results are, for its gradient."""
    state, y = xla(x, options)
    return state.turned(x.state.start), y


BACKWARD = vjp.backward_of(_as_launched)
COMPILED = vjp.Path(triton, BACKWARD)
INTERPRETED = vjp.Path(_interpreted, BACKWARD)

# jit so that a call outside jit is traced and compiled once, not at every call.
_launched = jax.jit(vjp.differentiable, static_argnums=(0, 1, 2))
_xla = jax.jit(xla, static_argnums=1)
_reference = jax.jit(reference, static_argnums=1)


def _pack(
    state: ConvState,
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    activation: str | None,
    tables: Batch,
    null_slot: int | None,
    split: Sequence[int] | None,
) -> tuple[Inputs, Options, tuple[int, ...]]:
    if not isinstance(state, ConvState):
        remedy = "Make one with ConvState.zeros or ConvState.from_dense."
        checks.fail("state", type(state).__name__, "a ConvState", remedy)
    buffer = checks.floating("state.buffer", state.buffer)
    start = checks.integers("state.start", state.start)
    x, weight = checks.floating("x", x), checks.floating("weight", weight)
    if x.ndim not in (2, 3):
        checks.fail("x", x.shape, "[N, T, C] (dense) or [L, C] (packed)", "Reshape it.")
    _check_weight(weight, x)
    channels, width = weight.shape
    if bias is not None:
        bias = checks.floating("bias", bias)
        if bias.shape != (channels,):
            checks.fail("bias", bias.shape, f"[C] = ({channels},)", "One a channel.")
    if buffer.ndim != 3 or buffer.shape[1] != channels or buffer.shape[2] < width:
        wanted = f"[P, C, W - 1 + S] = [P, {channels}, {width - 1} + S] with S >= 1"
        remedy = "ConvState.zeros(num_slots, channels, width, dtype, columns=S) is one."
        checks.fail("state.buffer", buffer.shape, wanted, remedy)
    if start.shape != buffer.shape[:1]:
        wanted = f"[P] = ({buffer.shape[0]},)"
        checks.fail("state.start", start.shape, wanted, "One a slot.")
    if activation not in ACTIVATIONS:
        checks.fail("activation", repr(activation), "'silu' or None", "Apply others.")
    rows, tokens, source = checks.rows_of(x.shape[:-1], tables.cu_seqlens)
    _check_tables(tables, buffer.shape[0], buffer.shape[2] - width + 1, rows, tokens)
    checks.check_per_row(tables, rows, source)
    arrays = dict(x=x, weight=weight, bias=bias, buffer=buffer, start=start)
    checks.check_sharding(arrays | tables._asdict())
    options = Options(
        tokens_per_row=tokens,
        null_slot=checks.null_slot_of(null_slot, buffer.shape[0], tables.slots),
        silu=activation == "silu",
        split=_check_split(split, channels),
    )
    packed = x.reshape(-1, channels)
    inputs = Inputs(ConvState(buffer, start), packed, weight, bias, tables)
    return inputs, options, x.shape


def _check_split(split: Sequence[int] | None, channels: int) -> tuple[int, ...]:
    if split is None:
        return (channels,)
    try:
        sizes = tuple(map(operator.index, split))
    except TypeError:
        sizes = ()
    if not sizes or min(sizes) < 1 or sum(sizes) != channels:
        wanted = f"positive sizes whose sum is C = {channels}"
        checks.fail("split", split, wanted, "One for each array to return.")
    return sizes


def _check_weight(weight: Array, x: Array) -> None:
    channels = x.shape[-1]
    if weight.ndim == 2 and weight.shape[1] > 0 and weight.shape[0] == channels:
        return
    if weight.ndim == 2 and x.shape[-2] == weight.shape[0]:
        wanted = f"[N, T, C] or [L, C] with C = {weight.shape[0]}, as weight [C, W] has"
        remedy = "Channels come last in x (x.swapaxes(-1, -2)) and first in weight."
        checks.fail("x", x.shape, wanted, remedy)
    wanted = f"[C, W] with C = {channels} and W >= 1"
    checks.fail("weight", weight.shape, wanted, "Channels come first.")


def _check_config(config: ConvConfig | None, x: Inputs, options: Options) -> None:
    if config is None:
        return
    most, back = options.tokens_per_row, x.weight.shape[1] - 1
    most = x.x.shape[0] if most is None else most
    if config.tokens < min(back, most):
        wanted = f"W - 1 = {back} or more where a row may have {most} tokens"
        remedy = f"Take {pl.next_power_of_2(min(back, most))}."
        checks.fail("config.tokens", config.tokens, wanted, remedy)


def _check_tables(
    tables: Batch, num_slots: int, columns: int, rows: int, tokens: int | None
) -> None:
    if tables.slots is None and num_slots != rows:
        checks.fail(
            "state",
            f"{num_slots} slots for {rows} rows",
            "one slot per row where slots is None",
            "Pass slots to use a pool.",
        )
    if tables.slots is not None and tables.slots.shape != (rows,):
        remedy = "One slot a sequence, in speculative decoding too."
        checks.fail("slots", tables.slots.shape, f"[N] = ({rows},)", remedy)
    if tables.num_accepted is not None and tokens is not None and tokens > columns:
        checks.fail(
            "state.buffer",
            f"room for {columns} tokens a step, and {tokens} come",
            "[P, C, W - 1 + S] with S >= T where num_accepted is given",
            "Make the state with columns=1 + drafts.",
        )
