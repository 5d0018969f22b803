"""What of each op's arguments is split, and over what."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

Names = tuple[Any, ...]  # of logical axes; `...`: those there are in between


class Op(NamedTuple):
    """What of an op's arguments is split.

    Attributes:
      arrays: each argument's axes, or that of each of its leaves, by path; axes behind
        those named are whole.
      results: the arguments that each result is split as.
      pools: tables of slots, and whose slots they name.
    """

    arrays: Mapping[str, Names]
    results: tuple[str, ...]
    pools: Mapping[str, str] = {}


_KEYS: Names = ("rows", ..., "gdn_key_heads", None)
_VALUES: Names = ("rows", ..., "gdn_value_heads", None)
_GATES: Names = ("rows", ..., "gdn_value_heads")
_PER_HEAD: Names = ("gdn_value_heads",)
_CHANNELS: Names = ("rows", ..., "gdn_channels")
_POOL: Names = ("rows", "gdn_value_heads")
_CONV: Mapping[str, Names] = dict(buffer=("rows", "gdn_channels"), start=("rows",))
_TABLES: Mapping[str, Names] = dict.fromkeys(
    ("slots", "conv_slots", "cu_seqlens", "num_accepted", "has_state"), ("rows",)
)


def _under(path: str, names: Mapping[str, Names]) -> dict[str, Names]:
    return {f"{path}.{field}": axes for field, axes in names.items()}


_RULE = dict(state=_POOL, q=_KEYS, k=_KEYS, v=_VALUES) | _TABLES
_LOGITS = dict(A_log=_PER_HEAD, a=_GATES, b=_GATES, dt_bias=_PER_HEAD)
_RECORDS: dict[str, Names] = dict.fromkeys(("checkpoint", "u", "log_decay"), _POOL)
_RECORDS |= dict.fromkeys(("k", "k_scale"), ("rows", "gdn_key_heads"))
_RECORDS |= dict.fromkeys(("start", "committed", "pending"), ("rows",))
_OF_POOL = dict(slots="state")
_ATTENTION: dict[str, Names] = dict(
    q=("rows", None, "heads"), rows=("rows",), start=("rows",)
)
_ATTENTION |= dict.fromkeys(("k", "v"), ("rows", "kv_heads"))

OPS: Mapping[str, Op] = dict(
    fused_update=Op(_RULE | _LOGITS, ("state", "v"), _OF_POOL),
    chunk_update=Op(_RULE | _LOGITS, ("state", "v"), _OF_POOL),
    recurrent_update=Op(
        _RULE | dict(log_decay=_GATES, beta=_GATES), ("state", "v"), _OF_POOL
    ),
    replay_update=Op(
        _RULE | _LOGITS | _under("state", _RECORDS),
        ("state", "v"),
        dict(slots="state.start"),
    ),
    gates=Op(_LOGITS, ("a", "b")),
    causal_conv1d=Op(
        _TABLES
        | _under("state", _CONV)
        | dict(x=_CHANNELS, weight=("gdn_channels",), bias=("gdn_channels",)),
        ("state", "x"),
        dict(slots="state.start"),
    ),
    fused_layer_step=Op(
        _TABLES
        | _under("state.0", _CONV)
        | {"state.1": _POOL}
        | _under("state.1", _RECORDS)
        | dict.fromkeys(("qkvz", "qkvz.0", "ba"), _CHANNELS)
        | {"qkvz.1": _GATES, "ba.0": _GATES, "ba.1": _GATES}
        | dict(conv_weight=("gdn_channels",), A_log=_PER_HEAD, dt_bias=_PER_HEAD)
        | dict(norm_weight=(None,)),
        ("state", "qkvz"),
        {"slots": "state.1", "conv_slots": "state.0.start"},
    ),
    gated_rms_norm=Op(dict(x=_VALUES, gate=_VALUES, weight=(None,)), ("x",)),
    cached_attention=Op(_under("x", _ATTENTION), ("x.q",), {"x.rows": "x.k"}),
    grouped_dot=Op(
        dict(x=("rows",), weights=("experts",), group_sizes=("rows",)), ("x",)
    ),
)


def of_pools(state: Any, axis: str = "gdn_value_heads") -> Op:
    """Of `copy_slots`: whatever has heads, has them behind its slots."""
    paths = [
        ".".join(["state", *map(key_of, path)])
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    arrays = dict.fromkeys(paths, ("rows", axis))
    arrays |= dict(src=(), dst=())
    return Op(arrays, ("state",), dict.fromkeys(("src", "dst"), paths[0]))


def key_of(entry: Any) -> str:
    """Of a path in a tree: a name or an index."""
    for field in ("key", "name", "idx"):
        if hasattr(entry, field):
            return str(getattr(entry, field))
    return str(entry)
