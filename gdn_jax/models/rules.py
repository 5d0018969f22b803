"""Which tensors of a checkpoint make which parameter: one table, for load and save."""

import dataclasses
import functools
import re

import numpy as np

Region = tuple[slice, ...]

# A `Dense` has [in, out], torch's Linear [out, in].
TRANSPOSED = (1, 0)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor, and the part of a parameter that it is.

    Attributes:
      target: the parameter's path in the model; {layer} is a number.
      source: the tensor's name; {layer} as in the path, and {expert} means one tensor
        for each expert, which lie along the parameter's first axis.
      axes: for each axis of the parameter, which of the tensor's it is; None for the
        experts', which the tensor does not have. Axes of the tensor that are not named
        have length 1. Without any, both are alike.
      half: 0 or 1 for a tensor that is half of the parameter's last axis.
      fused: whether the source has all experts, where both kinds are known.
    """

    target: str
    source: str
    axes: tuple[int | None, ...] | None = None
    half: int | None = None
    fused: bool | None = None

    def sources(self, target: str, shape: tuple[int, ...]) -> list["Source"]:
        """The tensors of a parameter; none if the rule is not about it."""
        match = _pattern(self.target).fullmatch(target)
        if match is None:
            return []
        axes = tuple(range(len(shape))) if self.axes is None else self.axes
        whole = [slice(0, size) for size in shape]
        if self.half is not None:
            middle = shape[-1] // 2
            whole[-1] = slice(self.half * middle, (self.half + 1) * middle)
        if "{expert}" not in self.source:
            return [Source(self.source.format(**match.groupdict()), tuple(whole), axes)]
        return [
            Source(
                self.source.format(expert=expert, **match.groupdict()),
                (slice(expert, expert + 1), *whole[1:]),
                axes,
            )
            for expert in range(shape[0])
        ]


@functools.cache
def _pattern(target: str) -> re.Pattern[str]:
    pattern = re.escape(target).replace(r"\{layer\}", r"(?P<layer>\d+)")
    return re.compile(pattern)


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor's name, and where in the parameter it lies.

    Attributes:
      name: the tensor's.
      region: of the parameter.
      axes: as in `Rule`, never None.
    """

    name: str
    region: Region
    axes: tuple[int | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        sizes = [part.stop - part.start for part in self.region]
        return tuple(1 if axis is None else sizes[axis] for axis in self._order())

    def index(self, part: Region) -> Region:
        """Where in the tensor a part of the region is; `part` counts from its start."""
        return tuple(
            slice(0, 1) if axis is None else part[axis] for axis in self._order()
        )

    def to_target(self, x: np.ndarray) -> np.ndarray:
        """The tensor, or a part of it, along the parameter's axes."""
        kept = [axis for axis in self.axes if axis is not None]
        rest = [axis for axis in range(x.ndim) if axis not in kept]
        shape = [1 if axis is None else x.shape[axis] for axis in self.axes]
        return x.transpose(*kept, *rest).reshape(shape)

    def to_source(self, x: np.ndarray) -> np.ndarray:
        """The tensor, of a whole parameter."""
        order = [axis for axis in self._order() if axis is not None]
        rest = [axis for axis in range(x.ndim) if axis not in order]
        return x[self.region].transpose(*order, *rest).reshape(self.shape)

    def _order(self) -> list[int | None]:
        """For each axis of the tensor, which of the parameter's it is, if any."""
        rank = max(axis for axis in self.axes if axis is not None) + 1
        return [
            self.axes.index(axis) if axis in self.axes else None for axis in range(rank)
        ]


def _dense(target: str, source: str) -> Rule:
    return Rule(f"{target}/kernel", f"{source}.weight", TRANSPOSED)


# A layer's, behind its prefix. The published checkpoints of Qwen3-Next have a tensor
# for each expert, those of Qwen3.5 one for all.
LAYER = (
    Rule("mixer_norm/weight", "input_layernorm.weight"),
    Rule("mlp_norm/weight", "post_attention_layernorm.weight"),
    # Gated DeltaNet
    _dense("mixer/in_proj/qkvz", "linear_attn.in_proj_qkvz"),
    _dense("mixer/in_proj/ba", "linear_attn.in_proj_ba"),
    _dense("mixer/in_proj/qkv", "linear_attn.in_proj_qkv"),
    _dense("mixer/in_proj/z", "linear_attn.in_proj_z"),
    _dense("mixer/in_proj/b", "linear_attn.in_proj_b"),
    _dense("mixer/in_proj/a", "linear_attn.in_proj_a"),
    Rule("mixer/conv_weight", "linear_attn.conv1d.weight", (0, 2)),  # [C, 1, W]
    Rule("mixer/A_log", "linear_attn.A_log"),
    Rule("mixer/dt_bias", "linear_attn.dt_bias"),
    Rule("mixer/norm_weight", "linear_attn.norm.weight"),
    _dense("mixer/out_proj", "linear_attn.out_proj"),
    # attention
    _dense("mixer/q", "self_attn.q_proj"),
    _dense("mixer/k", "self_attn.k_proj"),
    _dense("mixer/v", "self_attn.v_proj"),
    _dense("mixer/out", "self_attn.o_proj"),
    Rule("mixer/q_norm/weight", "self_attn.q_norm.weight"),
    Rule("mixer/k_norm/weight", "self_attn.k_norm.weight"),
    # MLP
    _dense("mlp/gate", "mlp.gate_proj"),
    _dense("mlp/up", "mlp.up_proj"),
    _dense("mlp/down", "mlp.down_proj"),
    # mixture of experts: [E, D, 2F] and [E, F, D] of [2F, D] and [D, F]
    _dense("mlp/router", "mlp.gate"),
    Rule(
        "mlp/experts_gate_up",
        "mlp.experts.{expert}.gate_proj.weight",
        (None, 1, 0),
        half=0,
        fused=False,
    ),
    Rule(
        "mlp/experts_gate_up",
        "mlp.experts.{expert}.up_proj.weight",
        (None, 1, 0),
        half=1,
        fused=False,
    ),
    Rule(
        "mlp/experts_down",
        "mlp.experts.{expert}.down_proj.weight",
        (None, 1, 0),
        fused=False,
    ),
    Rule("mlp/experts_gate_up", "mlp.experts.gate_up_proj", (0, 2, 1), fused=True),
    Rule("mlp/experts_down", "mlp.experts.down_proj", (0, 2, 1), fused=True),
    _dense("mlp/shared/gate", "mlp.shared_expert.gate_proj"),
    _dense("mlp/shared/up", "mlp.shared_expert.up_proj"),
    _dense("mlp/shared/down", "mlp.shared_expert.down_proj"),
    _dense("mlp/shared_gate", "mlp.shared_expert_gate"),
)


def _layer(target: str, source: str) -> tuple[Rule, ...]:
    return tuple(
        dataclasses.replace(
            rule, target=target + rule.target, source=source + rule.source
        )
        for rule in LAYER
    )


RULES = (
    Rule("embed/embedding", "model.embed_tokens.weight"),
    *_layer("layers_{layer}/", "model.layers.{layer}."),
    Rule("norm/weight", "model.norm.weight"),
    _dense("head", "lm_head"),
    _dense("mtp/fc", "mtp.fc"),
    Rule("mtp/embedding_norm/weight", "mtp.pre_fc_norm_embedding.weight"),
    Rule("mtp/hidden_norm/weight", "mtp.pre_fc_norm_hidden.weight"),
    *_layer("mtp/layers_{layer}/", "mtp.layers.{layer}."),
    Rule("mtp/norm/weight", "mtp.norm.weight"),
)

# What encodes pictures is no part of a text model.
IGNORED = (r"(model\.)?visual\..+",)
# With tied embeddings a head is the embedding once more.
IGNORED_IF_TIED = (r"lm_head\.weight",)


def canonical(name: str) -> str:
    """A tensor's name as the rules have it: a multimodal checkpoint's text model is one
    level down."""
    return re.sub(r"^(model\.)?language_model\.", r"\1", name)


def is_ignored(name: str, tied: bool) -> bool:
    patterns = IGNORED + (IGNORED_IF_TIED if tied else ())
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def count_mtp_layers(names: list[str]) -> int:
    found = (re.match(r"mtp\.layers\.(\d+)\.", name) for name in names)
    return len({match[1] for match in found if match})


def sources_of(target: str, shape: tuple[int, ...], fused: bool) -> list[Source]:
    """The tensors that make a parameter, its experts in one tensor or in one each."""
    return [
        source
        for rule in RULES
        if rule.fused in (None, fused)
        for source in rule.sources(target, shape)
    ]
