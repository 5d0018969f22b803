"""Whether devices can share a model out, and what a part of it is."""

import dataclasses
from typing import Any

from gdn_jax.models.config import Config
from gdn_jax.nn.split import Split
from gdn_jax.ops import checks
from gdn_jax.sharding.grid import Axis, Grid


def find_split(config: Config, grid: Grid) -> Split | None:
    """None where there is but one part.

    Raises:
      ValueError: the devices cannot share the model out.
    """
    kinds, sparse = _kinds(config)
    shared: list[Axis] = []

    def add(name: str, field: str, others: str | None = None) -> None:
        read_by = getattr(config, others) if others else 0
        shared.append(Axis(name, f"config.{field}", getattr(config, field), read_by))

    if "full_attention" in kinds:
        add("heads", "num_attention_heads")
        add("kv_heads", "num_key_value_heads", "num_attention_heads")
    if "linear_attention" in kinds:
        add("gdn_value_heads", "linear_num_value_heads")
        add("gdn_key_heads", "linear_num_key_heads", "linear_num_value_heads")
    if False in sparse:
        add("mlp", "intermediate_size")
    if True in sparse:
        add("experts", "num_experts")
        add("mlp", "shared_expert_intermediate_size")
    grid.check(*shared)
    names = {axis.name for axis in shared}
    if "linear_attention" in kinds:
        names.add("gdn_channels")
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

    kinds, sparse = _kinds(config)
    fields: list[str] = []
    if "full_attention" in kinds:
        fields += ["num_attention_heads", "num_key_value_heads"]
    if "linear_attention" in kinds:
        fields += ["linear_num_key_heads", "linear_num_value_heads"]
    if False in sparse:
        fields.append("intermediate_size")
    if True in sparse:
        fields.append("shared_expert_intermediate_size")

    def own(size: int) -> int:
        return -(-size // split.parts)  # of fewer key heads than parts each has one

    parts: dict[str, Any] = {name: own(getattr(config, name)) for name in fields}
    return dataclasses.replace(config, **parts)


def _kinds(config: Config) -> tuple[set[str], set[bool]]:
    """Of mixers; and whether MLPs are of experts."""
    kinds = set(config.layer_types)
    kinds |= {"full_attention"} if config.num_mtp_layers else set()
    layers = range(max(len(config.layer_types), config.num_mtp_layers))
    return kinds, {config.is_sparse(i) for i in layers}
