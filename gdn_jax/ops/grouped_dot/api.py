"""The public product of rows in groups, each with its group's weights."""

from __future__ import annotations  # so that help() names types and expands none

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdn_jax import _dispatch, _triton
from gdn_jax.ops import checks, vjp
from gdn_jax.ops.grouped_dot.call import Inputs, Options
from gdn_jax.ops.grouped_dot.reference import reference
from gdn_jax.ops.grouped_dot.triton import backward, triton
from gdn_jax.ops.grouped_dot.tuning import GroupedDotConfig, heuristic
from gdn_jax.ops.grouped_dot.xla import xla


def grouped_dot(
    x: ArrayLike,
    weights: ArrayLike,
    group_sizes: ArrayLike,
    *,
    out_dtype: Any = None,
    implementation: str | None = None,
    config: GroupedDotConfig | None = None,
) -> Array:
    """Multiplies each row by its group's weights, as a mixture of experts does.

        y[l] = x[l] @ weights[e]    for the rows l of group e

    Rows lie group after group: those of group e begin at sum(group_sizes[:e]). Products
    are added up in float32.

    Args:
      x: [L, D].
      weights: [E, D, F].
      group_sizes: [E] int32, >= 0; together at most L, else undefined. A group may be
        empty: its weights are not read.
      out_dtype: of y; None: x's.
      implementation: "triton" (one Pallas kernel; NVIDIA, compute capability >= 8.0),
        "interpret" (that kernel in Pallas' interpreter, any machine), "xla"
        (`jax.lax.ragged_dot`, which XLA expands to E times the work) or "reference"
        (row by row); None: triton where it can run, else xla.
      config: the kernel's launch; None takes a heuristic of the sizes. `xla` and
        `reference` have no launch.

    Returns:
      y: [L, F]. Rows past the last group are exactly zero, and NaN there reaches
        nothing, gradients included. Every row is its own: NaN in one reaches no other.

    Precision: with x and weights both bfloat16 or both float16, products are exact.
    Otherwise all implementations multiply in float32, the kernel by bfloat16 parts on
    tensor cores, which leaves float32's own error at several times the cost.

    Raises:
      ValueError: the call is wrong; the text names the argument and the remedy.
      NotImplementedError: the implementation asked for cannot run here.

    Transformations: `jax.grad` of the kernel runs two more: one with the weights'
    transposes, read in place, and one that sums x^T dy group by group. `vmap` and
    `shard_map` as in `fused_update`.

    Example, three rows in groups of two, none and one:

        >>> import jax.numpy as jnp
        >>> from gdn_jax import grouped_dot
        >>> x = jnp.arange(6.0).reshape(3, 2)
        >>> weights = jnp.stack([jnp.eye(2), jnp.zeros((2, 2)), 10 * jnp.eye(2)])
        >>> grouped_dot(x, weights, jnp.array([2, 0, 1], jnp.int32)).tolist()
        [[0.0, 1.0], [2.0, 3.0], [40.0, 50.0]]
    """
    _dispatch.check_name(implementation)
    _dispatch.check_config(config, GroupedDotConfig, implementation)
    inputs, options = _pack(x, weights, group_sizes, out_dtype)
    # whatever one input is split over by shard_map, gradients of all come back over
    inputs = Inputs(*(_triton.varying_like(array, inputs) for array in inputs))
    return _dispatch.run(_paths(inputs, options, config), implementation)


def _paths(
    x: Inputs, options: Options, config: GroupedDotConfig | None
) -> dict[str, Callable[[], Array]]:
    (num_rows, D), (num_groups, _, F) = x.x.shape, x.weights.shape
    if 0 in (num_rows, D, num_groups, F):
        nothing = jnp.zeros((num_rows, F), options.out_dtype)
        return dict.fromkeys(_dispatch.IMPLEMENTATIONS, lambda: nothing)

    itemsize = max(x.x.dtype.itemsize, x.weights.dtype.itemsize)
    launch = config or heuristic(num_rows, num_groups, D, F, itemsize)

    def run_triton():
        _triton.device_kind(x)
        return _launched(COMPILED, options, launch, x)

    return {
        "triton": run_triton,
        "interpret": lambda: _launched(INTERPRETED, options, launch, x),
        "xla": lambda: _xla(x, options),
        "reference": lambda: _reference(x, options),
    }


COMPILED = vjp.Path(triton, backward)
INTERPRETED = vjp.Path(
    functools.partial(triton, interpret=True),
    functools.partial(backward, interpret=True),
)

# jit so that a call outside jit is traced and compiled once, not at every call.
_launched = jax.jit(vjp.differentiable, static_argnums=(0, 1, 2))
_xla = jax.jit(xla, static_argnums=1)
_reference = jax.jit(reference, static_argnums=1)


def _pack(
    x: ArrayLike, weights: ArrayLike, group_sizes: ArrayLike, out_dtype: Any
) -> tuple[Inputs, Options]:
    x, weights = checks.floating("x", x), checks.floating("weights", weights)
    group_sizes = checks.integers("group_sizes", group_sizes)
    if x.ndim != 2:
        remedy = "Flatten the leading axes, and sort rows by group."
        checks.fail("x", x.shape, "[L, D]", remedy)
    if weights.ndim != 3 or weights.shape[1] != x.shape[1]:
        wanted = f"[E, D, F] with D = {x.shape[1]}, as x [L, D] has"
        remedy = "One matrix a group; torch's [E, F, D] wants its last axes swapped."
        checks.fail("weights", weights.shape, wanted, remedy)
    if group_sizes.shape != weights.shape[:1]:
        wanted = f"[E] = ({weights.shape[0]},)"
        checks.fail("group_sizes", group_sizes.shape, wanted, "One size a group.")
    checks.check_sharding(dict(x=x, weights=weights, group_sizes=group_sizes))
    out_dtype = x.dtype if out_dtype is None else out_dtype
    options = Options(checks.float_dtype("out_dtype", out_dtype, "None: x's."))
    return Inputs(x, weights, group_sizes), options
