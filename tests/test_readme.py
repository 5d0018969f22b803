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


# What it calls has tests of its own on every line of JAX.
@pytest.mark.once
def test_every_python_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where a block saves
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    generating, sampling, engine, *blocks = blocks
    assert len(blocks) == 6
    names = {}

    def run(block):
        exec(block, names)

    run(generating)
    assert [len(text) for text in names["texts"]] == [40, 40]
    assert '"""' in names["tokenizer"].decode(names["texts"][0])
    run(sampling)
    assert [result.finish_reason for result in names["results"]] == ["stop"] * 2
    assert capsys.readouterr().out.count("\n1 ")  # the second text's tokens came
    run(engine)
    for request, text in zip(names["requests"], names["texts"], strict=True):
        assert request.tokens == text
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


PUBLIC = [getattr(gdn_jax, name) for name in gdn_jax.__all__]
METHODS = [nn.GatedDeltaNet.__call__, gdn_jax.Engine.submit]


@pytest.mark.parametrize(
    "function",
    [*filter(inspect.isfunction, PUBLIC), *METHODS],
    ids=lambda function: function.__qualname__,
)
def test_help_begins_with_a_signature_to_be_read(function):
    """ArrayLike is a union of eight types, and expands where it is not a name."""
    assert "ndarray" not in str(inspect.signature(function))
