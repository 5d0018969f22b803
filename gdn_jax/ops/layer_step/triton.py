"""A layer's step as one Pallas kernel (Triton lowering), and its launch.

A program owns a value head of a row, or a part of one. It convolves the head's channels
and those of the key head that it reads, walks the head's state tile by tile as
`fused_update`'s programs do, and gates what comes out. Where it has the whole head it
normalises that too: nothing but states and the result leaves it. Where several share
one out, each leaves its sum of squares, and a second launch scales by them.

A channel is convolved by one lane, while a value of q or k meets the state in many. So
the two have shapes of their own, and Triton brings values from one to the other through
shared memory.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from gdn_jax import _triton
from gdn_jax.ops.batch import in_call
from gdn_jax.ops.causal_conv1d.call import ConvState
from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import Inputs as RuleInputs
from gdn_jax.ops.gated_delta.clearing import clear, clear_unowned
from gdn_jax.ops.gated_delta.tile import Tile
from gdn_jax.ops.gated_delta.triton import Store
from gdn_jax.ops.gated_delta.tuning import check_registers
from gdn_jax.ops.layer_step.call import Inputs, Options, Stepped, find_rows
from gdn_jax.ops.layer_step.conv import Ring
from gdn_jax.ops.layer_step.program import Gates, Program, scaled
from gdn_jax.ops.layer_step.tuning import LayerStepConfig
from gdn_jax.ops.layer_step.walk import Walk


def layer_step_kernel(
    x: Any,
    buffer_ref,
    start_ref,
    new_ref,
    out_ref,
    squares_ref=None,
    *,
    options: Options,
    config: LayerStepConfig,
    interpret: bool,
) -> None:
    """`x` is `Inputs` of references, `squares_ref` of what programs that have a part of
    a head each add to its sum of squares. Grid: (parts of V, value heads, rows); with
    `cu_seqlens` one row more, whose programs clear the tokens that belong to no row."""
    part, head, number = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    heads, is_packed = options.heads, x.tables.cu_seqlens is not None
    row, conv_row = find_rows(x, options, in_call(number, x.num_rows, is_packed))
    is_row = number < x.num_rows
    if is_packed:  # all programs of dense rows have one; to ask costs registers
        row, conv_row = (
            each._replace(
                live=each.live & is_row, length=jnp.where(is_row, each.length, 0)
            )
            for each in (row, conv_row)
        )
    steps = [row.begin + step for step in range(options.steps(x))]
    steps = [jnp.minimum(at, np.int32(x.num_tokens - 1)) for at in steps]
    # of the rule's inputs it needs those that say where states are
    none: Any = None
    states = RuleInputs(x.recurrent, none, none, out_ref, none, *x.tables)
    store = Store(states, new_ref, out_ref, head, row, options.rule)
    multiply_add = (lambda x, y, z: x * y + z) if interpret else _triton.multiply_add
    program = Program(
        x,
        options,
        config,
        head=head,
        part=part,
        row=row,
        steps=steps,
        store=store,
        arithmetic=rule.Arithmetic(Tile.sum_k, multiply_add),
    )

    # All loads before any work, what takes longest first.
    first, ring = program.load_state(program.tile(0)), Ring.of(x, conv_row)
    walk = Walk.load(program, ring)
    gates = Gates.of(x, head, steps, options, row)

    convolved = walk.convolution.run(x.projected.z.dtype, multiply_add)
    if not interpret:
        _triton.barrier()  # all warps have read `start`
    own = head * np.int32(config.programs) + part
    programs = heads.HV * config.programs
    ring.move(start_ref, own, programs)
    walk.convolution.keep(buffer_ref)
    walk.run(first, convolved, gates, squares_ref)

    if is_packed:
        known = np.int32(len(steps))  # rows that are longer are null
        begin, rest = row.begin + known, jnp.maximum(row.length - known, 0)
        for i in range(program.num_tiles):
            clear(new_ref, out_ref, begin, rest, head, program.tile(i), options.rule)
        shared_out = own, programs, config.tile(heads.V), options.rule
        pl.when(~is_row)(lambda: clear_unowned(states, new_ref, out_ref, *shared_out))


def triton(
    x: Inputs, options: Options, config: LayerStepConfig, *, interpret: bool = False
) -> Stepped:
    """In one launch, or two where several programs share out a head; both states in
    place."""
    heads = options.heads
    if not interpret:
        check_registers(config, heads.K, min(2, config.tiles(heads.V)))
    dtype, is_whole = x.projected.z.dtype, config.programs == 1
    written = list(map(_triton.shape_of, (*x.conv, x.recurrent)))
    by_head = x.num_tokens, heads.HV
    written.append(((*by_head, heads.V), dtype if is_whole else jnp.float32))
    if not is_whole:
        written.append(((*by_head, config.programs), jnp.float32))
    rows = x.num_rows + (x.tables.cu_seqlens is not None)
    buffer, start, recurrent, out, *squares = _triton.launch(
        functools.partial(
            layer_step_kernel, options=options, config=config, interpret=interpret
        ),
        x,
        written,
        grid=(config.programs, heads.HV, rows),
        aliases={0: 0, 1: 1, 2: 2},
        num_warps=config.num_warps,
        interpret=interpret,
    )
    if not is_whole:
        out = scaled(out, squares[0], options).astype(dtype)
    return ConvState(buffer, start), recurrent, out
