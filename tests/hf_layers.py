"""transformers' layers as fields and parameters of ours, compared module by module.

Needs no torch. A record (make_hf_goldens.py makes them) is a flat dict of arrays:

    config                 the layer's configuration, as JSON
    weights/<torch name>   its parameters
    <phase>/<module>       what modules were given and gave, in the phases "prefill"
                           and, with the cache that it left, "decode"
"""

import json

import flax
import jax
import jax.numpy as jnp

import gdn_jax
from gdn_jax import nn, testing

# Relative RMS: float32 against float32, added up in another order.
TOLERANCE = 2e-5

SIZES = dict(
    hidden_size="hidden_size",
    num_key_heads="linear_num_key_heads",
    num_value_heads="linear_num_value_heads",
    key_head_dim="linear_key_head_dim",
    value_head_dim="linear_value_head_dim",
    conv_width="linear_conv_kernel_dim",
)

GATES = {"A_log": "A_log", "dt_bias": "dt_bias", "conv1d": "conv_weight"}
QWEN = GATES | {"norm": "norm_weight", "out_proj": "out_proj"}
SEPARATE = GATES | {"o_norm": "norm_weight", "o_proj": "out_proj"}
SEPARATE |= {f"{x}_proj": f"in_proj/{x}" for x in "qkvb"}

# Our parameters' paths by transformers' names; "weight" and "kernel" are left out.
NAMES = {
    "qwen3_next": QWEN | {"in_proj_qkvz": "in_proj/qkvz", "in_proj_ba": "in_proj/ba"},
    "qwen3_5": QWEN | {f"in_proj_{x}": f"in_proj/{x}" for x in ("qkv", "z", "b", "a")},
    "olmo_hybrid": SEPARATE | {"a_proj": "in_proj/a", "g_proj": "in_proj/z"},
    "kimi_linear": SEPARATE
    | {
        "forget_gate.A_log": "A_log",
        "forget_gate.dt_bias": "dt_bias",
        "forget_gate.f_a_proj": "in_proj/a/down",
        "forget_gate.f_b_proj": "in_proj/a/up",
        "g_a_proj": "in_proj/z/down",
        "g_b_proj": "in_proj/z/up",
    },
}


def layer_of(model: str, config: dict) -> nn.GatedDeltaNet:
    if model == "kimi_linear":
        heads, dim = config["linear_num_heads"], config["linear_head_dim"]
        return nn.GatedDeltaNet(
            config["hidden_size"],
            num_key_heads=heads,
            num_value_heads=heads,
            key_head_dim=dim,
            value_head_dim=dim,
            conv_width=config["linear_conv_kernel_dim"],
            layout="separate",
            per_key_decay=True,
            gate_rank=dim,
            norm_eps=config["rms_norm_eps"],
            output_activation="sigmoid",
        )
    sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
    if model == "olmo_hybrid":
        doubled = config["linear_allow_neg_eigval"]
        return nn.GatedDeltaNet(
            **sizes, layout="separate", allow_neg_eigval=doubled, norm_eps=1e-5
        )
    layout = {"qwen3_next": "interleaved", "qwen3_5": "flat"}[model]
    return nn.GatedDeltaNet(**sizes, layout=layout, norm_eps=config["rms_norm_eps"])


def params_of(model: str, layer: nn.GatedDeltaNet, record: dict) -> dict:
    """Every weight is used once, in the shapes that the layer's own parameters have."""
    flat = {}
    for key, value in record.items():
        if not key.startswith("weights/"):
            continue
        name = key.removeprefix("weights/").removesuffix(".weight")
        path = NAMES[model][name]
        if name == "conv1d":
            value = value[:, 0]
        elif value.ndim == 2:
            value, path = value.T, f"{path}/kernel"
        elif path == "A_log":
            value = value.reshape(-1)
        elif path == "dt_bias" and layer.per_key_decay:
            value = value.reshape(layer.num_value_heads, layer.key_head_dim)
        assert path not in flat
        flat[path] = jnp.asarray(value)
    params = {"params": flax.traverse_util.unflatten_dict(flat, sep="/")}
    x = jnp.zeros((1, 1, layer.hidden_size))
    want = flax.linen.unbox(layer.init(jax.random.key(0), x))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, want)
    return params


def errors(model: str, record: dict, rule: str | None) -> dict[str, float]:
    """The relative error of each module's output, in prefill and in decoding."""
    layer = layer_of(model, json.loads(str(record["config"])))
    params = params_of(model, layer, record)
    found, state = {}, None
    for phase in ("prefill", "decode"):
        want = {
            key.removeprefix(f"{phase}/"): value
            for key, value in record.items()
            if key.startswith(f"{phase}/")
        }
        got, state = _run(model, layer, params, want.pop("x"), state, rule)
        # what is multiplied together has no call of its own to be seen in
        together = {
            f"projections/{name}"
            for name, place in NAMES[model].items()
            if place.startswith("in_proj/")
        }
        assert got.keys() <= want.keys() <= got.keys() | together
        found |= {
            f"{phase}/{module}": testing.relative_error(got[module], want[module])
            for module in got
        }
    return found


def _run(model, layer, params, x, state, rule):
    """Our call, its modules by the names of a record."""
    with jax.default_matmul_precision("highest"):  # a GPU's own is TF32
        (_, state), captured = layer.apply(
            params,
            jnp.asarray(x),
            state,
            path=rule,
            capture_intermediates=lambda module, method: True,
        )
    seen = captured["intermediates"]
    [(_, _, a, b)] = seen["in_proj"]["__call__"]
    [(conv, (q, k, v))] = seen["convolve"]
    [(recurrent, out)] = seen["update"]
    gates = params["params"]["A_log"], a, b, params["params"]["dt_bias"]
    log_decay, beta = gdn_jax.gates(*gates, allow_neg_eigval=layer.allow_neg_eigval)
    found = dict(q=q, k=k, v=v, log_decay=log_decay, beta=beta)
    found |= dict(out=out, recurrent=recurrent, conv=conv.to_dense(layer.conv_width))
    found |= dict(gate=seen["in_proj"]["__call__"][0].z, norm=seen["norm"][0])
    for name, place in NAMES[model].items():
        module = seen
        for step in place.split("/"):
            module = module.get(step, {})
        if "__call__" in module:
            [found[f"projections/{name}"]] = module["__call__"]
        elif "parts" in module:
            [parts] = module["parts"]
            found[f"projections/{name}"] = jnp.sum(parts, axis=0)
    return found, state
