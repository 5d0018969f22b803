"""A layer's step whose states are replay's, as its two kernels and a norm.

The convolution is in the first of them (gated_delta/replay_prepare.py): before a
program prepares a row's key head it convolves that head's q and k, and programs beside
it convolve v, one value head each, which the second kernel reads. So a row's channels
have one program each, and the convolution's `start` is read in the first launch alone
and moved in the second.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.batch import Rows, can_stand
from gdn_jax.ops.blocks import both, indices
from gdn_jax.ops.causal_conv1d.call import ConvState
from gdn_jax.ops.gated_delta.call import GateLogits
from gdn_jax.ops.gated_delta.replay_call import Inputs as ReplayInputs
from gdn_jax.ops.gated_delta.replay_call import Turn, find_turn
from gdn_jax.ops.gated_delta.replay_prepare import prepare
from gdn_jax.ops.gated_delta.replay_state import ReplayState
from gdn_jax.ops.gated_delta.replay_tiles import Prepared, Sink, prepared_shapes
from gdn_jax.ops.gated_delta.replay_triton import (
    APPENDED,
    WRITTEN,
    cleared,
    meet_kernel,
)
from gdn_jax.ops.gated_delta.replay_tuning import ReplayConfig
from gdn_jax.ops.layer_step.call import (
    Inputs,
    Options,
    Stepped,
    conv_slot,
    null_in_both,
)
from gdn_jax.ops.layer_step.conv import Channels, Convolution, Ring
from gdn_jax.ops.layer_step.program import gated, scaled


class Convolved(NamedTuple):
    """By the first kernel, for itself and for the second: [L H K], twice, [L HV V]."""

    q: Any
    k: Any
    v: Any


def prepare_step_kernel(
    x: Any,
    buffer_ref,
    q_ref,
    k_ref,
    v_ref,
    *refs: Any,
    options: Options,
    config: ReplayConfig,
    interpret: bool,
) -> None:
    """`x` is `Inputs` of references, `refs` are as of `prepare_kernel`. Grid: (key and
    value heads, rows)."""
    program, number = pl.program_id(0), pl.program_id(1)
    heads = options.heads
    turn, row = find_step(x, options, number)
    ring = Ring.of(x, row)
    steps = [turn.rows.begin + step for step in range(options.steps(x))]
    inside = [jnp.minimum(at, np.int32(x.num_tokens - 1)) for at in steps]
    multiply_add = (lambda x, y, z: x * y + z) if interpret else _triton.multiply_add

    def convolve(head: Array, channel: Any, column: Any, size: int, ref: Any) -> None:
        """A head's `size` channels from `channel` on, in the projections at `column`,
        into `ref`."""
        index = indices(pl.next_power_of_2(size))
        mask = index < size
        channels = Channels(channel + index, column + index, mask, mask)
        convolution = Convolution.load(x, ring, channels, inside)
        values = convolution.run(x.projected.z.dtype, multiply_add)
        convolution.keep(buffer_ref)
        for step, (at, value) in enumerate(zip(steps, values, strict=True)):
            has = mask & row.live & (step < row.length)
            # Pallas' interpreter writes back what a mask spares: not where others write
            at = jnp.where(row.live & (step < row.length), at, np.int32(x.num_tokens))
            _triton.store(ref.at[at, head, index], value, mask=has)

    @pl.when(program < heads.H)
    def _():
        first = program * np.int32(heads.group)
        channel, column = heads.channels(first), heads.columns(first)[0]
        for i, ref in enumerate((q_ref, k_ref)):
            convolve(program, channel[i], column[i], heads.K, ref)
        if not interpret:
            _triton.barrier()  # all warps have stored what all of them load
        of_rule = replay_inputs(x, Convolved(q_ref, k_ref, v_ref))
        prepare(
            of_rule,
            turn,
            program,
            refs,
            options.rule,
            config,
            interpret,
            lambda head: heads.gates(head)[::-1],
        )

    @pl.when(program >= heads.H)
    def _():
        head = program - np.int32(heads.H)
        channel, column = heads.channels(head), heads.columns(head)[0]
        convolve(head, channel[2], column[2], heads.V, v_ref)


def meet_step_kernel(
    inputs: tuple[Any, Any, Any],
    *refs: Any,
    options: Options,
    config: ReplayConfig,
    interpret: bool,
) -> None:
    """`inputs` are those of `meet_kernel` and `Inputs`; behind its references there are
    what `scaled` takes and the convolution's `start`. Grid: as of `meet_kernel`."""
    x, (*of_meet, squares_ref, start_ref) = inputs[2], refs
    of_rule: dict[str, Any] = dict(
        options=options.rule, config=config, interpret=interpret
    )
    of_rule["make_sink"] = lambda *own: Gated(Sink(*own), x, squares_ref, options)
    meet_kernel(inputs[:2], *of_meet, **of_rule)
    span, head, number = (pl.program_id(i) for i in range(3))

    @pl.when((span == 0) & (head == 0))
    def _():
        row = inputs[1].load_turn(inputs[0], number, options.rule).rows

        @pl.when(row.live)
        def _():
            own = conv_slot(x, number)  # whose `start` no other program reads here
            start_ref[own] = Ring.of(x, row._replace(read=own)).left


class Gated(NamedTuple):
    """Out times the gate and the norm's weight, and behind it each token's sum of
    squares of what was not yet multiplied. Zeros of a null row."""

    out: Sink
    x: Any
    squares_ref: Any
    options: Options

    def begin(self, block_v: int) -> Array:
        return jnp.zeros((block_v, self.out.columns.step.size), jnp.float32)

    def store(self, made: Array, v: Array, in_v: Array | None, carried: Array) -> Array:
        columns, heads, x = self.out.columns, self.options.heads, self.x
        wanted: Any = both(in_v, columns.queries & self.out.live, shape=made.shape)
        at = columns.token[None, :], heads.columns(self.out.head)[1] + v[:, None]
        z = _triton.load(x.projected.z.at[at], mask=wanted, other=0)
        weight = _triton.load_where(x.weights.norm.at[v], in_v)[:, None]
        made = made.astype(self.options.rule.out_dtype).astype(jnp.float32)
        self.out.store(gated(made, weight, z, self.options), v, in_v, None)
        return carried + jnp.where(wanted, made * made, 0.0)

    def end(self, carried: Array) -> None:
        place = self.squares_ref.at[self.out.tokens(), self.out.head, self.out.span]
        squares = jnp.sum(carried, axis=0)
        _triton.store(place, squares, mask=self.out.columns.queries)


def replay_inputs(x: Inputs, tokens: Convolved) -> ReplayInputs:
    weights = x.weights
    gates = GateLogits(weights.A_log, x.projected.a, x.projected.b, weights.dt_bias)
    return ReplayInputs(x.recurrent, *tokens, gates, x.tables)


def find_step(
    x: Inputs, options: Options, number: Array | None = None
) -> tuple[Turn, Rows]:
    """(turn of the rule, rows of the convolution), of all or of that number; a row that
    is null in one is null in both."""
    nothing: Any = None  # of q, k and v it is known how many tokens there are
    of_rule = replay_inputs(x, Convolved(x.projected.z, nothing, nothing))
    turn = find_turn(of_rule, options.rule, number, stands=1)
    rows = turn.rows
    if x.tables.num_accepted is not None:
        pending = jnp.where(rows.keeps_state, x.recurrent.pending[rows.read], 0)
        accepted = x.tables.num_accepted[rows.number]
        stands = can_stand(accepted, pending, rows.keeps_state)
        rows = rows._replace(live=rows.live & stands)
    rows, of_conv = null_in_both(x, options, rows)
    return turn._replace(rows=rows, folds=turn.folds & rows.live), of_conv


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def replay_step(
    x: Inputs, options: Options, config: ReplayConfig, interpret: bool
) -> Stepped:
    """In three launches; both states in place."""
    heads, rule, old = options.heads, options.rule, x.recurrent
    config = config.fitted(heads.V, heads.K)
    of_call = dict(options=options, config=config, interpret=interpret)
    L, act = x.num_tokens, x.projected.z.dtype

    keys, values = ((L, heads.H, heads.K), act), ((L, heads.HV, heads.V), act)
    tokens = Convolved(keys, keys, values)
    empty = Convolved(*(jax.ShapeDtypeStruct(*each) for each in tokens))
    shapes = [_triton.shape_of(x.conv.buffer), *tokens]
    shapes += prepared_shapes(replay_inputs(x, empty), rule)
    leaf, before = ReplayState._fields.index, len(x.conv)
    aliases = {before + leaf(name): len(shapes) + i for i, name in enumerate(APPENDED)}
    buffer, *made = _triton.launch(
        functools.partial(prepare_step_kernel, **of_call),
        x,
        (*shapes, *(_triton.shape_of(getattr(old, name)) for name in APPENDED)),
        grid=(heads.H + heads.HV, x.num_rows),
        aliases={0: 0} | aliases,
        num_warps=config.prepare_warps,
        interpret=interpret,
    )
    tokens, prepared, appended = Convolved(*made[:3]), made[3:-3], made[-3:]
    recurrent = old._replace(**dict(zip(APPENDED, appended, strict=True)))
    x = x._replace(conv=x.conv._replace(buffer=buffer), recurrent=recurrent)
    of_rule = replay_inputs(x, tokens), Prepared(*prepared)
    # an array that is updated in place is in a launch's inputs once
    besides = x._replace(recurrent=None)
    start = len(jax.tree.leaves(of_rule)) + 1
    written = [_triton.shape_of(getattr(old, name)) for name in WRITTEN]
    written.append(((L, heads.HV, heads.V), jnp.float32))
    written.append(((L, heads.HV, config.spans(heads.V)), jnp.float32))
    *written, out, squares, start = _triton.launch(
        functools.partial(meet_step_kernel, **of_call),
        (*of_rule, besides),
        (*written, _triton.shape_of(x.conv.start)),
        grid=(config.spans(heads.V), heads.HV, x.num_rows),
        aliases={leaf(name): i for i, name in enumerate(WRITTEN)}
        | {start: len(written)},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    recurrent = recurrent._replace(**dict(zip(WRITTEN, written, strict=True)))
    if rule.tokens_per_row is None:
        out = cleared(out, of_rule[0], rule, find_step(x, options)[0])
    out = scaled(out, squares, options).astype(act)
    return ConvState(buffer, start), recurrent, out
