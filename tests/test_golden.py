"""vLLM's own inputs and outputs (tests/data), on every implementation.

Made on an H200 by vLLM 0.33's fused_sigmoid_gating_delta_rule_update (Triton). It
leaves `out` of null rows unwritten: live rows are compared, ours are zero elsewhere.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from gdn_jax import testing

FILE = pathlib.Path(__file__).parent / "data" / "vllm_fused_sigmoid_gating.npz"
ARRAYS = ("state", "q", "k", "v", "A_log", "a", "b", "dt_bias")


def _cases() -> dict[str, dict[str, np.ndarray]]:
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(FILE) as file:
        for key in file.files:
            case, field = key.split("/")
            cases.setdefault(case, {})[field] = file[key]
    return cases


CASES = _cases()


def _array(x: np.ndarray) -> jnp.ndarray:
    """bfloat16 is stored as its bits."""
    return jnp.asarray(x.view(jnp.bfloat16) if x.dtype == np.uint16 else x)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_vllm(name, path):
    case = CASES[name]
    args = [_array(case[field]) for field in ARRAYS]
    kwargs = {k: jnp.asarray(case[k]) for k in ("slots", "num_accepted") if k in case}
    state, out = gdn_jax.fused_update(
        *args,
        **kwargs,
        cu_seqlens=jnp.asarray(case["cu_seqlens"]),
        scale=float(case["scale"]),
        softplus_beta=float(case["softplus_beta"]),
        softplus_threshold=float(case["softplus_threshold"]),
        qk_l2norm=bool(case["l2norm"]),
        implementation=path,
    )

    before, want = args[0], _array(case["final_state"])
    changed = (np.asarray(want) != np.asarray(before)).any((1, 2, 3))
    assert changed.any()
    assert np.array_equal(np.asarray(state)[~changed], np.asarray(before)[~changed])
    error = testing.relative_error(state[changed], want[changed])
    assert error < testing.TOLERANCE["state", state.dtype.name]

    live = case["live_rows"]
    if len(live) != len(out):  # one entry a row
        live = np.repeat(live, np.diff(case["cu_seqlens"]))
    want = np.asarray(_array(case["out"]))
    error = testing.relative_error(np.asarray(out)[live], want[live])
    assert error < testing.TOLERANCE["out", out.dtype.name]
    assert not np.asarray(out)[~live].any()
