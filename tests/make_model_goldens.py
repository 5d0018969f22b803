"""Makes tests/data/models/*: small checkpoints, and what transformers makes of them.

    python tests/make_model_goldens.py   # needs torch 2.13 and transformers 5.23

Folders as transformers saves them, in float32, with random weights, the multi-token
prediction head's among them, and a record that hf_models.py describes.
"""

import pathlib
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

FOLDER = pathlib.Path(__file__).parent / "data" / "models"
PROMPT = 71  # odd, and more than transformers' chunk of 64
GREEDY = 20
DRAFTS = 3
KEPT = (
    16  # of the prompt's tokens: the last ones, where modules and drafts are compared
)

SIZES = dict(
    vocab_size=64,
    hidden_size=28,
    layer_types=[
        "linear_attention",
        "linear_attention",
        "full_attention",
        "linear_attention",
        "full_attention",
    ],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    rope_parameters=dict(
        rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5
    ),
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=6,
    num_mtp_layers=1,
    mtp_layer_types=["full_attention"],
    bos_token_id=None,
    eos_token_id=[5, 9],
)
EXPERTS = dict(
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=10,
)
# Configuration and model by name, and sizes.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        SIZES | EXPERTS | dict(intermediate_size=20, mlp_only_layers=[1]),
    ),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        SIZES | dict(intermediate_size=40, tie_word_embeddings=True),
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        SIZES | EXPERTS | dict(linear_num_key_heads=1, linear_num_value_heads=3),
    ),
}
# What a head of one layer has beside the layer, in transformers and in checkpoints.
MTP = dict(
    enorm="pre_fc_norm_embedding",
    hnorm="pre_fc_norm_hidden",
    eh_proj="fc",
    post_norm="norm",
)


def make(folder: pathlib.Path, name: str, sizes: dict[str, Any], seed: int) -> None:
    """A checkpoint and its record; both are made of what transformers reads again."""
    torch.manual_seed(seed)
    config_name, model_name, _ = MODELS[name]
    model_type = getattr(transformers, model_name)
    config = getattr(transformers, config_name)(
        num_hidden_layers=len(sizes["layer_types"]), **sizes
    )
    model = model_type(config)
    head = MtpModel(model, 1)
    _randomise(model)
    _randomise(head.layers)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors |= _head_tensors(head, split=name == "qwen3_next")
    safetensors.torch.save_file(tensors, file, metadata=dict(format="pt"))
    model = model_type.from_pretrained(folder, attn_implementation="eager").eval()
    found = _run(model, MtpModel.from_pretrained(model).eval())
    np.savez_compressed(
        folder / "record.npz", **{name: x.numpy() for name, x in found.items()}
    )


@torch.no_grad()
def _randomise(module: torch.nn.Module) -> None:
    """Gates of every strength, and no weight that a wrong model could do without."""
    for name, weight in module.named_parameters():
        if name.endswith("A_log"):
            weight.uniform_(-4, 2)
        elif name.endswith("dt_bias"):
            weight.normal_()
        elif name.endswith("linear_attn.norm.weight"):
            weight.normal_(1, 0.3)
        elif weight.ndim == 1:  # a norm's, zero-centred
            weight.normal_(0, 0.3)
        elif name.endswith("mlp.gate.weight"):  # a router that prefers
            weight.normal_(0, 2 * weight.shape[-1] ** -0.5)
        else:
            weight.normal_(0, weight.shape[-1] ** -0.5)


def _head_tensors(head: MtpModel, split: bool) -> dict[str, torch.Tensor]:
    """Under a checkpoint's names; with `split`, a tensor for each expert."""
    found = {}
    for name, tensor in head.layers[0].state_dict().items():
        block, _, rest = name.partition(".")
        path, _, kind = f"mtp.layers.0.{rest}".rpartition(".")
        if block in MTP:
            found[f"mtp.{MTP[block]}.{rest}"] = tensor
        elif split and path.endswith("experts"):
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            for expert, weights in enumerate(tensor):
                for part, weight in zip(kinds, weights.chunk(len(kinds)), strict=True):
                    found[f"{path}.{expert}.{part}.weight"] = weight.contiguous()
        else:
            found[f"{path}.{kind}"] = tensor
    return found


@torch.no_grad()
def _run(model: Any, head: MtpModel) -> dict[str, torch.Tensor]:
    """The arrays of a record."""
    tokens = torch.randint(model.config.vocab_size, (1, PROMPT))
    cache = transformers.DynamicCache(config=model.config)
    call = dict(past_key_values=cache, use_cache=True)
    outputs, logits = _outputs(model, tokens, **call)
    found = {f"modules/{name}": x[:, -KEPT:] for name, x in outputs.items()}
    found |= _draft(head, tokens, outputs["norm"])
    logits = [logits]
    for _ in range(GREEDY):
        tokens = torch.cat([tokens, logits[-1][:, -1:].argmax(-1)], dim=1)
        logits.append(model(tokens[:, -1:], **call).logits)
    return found | dict(
        tokens=tokens, logits=torch.cat(logits, dim=1), prompt=torch.tensor(PROMPT)
    )


def _outputs(
    model: Any, tokens: torch.Tensor, **call: Any
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the modules gave, and the logits."""
    found = {}
    modules = dict(embed=model.model.embed_tokens, norm=model.model.norm)
    modules |= {f"layers_{i}": layer for i, layer in enumerate(model.model.layers)}
    hooks = [
        module.register_forward_hook(
            lambda _, given, out, name=name: found.update({name: out})
        )
        for name, module in modules.items()
    ]
    logits = model(tokens, **call).logits
    for hook in hooks:
        hook.remove()
    return found, logits


def _draft(
    head: MtpModel, tokens: torch.Tensor, hidden: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Two drafts for each token of whole sequences; then a chain behind the last."""

    def step(hidden, tokens, cache, first=0):
        # transformers counts a draft's position from that of its token
        positions = first + 1 + torch.arange(tokens.shape[1])[None]
        out = head.forward_layer(0, hidden, positions, cache, input_ids=tokens)
        return out, head._project_to_logits(out)

    once, first = step(hidden[:, :-1], tokens[:, 1:], None)
    _, second = step(once[:, :-1], tokens[:, 2:], None)
    cache = MtpCache(config=head.config)
    hidden, logits = step(hidden[:, :-1], tokens[:, 1:], cache)
    chain, drafts = [logits[:, -1:]], []
    for i in range(DRAFTS):
        drafts.append(chain[-1].argmax(-1))
        hidden, logits = step(
            hidden[:, -1:], drafts[-1], cache, tokens.shape[1] - 1 + i
        )
        chain.append(logits)
    return {
        "mtp/first": first[:, -KEPT:],
        "mtp/second": second[:, -KEPT:],
        "mtp/chain": torch.cat(chain, dim=1),
        "mtp/drafts": torch.cat(drafts, dim=1),
    }


def main() -> None:
    for name, (_, _, sizes) in MODELS.items():
        make(FOLDER / name, name, sizes, seed=0)
        size = sum(path.stat().st_size for path in (FOLDER / name).iterdir())
        print(FOLDER / name, size)


if __name__ == "__main__":
    main()
