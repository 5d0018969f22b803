"""The layer against transformers' own, recorded module by module (tests/data/hf_*).

parity_with_transformers.py compares them live, where torch is.
"""

import pathlib

import hf_layers
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parent / "data"


@pytest.mark.parametrize("rule", ["fused", "chunk"])
@pytest.mark.parametrize("model", hf_layers.NAMES)
def test_every_module_agrees(model, rule):
    with np.load(FOLDER / f"hf_{model}.npz") as file:
        record = dict(file)
    errors = hf_layers.errors(model, record, rule)
    assert len(errors) > 20
    wrong = {name: x for name, x in errors.items() if not x < hf_layers.TOLERANCE}
    assert not wrong
