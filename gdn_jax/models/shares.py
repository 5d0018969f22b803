"""Which part of each parameter a device has, where devices share a model out.

A part is a model of its own with fewer heads, columns and experts. Where there are
fewer key heads than devices, each is several devices', as if the model had it as often.
"""

import dataclasses

from gdn_jax.models.config import Config
from gdn_jax.models.cover import Target
from gdn_jax.nn.split import Split
from gdn_jax.ops import checks
from gdn_jax.sharding.grid import Grid

Run = tuple[int, int]  # where it begins along an axis, and ends


def find_split(config: Config, grid: Grid) -> Split | None:
    """None where there is but one part.

    Raises:
      ValueError: the devices cannot share the model out.
    """
    kinds = set(config.layer_types)
    kinds |= {"full_attention"} if config.num_mtp_layers else set()
    layers = range(max(len(config.layer_types), config.num_mtp_layers))
    sparse = {config.is_sparse(i) for i in layers}
    names = set()

    def check(name: str, field: str, others: str | None = None) -> None:
        read_by = getattr(config, others) if others else 0
        grid.check(name, f"config.{field}", getattr(config, field), read_by)
        names.add(name)

    if "full_attention" in kinds:
        check("heads", "num_attention_heads")
        check("kv_heads", "num_key_value_heads", "num_attention_heads")
    if "linear_attention" in kinds:
        check("gdn_value_heads", "linear_num_value_heads")
        check("gdn_key_heads", "linear_num_key_heads", "linear_num_value_heads")
        names.add("gdn_channels")
    if False in sparse:
        check("mlp", "intermediate_size")
    if True in sparse:
        check("experts", "num_experts")
        check("mlp", "shared_expert_intermediate_size")
    over = {name: grid.over(name) for name in sorted(names)}
    if len(set(over.values())) > 1:
        remedy = "One sum over devices is for all heads, or all columns, of a layer."
        checks.fail("axes", over, "one mesh axis for all of these", remedy)
    axes, parts = over["mlp"], grid.parts("mlp")
    if parts == 1:
        return None
    vocab = grid.over("vocab") == axes and config.vocab_size % parts == 0
    return Split(axes, parts, vocab)


def own_config(config: Config, split: Split) -> Config:
    """Of a part: with the heads and columns that it has."""

    def own(size: int) -> int:
        return -(-size // split.parts)  # of fewer key heads than parts each has one

    return dataclasses.replace(
        config,
        num_attention_heads=own(config.num_attention_heads),
        num_key_value_heads=own(config.num_key_value_heads),
        linear_num_key_heads=own(config.linear_num_key_heads),
        linear_num_value_heads=own(config.linear_num_value_heads),
        intermediate_size=own(config.intermediate_size),
        shared_expert_intermediate_size=own(config.shared_expert_intermediate_size),
    )


def split_axis(path: str, target: Target, split: Split) -> int | None:
    """That of a parameter that the parts share; None: each has all of it."""
    if "router" in path.split("/"):
        return None  # every device chooses among all experts
    for name in ("experts", "vocab", "heads", "kv_heads", "mlp", *GDN):
        if name in target.names:
            is_whole = name == "vocab" and not split.vocab
            return None if is_whole else target.names.index(name)
    return None


GDN = ("gdn_key_heads", "gdn_value_heads", "gdn_channels")


def runs_of(
    path: str, target: Target, axis: int, config: Config, split: Split, part: int
) -> list[Run]:
    """What of `axis` a part has, one behind another."""
    name, size, parts = target.names[axis], target.shape[axis], split.parts
    H, HV = config.linear_num_key_heads, config.linear_num_value_heads
    K, V = config.linear_key_head_dim, config.linear_value_head_dim
    if name == "kv_heads":
        return [_heads(0, size, config.num_key_value_heads, part, parts)]
    if name == "gdn_channels":
        keys = [_heads(begin, H * K, H, part, parts) for begin in (0, H * K)]
        return [*keys, _heads(2 * H * K, HV * V, HV, part, parts)]
    if name != "gdn_key_heads" or H % parts == 0:
        return [_heads(0, size, parts, part, parts)]
    [(first, last)] = [_heads(0, size, H, part, parts)]
    names = path.split("/")
    if "qkvz" in names:
        groups = [(K, False), (K, False), (HV // H * V, True), (HV // H * V, True)]
    elif "ba" in names:
        groups = [(HV // H, True), (HV // H, True)]
    else:
        return [(first, last)]
    runs, shares = [], parts // H
    for width, is_of_values in groups:
        run = (first, first + width)
        if is_of_values:
            begin = first + width // shares * (part % shares)
            run = (begin, begin + width // shares)
        runs.append(run)
        first += width
    return runs


def _heads(begin: int, size: int, heads: int, part: int, parts: int) -> Run:
    """A part's of so many heads; of fewer than parts, the one that it reads."""
    each = size // heads
    first, count = part * heads // parts, max(heads // parts, 1)
    return begin + first * each, begin + (first + count) * each
