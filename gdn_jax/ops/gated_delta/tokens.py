"""A head's tokens as a program of the fused update reads them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from gdn_jax.ops.gated_delta import rule
from gdn_jax.ops.gated_delta.call import Gates, Options
from gdn_jax.ops.gated_delta.tile import Tile, unpack


class Tokens(NamedTuple):
    """Loads a head's q and k, a and b, and makes of q and k what the update takes
    (`prepare`), of a and b decay and beta (`gate`): apart, so that a token can be on
    its way during another's work, and gates of several tokens be found at once."""

    load_keys: Callable[[Array], Any]
    load_gates: Callable[[Array], Any]
    prepare: Callable[[Any], rule.Token]
    gate: Callable[[Any], tuple[Any, Array]]
    arithmetic: rule.Arithmetic
    per_k: bool

    @classmethod
    def of(
        cls,
        x: Any,
        head: Array,
        tile: Tile,
        options: Options,
        arithmetic: rule.Arithmetic,
    ) -> "Tokens":
        key_head = head // (x.v.shape[1] // x.k.shape[1])
        per_k = len(x.gates.per_token[0].shape) == 3  # KDA: one decay for each of K

        def load_decay(ref, *index) -> rule.Chunks:
            return tile.load_k(ref, *index) if per_k else (ref[index],)

        def float_decay(loaded: rule.Chunks) -> rule.Chunks:
            return unpack(loaded) if per_k else (loaded[0].astype(jnp.float32),)

        if not isinstance(x.gates, Gates):
            A_log = x.gates.A_log[head].astype(jnp.float32)
            dt_bias = float_decay(load_decay(x.gates.dt_bias, head))

        def load_keys(at: Array) -> Any:
            return tuple(tile.load_k(ref, at, key_head) for ref in (x.q, x.k))

        def load_gates(at: Array) -> Any:
            a, b = x.gates.per_token
            return load_decay(a, at, head), b[at, head]

        def prepare(keys) -> rule.Token:
            q, k = keys
            return rule.prepare(
                unpack(q),
                unpack(k),
                arithmetic,
                scale=options.scale,
                qk_l2norm=options.qk_l2norm,
            )

        def gate(gates) -> tuple[Any, Array]:
            a, b = float_decay(gates[0]), gates[1].astype(jnp.float32)
            if isinstance(x.gates, Gates):
                log_decay, beta = a, b
            else:
                log_decay = tuple(
                    rule.log_decay(A_log, logits, bias, options.gating, rule.QUICK)
                    for logits, bias in zip(a, dt_bias, strict=True)
                )
                beta = rule.beta(b, options.gating, rule.QUICK)
            decay = tuple(map(rule.QUICK.exp, log_decay))
            return decay if per_k else decay[0], beta

        return cls(load_keys, load_gates, prepare, gate, arithmetic, per_k)
