"""The README's code runs, in order, as printed."""

import inspect
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from gdn_jax import nn

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_every_python_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    generating, *blocks = blocks
    assert len(blocks) == 6
    names = {}

    def run(block):
        exec(block, names)

    run(generating)
    assert [len(text) for text in names["texts"]] == [40, 40]
    assert '"""' in names["tokenizer"].decode(names["texts"][0])
    for block in blocks[:3]:
        run(block)
    assert names["out"].shape == (3, 4, 4, 64) and names["out"].any()
    run(blocks[3])
    assert names["y"].shape == (1, 1, 256) and names["y"].any()
    run(blocks[4])
    _, after = names["train"](names["params"], names["x"], jnp.roll(names["x"], -1, 1))
    assert after < names["before"]
    run(blocks[5])
    assert names["out"].shape == (3, 100, 4, 64) and np.isfinite(names["out"]).all()


OPS = [getattr(gdn_jax, name) for name in gdn_jax.__all__ if name != "generate"]


@pytest.mark.parametrize(
    "function", [*filter(inspect.isfunction, OPS), nn.GatedDeltaNet.__call__]
)
def test_help_begins_with_a_signature_to_be_read(function):
    """ArrayLike is a union of eight types, and expands where it is not a name."""
    assert "ndarray" not in str(inspect.signature(function))
