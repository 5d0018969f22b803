"""The gates on their own: with `recurrent_update`, the unfused pair."""

from __future__ import annotations  # so that help() names types and expands none

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import ArrayLike

from gdn_jax import _dispatch, _triton
from gdn_jax.ops.gated_delta import arguments, rule
from gdn_jax.ops.gated_delta.call import GateLogits, GateOptions, Gates
from gdn_jax.ops.gated_delta.reference import reference_gates

MAX_VALUES = 1024  # of decay in a program: 32 a lane
Path = Callable[[GateOptions, GateLogits], Gates]


def gates(
    A_log: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    dt_bias: ArrayLike,
    *,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    allow_neg_eigval: bool = False,
    gate_lower_bound: float | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """(log_decay, beta) of the gated delta rule: float32, as `recurrent_update` takes.

        log_decay = -exp(A_log) * softplus(a + dt_bias)             beta = sigmoid(b)

    Args:
      A_log: [HV].
      a, b: [..., HV] logits; per-K decay (KDA): a is [..., HV, K].
      dt_bias: [HV]; KDA: [HV, K].
      softplus_beta, softplus_threshold: as in `fused_update`.
      allow_neg_eigval, gate_lower_bound: as in `fused_update`.
      implementation: as in `fused_update`. On a GPU one kernel; XLA makes two.

    Returns:
      log_decay: of a's shape, <= 0.
      beta: of b's shape, in (0, 1), or (0, 2) with `allow_neg_eigval`.

    Raises:
      ValueError: a shape or a parameter is wrong.
      NotImplementedError: the implementation asked for cannot run this call here.
    """
    _dispatch.check_name(implementation)
    logits = arguments.floating_gates(GateLogits, A_log, a, b, dt_bias)
    arguments.check_gate_logits(logits)
    options = arguments.gate_options(
        softplus_beta, softplus_threshold, allow_neg_eigval, gate_lower_bound
    )

    empty = 0 in (logits.a.size, logits.b.size)  # nothing to launch

    def run(path: Path) -> Gates:
        return _differentiable(_xla if empty else path, options, logits)

    def run_triton() -> Gates:
        _triton.device_kind(logits)
        return run(_compiled)

    paths = {
        "triton": run_triton,
        "interpret": lambda: run(_interpreted),
        "xla": lambda: run(_xla),
        "reference": lambda: run(_reference),
    }
    log_decay, beta = _dispatch.run(paths, implementation)
    return log_decay, beta


def gates_kernel(
    x: GateLogits, log_decay_ref, beta_ref, *, block: int, options: GateOptions
) -> None:
    """One token and a block of its value heads, with all of K where decay has one."""
    token = pl.program_id(0)
    head = pl.program_id(1) * block + jnp.arange(block, dtype=jnp.int32)
    in_head = head < beta_ref.shape[1]
    logits = _load(x.b.at[token, head], in_head)
    beta = rule.beta(logits, options)
    _triton.store(beta_ref.at[token, head], beta, mask=in_head)
    A_log = _load(x.A_log.at[head], in_head)
    place, inside = (head,), in_head
    if len(x.a.shape) == 3:
        K = x.a.shape[2]
        k = jnp.arange(pl.next_power_of_2(K), dtype=jnp.int32)
        place, A_log = (head[:, None], k[None, :]), A_log[:, None]
        inside = in_head[:, None] & (k < K)[None, :]
    a = _load(x.a.at[(token, *place)], inside)
    dt_bias = _load(x.dt_bias.at[place], inside)
    log_decay = rule.log_decay(A_log, a, dt_bias, options)
    _triton.store(log_decay_ref.at[(token, *place)], log_decay, mask=inside)


def _load(at, mask: Array) -> Array:
    return _triton.load(at, mask=mask, other=0).astype(jnp.float32)


def _compiled(options: GateOptions, x: GateLogits) -> Gates:
    return _launch(options, x, interpret=False)


def _interpreted(options: GateOptions, x: GateLogits) -> Gates:
    return _launch(options, x, interpret=True)


def _launch(options: GateOptions, x: GateLogits, *, interpret: bool) -> Gates:
    lead = x.b.shape[:-1]
    b = x.b.reshape(-1, x.b.shape[-1])
    a = x.a.reshape(b.shape[0], *x.a.shape[len(lead) :])
    per_head = pl.next_power_of_2(a.shape[2]) if a.ndim == 3 else 1
    block = min(pl.next_power_of_2(b.shape[1]), max(1, MAX_VALUES // per_head))
    log_decay, beta = _triton.launch(
        functools.partial(gates_kernel, block=block, options=options),
        x._replace(a=a, b=b),
        ((a.shape, jnp.float32), (b.shape, jnp.float32)),
        grid=(b.shape[0], pl.cdiv(b.shape[1], block)),
        aliases={},
        num_warps=1,
        interpret=interpret,
    )
    return Gates(log_decay.reshape(x.a.shape), beta.reshape(x.b.shape))


def _xla(options: GateOptions, x: GateLogits) -> Gates:
    A_log, a, b, dt_bias = (y.astype(jnp.float32) for y in x)
    A_log = A_log[:, None] if a.ndim > b.ndim else A_log
    return Gates(rule.log_decay(A_log, a, dt_bias, options), rule.beta(b, options))


def _reference(options: GateOptions, x: GateLogits) -> Gates:
    return Gates(*reference_gates(x, x.a, x.b, options))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradient(path: Path, options: GateOptions, x: GateLogits) -> Gates:
    return path(options, x)


def _forward(path: Path, options: GateOptions, x: GateLogits):
    return _with_gradient(path, options, x), x  # so that it has a gradient too


def _backward(path: Path, options: GateOptions, x: GateLogits, cotangents: Gates):
    """Logits whose gates nothing depends on are replaced: a NaN in a null row's would
    otherwise reach the sums over tokens as 0 * NaN."""
    del path
    used = x._replace(
        a=jnp.where(cotangents.log_decay == 0, 0, x.a),
        b=jnp.where(cotangents.beta == 0, 0, x.b),
    )
    return jax.vjp(functools.partial(_xla, options), used)[1](cotangents)


_with_gradient.defvjp(_forward, _backward)
_differentiable = jax.jit(_with_gradient, static_argnums=(0, 1))
