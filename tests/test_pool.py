"""The slot allocator, and copies between slots."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import gdn_jax


def test_slots_have_one_owner_until_freed():
    pool = gdn_jax.SlotPool(5, null_slot=0)
    assert pool.alloc("a", 3) == [1, 2, 3]
    assert pool.alloc("b") == [4]
    assert pool.num_free == 0
    assert pool.free("a", [2]) == [2]
    assert pool.slots("a") == [1, 3]
    assert pool.alloc("b") == [2]
    assert sorted(pool.free("a") + pool.free("b")) == [1, 2, 3, 4]
    assert pool.owners == ()
    assert pool.num_free == 4


def test_alloc_gives_all_or_nothing():
    pool = gdn_jax.SlotPool(3)
    with pytest.raises(ValueError, match=r"wants 4 slots and 3 of 3 are free"):
        pool.alloc("a", 4)
    assert pool.num_free == 3
    assert pool.owners == ()
    with pytest.raises((TypeError, jaxtyping.TypeCheckError)):
        pool.alloc(["a"])  # not hashable
    assert pool.alloc("a", 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda pool: pool.free("b"), "'b' owns no slots"),
        (lambda pool: pool.slots("b"), "'b' owns no slots"),
        (lambda pool: pool.free("a", [1]), r"its slots \[0\] once; got \[1\]"),
        (lambda pool: pool.free("a", [0, 0]), r"got \[0, 0\]"),
        (lambda pool: pool.alloc("a", 0), "count must be an int >= 1; got 0"),
    ],
)
def test_wrong_calls_change_nothing(call, text):
    pool = gdn_jax.SlotPool(2)
    pool.alloc("a")
    with pytest.raises(ValueError, match=text):
        call(pool)
    assert pool.slots("a") == [0]
    assert pool.num_free == 1


def test_pool_checks_its_sizes():
    with pytest.raises(ValueError, match="null_slot must be one of the 2 slots"):
        gdn_jax.SlotPool(2, null_slot=2)
    for size in (0, -1):
        text = rf"num_slots must be an int >= 1; got {size}\. It is P"
        with pytest.raises(ValueError, match=text):
            gdn_jax.SlotPool(size)


def test_copies_are_simultaneous_and_skip_null_slots():
    state = np.arange(12, dtype=np.float32).reshape(4, 3)
    src, dst = np.array([0, 1, 9, 2], np.int32), np.array([1, 0, 2, -1], np.int32)
    copied = jax.jit(gdn_jax.copy_slots, donate_argnums=0)(jnp.array(state), src, dst)
    assert np.array_equal(copied, state[[1, 0, 2, 3]])


def test_copies_every_pool_of_a_tree():
    tree = {"a": jnp.arange(3.0), "b": jnp.arange(6).reshape(3, 2)}
    copied = gdn_jax.copy_slots(tree, jnp.array([2]), jnp.array([0]))
    assert copied["a"].tolist() == [2, 1, 2]
    assert copied["b"].tolist() == [[4, 5], [2, 3], [4, 5]]


def test_an_empty_pool_is_left_alone():
    slots = jnp.zeros(2, jnp.int32)
    assert gdn_jax.copy_slots(jnp.zeros((0, 3)), slots, slots).shape == (0, 3)


@pytest.mark.parametrize(
    ("src", "dst", "text"),
    [
        (np.zeros(2, np.float32), np.zeros(2, np.int32), "src must be .* float32"),
        (np.zeros(2, np.int32), np.zeros((1, 2), np.int32), r"dst must be .*\(1, 2\)"),
        (np.zeros(2, np.int32), np.zeros(3, np.int32), "of one length"),
    ],
)
def test_copy_checks_its_slots(src, dst, text):
    with pytest.raises(ValueError, match=text):
        gdn_jax.copy_slots(jnp.zeros((4, 1)), src, dst)


@pytest.mark.parametrize("other", [jnp.zeros((3, 1)), 1.0])
def test_pools_of_other_sizes_are_not_copied_in_part(other):
    slots = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"state must be pools .* of one P; got"):
        gdn_jax.copy_slots((jnp.zeros((4, 1)), other), slots, slots)


def test_a_pool_on_the_host_is_copied_too():
    copied = gdn_jax.copy_slots(np.arange(3.0), np.int32([2]), np.int32([0]))
    assert copied.tolist() == [2, 1, 2]
