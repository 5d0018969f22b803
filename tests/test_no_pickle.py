"""Nothing that is read is a program: no pickle, in the library or below it."""

import ast
import pathlib

import checkpoints
import numpy as np
import pytest

import gdn_jax
from gdn_jax import models

pytestmark = pytest.mark.once

saved = checkpoints.saved

REFUSED = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
REFUSED |= {"torch", "orbax"}  # whose files may be pickles
CALLS = {"eval", "exec", "compile", "__import__"}


def test_nothing_of_the_library_unpickles():
    """NumPy's archives may hold pickles too: it reads none."""
    root = pathlib.Path(gdn_jax.__file__).parent
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            roots = {name.partition(".")[0] for name in names}
            assert not roots & REFUSED, file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                assert called not in ("np.load", "numpy.load", "jnp.load"), file
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in CALLS, file
            if isinstance(node, ast.keyword):
                assert node.arg != "allow_pickle", file


def test_no_library_below_unpickles(saved, monkeypatch):
    """While a model is loaded, with Flax, safetensors and tokenizers beneath."""

    def fail(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", fail)
    monkeypatch.setattr(np, "load", fail)
    models.load(saved("next")[0])
