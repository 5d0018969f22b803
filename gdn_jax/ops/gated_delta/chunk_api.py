"""The public update over long rows: prefill and training, in chunks of the tokens."""

from __future__ import annotations  # so that help() names types and expands none

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdn_jax import _dispatch, _triton
from gdn_jax.ops import checks, vjp
from gdn_jax.ops.gated_delta import arguments
from gdn_jax.ops.gated_delta.api import nothing
from gdn_jax.ops.gated_delta.call import GateLogits, Inputs, Options
from gdn_jax.ops.gated_delta.chunk_backward import chunk_backward
from gdn_jax.ops.gated_delta.chunk_memory import parts_of
from gdn_jax.ops.gated_delta.chunk_triton import chunk_triton
from gdn_jax.ops.gated_delta.chunk_xla import chunk_xla
from gdn_jax.ops.gated_delta.reference import reference
from gdn_jax.ops.gated_delta.tuning import ChunkConfig, chunk_heuristic


def chunk_update(
    state: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    A_log: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    dt_bias: ArrayLike,
    *,
    slots: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    has_state: ArrayLike | None = None,
    null_slot: int | None = None,
    scale: float | None = None,
    qk_l2norm: bool = True,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    allow_neg_eigval: bool = False,
    gate_lower_bound: float | None = None,
    out_dtype: Any = None,
    implementation: str | None = None,
    config: ChunkConfig | None = None,
) -> tuple[Array, Array]:
    """`fused_update` for long rows, prefill and training: (state, out).

    The same result, computed in chunks of 64 tokens: within a chunk by products of
    matrices, from chunk to chunk by the state. Source: Yang, Kautz, Hatamizadeh,
    "Gated Delta Networks" (arXiv:2412.06464), section 3.

    Arguments, null rule, in-place update of a donated state, errors and results are
    those of `fused_update`; it has no `per_token_states`, no `num_accepted` and no 2-D
    `slots`, since a state between tokens is never formed. A falling `cu_seqlens` that
    gives a token to two rows makes all of the call's results undefined.

    `config` is a `ChunkConfig`. KDA's per-K decay has no kernel, and GPUs of compute
    capability 8.6, 8.9 and 12 have too little shared memory for the kernels: "triton"
    raises NotImplementedError there, and None is xla.

    A NaN among a chunk's tokens reaches all of its out, that of tokens before it too.

    Numerics: products are float32's ("xla"), or of three and two bfloat16 parts. A
    float32 state is within 1e-5 of float64 (relative RMS) where gates forget, as in
    models. Errors grow along a row of which nothing is forgotten, fastest with doubled
    beta and keys that are alike, those of "xla" too; those of `fused_update` least.

    Memory: what the kernels hand each other takes about 1 KB a token and value head
    while the call runs.

    Transformations: `jax.grad` is what it is for: gradients of q, k, v, A_log, a, b,
    dt_bias and the initial state, for cotangents of out and of the final state, in
    chunks too. It keeps its inputs alone; the backward pass computes the chunks again,
    and needs room for a state and its cotangent for every 64 tokens, K V float32 each a
    value head, and for every token and value head 0.5 KB and two float32 values for
    each of K and of V ("xla": several times that). `vmap`, `scan` and `shard_map` as
    with `fused_update`.

    Examples:
      Rows of 100 and 30 tokens one behind the other, and the gradient of a sum:

        >>> import jax, jax.numpy as jnp
        >>> from gdn_jax import chunk_update
        >>> L, H, HV, K, V = 130, 1, 2, 16, 16
        >>> q, k = jax.random.normal(jax.random.key(0), (2, L, H, K))
        >>> v, a, b = jnp.ones((L, HV, V)), jnp.zeros((L, HV)), jnp.zeros((L, HV))
        >>> rows = dict(cu_seqlens=jnp.array([0, 100, 130], jnp.int32))
        >>> def total(v):
        ...     state = jnp.zeros((2, HV, V, K))
        ...     gates = jnp.zeros(HV), a, b, jnp.zeros(HV)
        ...     state, out = chunk_update(state, q, k, v, *gates, **rows)
        ...     return out.sum()
        >>> jax.grad(total)(v).shape
        (130, 2, 16)
    """
    _dispatch.check_name(implementation)
    _dispatch.check_config(config, ChunkConfig, implementation)
    if slots is not None and jnp.ndim(slots) == 2:
        checks.fail(
            "slots",
            jnp.shape(slots),
            "[N], one slot a row",
            "Speculative decoding keeps a state per token: use fused_update.",
        )
    x, options, unpack = arguments.pack(
        state,
        q,
        k,
        v,
        arguments.floating_gates(GateLogits, A_log, a, b, dt_bias),
        slots=slots,
        cu_seqlens=cu_seqlens,
        num_accepted=None,
        has_state=has_state,
        null_slot=null_slot,
        scale=scale,
        qk_l2norm=qk_l2norm,
        per_token_states=False,
        out_dtype=out_dtype,
        gating=arguments.gate_options(
            softplus_beta, softplus_threshold, allow_neg_eigval, gate_lower_bound
        ),
    )
    x = x._replace(state=_triton.varying_like(x.state, x))
    new, out = _dispatch.run(_paths(x, options, config), implementation)
    return new, unpack(out)


def _paths(x: Inputs, options: Options, config: ChunkConfig | None):
    empty = 0 in (x.q.shape[0], x.num_rows, x.state.shape[0])
    run = nothing if empty else _differentiable
    parts = parts_of(options)
    key_parts = 1 if x.q.dtype == x.k.dtype == jnp.bfloat16 else parts
    launch = config or chunk_heuristic(x.q.shape[2], key_parts, parts)

    def run_triton():
        _triton.device_kind(x)
        if config is None:
            _triton.need_shared_memory(x, "chunk_update")
        return run(COMPILED, options, launch, x)

    return {
        "triton": run_triton,
        "interpret": lambda: run(INTERPRETED, options, launch, x),
        "xla": lambda: run(BATCHED, options, None, x),
        "reference": lambda: (
            run(None, options, None, x) if empty else _reference(x, options)
        ),
    }


def _interpreted(
    x: Inputs, options: Options, config: ChunkConfig
) -> tuple[Array, Array]:
    return chunk_triton(x, options, config, interpret=True)


def _batched(x: Inputs, options: Options, config: None) -> tuple[Array, Array]:
    del config
    return chunk_xla(x, options)


def _backward_of_kernels(*, interpret: bool):
    """The kernels' backward, which has XLA's for its own gradient."""

    def forward(x: Any, options: Options, config: ChunkConfig) -> Inputs:
        inputs, cotangents = x
        return chunk_backward(inputs, options, config, cotangents, interpret=interpret)

    def batched(x: Any, options: Options) -> Inputs:
        inputs, cotangents = x
        pulled = BACKWARD(inputs, options, None, cotangents)
        return pulled._replace(slots=None, cu_seqlens=None, has_state=None)

    path = vjp.Path(forward, vjp.backward_of(batched))

    def backward(x: Inputs, options: Options, config: ChunkConfig, cotangents: Any):
        return vjp.differentiable(path, options, config, (x, cotangents))

    return backward


BACKWARD = vjp.backward_of(chunk_xla)
BATCHED = vjp.Path(_batched, BACKWARD)
COMPILED = vjp.Path(chunk_triton, _backward_of_kernels(interpret=False))
INTERPRETED = vjp.Path(_interpreted, _backward_of_kernels(interpret=True))

# jit so that a call outside jit is traced and compiled once, not at every call.
_differentiable = jax.jit(vjp.differentiable, static_argnums=(0, 1, 2))
_reference = jax.jit(reference, static_argnums=1)
