"""Trees in a file: whole, exact, and refused where they are of something else."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn_jax import _trees


class Pair(NamedTuple):
    left: object
    right: object


def _tree():
    keys = jax.random.split(jax.random.key(7, impl="threefry2x32"), (2, 3))
    kinds = jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8, jnp.bool_
    arrays = {
        dtype.__name__: jnp.arange(6).reshape(2, 3).astype(dtype) for dtype in kinds
    }
    scalars = jnp.int32(3), jnp.float32(-0.0), jax.random.key(1, impl="rbg")
    transposed = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    odd = jnp.array([jnp.nan, jnp.inf, 1e-45])
    return Pair(
        dict(keys=keys, arrays=arrays, none=None),
        [scalars, (jnp.zeros((0, 2)), transposed, odd)],
    )


def _equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(x, jax.Array)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(x) == jax.random.key_impl(y)
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_what_is_saved_is_loaded(tmp_path):
    path, tree = tmp_path / "deep" / "tree.safetensors", _tree()
    notes = dict(step=3, text='"é\n', loss=float("inf"), list=[1, None])
    _trees.save(path, tree, notes)
    for like in (tree, jax.eval_shape(lambda: tree)):
        got, got_notes = _trees.load(path, like)
        _equal(got, tree)
        assert got_notes == _trees.load_notes(path) == notes
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tree"
    _trees.save(path, dict(x=jnp.ones(3)), dict(step=1))

    def cut(arrays, beside, metadata):
        beside.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.numpy.save_file", cut)
    with pytest.raises(OSError, match="no space left"):
        _trees.save(path, dict(x=jnp.zeros(3)), dict(step=2))
    got, notes = _trees.load(path, dict(x=jnp.zeros(3)))
    assert got["x"].tolist() == [1, 1, 1] and notes == dict(step=1)


def test_every_difference_is_listed(tmp_path):
    path = tmp_path / "tree"
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 3)
    tree = dict(a=jnp.ones(2), b=jnp.ones(2), c=jnp.ones(()), keys=keys)
    _trees.save(path, tree, {})
    like = dict(a=jnp.ones(3), b=jnp.ones(2, jnp.int32), keys=keys[:2], new=[keys])
    with pytest.raises(ValueError, match="of another model or of other sizes") as error:
        _trees.load(path, like)
    for text in (
        "c is not expected",
        "a is float32[2], wanted float32[3]",
        "b is float32[2], wanted int32[2]",
        "keys is uint32[3, 2], wanted uint32[2, 2]",
        "new/0 is missing",
    ):
        assert text in str(error.value)


def test_other_files_are_told(tmp_path):
    path = tmp_path / "tree"
    with pytest.raises(FileNotFoundError, match="nothing was saved there"):
        _trees.load(path, {})
    _trees.save(path, dict(x=jnp.ones(3)), {})
    path.write_bytes(path.read_bytes()[:-4])
    for call in (
        _trees.load_notes,
        lambda path: _trees.load(path, dict(x=jnp.ones(3))),
    ):
        with pytest.raises(ValueError, match="cut off or no safetensors file"):
            call(path)


def test_another_programs_file_has_no_notes(tmp_path):
    from safetensors.numpy import save_file

    save_file(dict(x=np.ones(3, np.float32)), tmp_path / "tree")
    got, notes = _trees.load(tmp_path / "tree", dict(x=jnp.ones(3)))
    assert got["x"].tolist() == [1, 1, 1] and notes == {}
