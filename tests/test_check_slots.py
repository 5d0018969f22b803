"""What `testing.check_slots` finds in a slot table, and what it lets pass."""

import re

import jax
import numpy as np
import pytest

from gdn_jax import testing

GOOD = np.array([[0, 5, 2], [-1, 4, 1]])


def test_a_good_slot_table_passes():
    testing.check_slots(GOOD, 6, num_accepted=np.array([1, 3]))


def test_the_null_slot_may_stand_in_many_places():
    testing.check_slots(np.array([0, 3, 0]), 4, null_slot=0)


@pytest.mark.parametrize(
    ("slots", "keywords", "text"),
    [
        (
            GOOD,
            dict(num_slots=5, num_accepted=[1, 1]),
            "row 0, column 1: slot 5 is outside [0, 5)",
        ),
        ([-2, 1], {}, "row 0, column 0: slot -2 is outside [0, 6)"),
        (GOOD, dict(num_accepted=[0, 1]), "row 0: num_accepted 0 is outside 1..3"),
        (GOOD, dict(num_accepted=[1, 4]), "row 1: num_accepted 4 is outside 1..3"),
        ([1, 2], dict(num_slots=-1), "num_slots must be an int >= 1; got -1"),
        ([2, 3, 2], {}, "slot 2 is given to (row, column) (0, 0), (2, 0)"),
        (
            [[2, 2]],
            dict(num_accepted=[1]),
            "slot 2 is given to (row, column) (0, 0), (0, 1)",
        ),
        ([1, 2], dict(cu_seqlens=[0, 3, 2]), "row 1: cu_seqlens falls from 3 to 2"),
        ([[2, 3]], {}, "slots must be [N] where num_accepted is None; got (1, 2)"),
        (2, {}, "slots must be [N] or [N, S]; got ()"),
        ([4.0, 4.5], {}, "slots must be of integers; got float64"),
        (GOOD, dict(num_accepted=[1]), "num_accepted must be [2], as slots has rows"),
        ([1, 2], dict(cu_seqlens=[0, 3]), "cu_seqlens must be [3], as slots has rows"),
    ],
)
def test_a_fault_in_a_slot_table_is_found(slots, keywords, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        testing.check_slots(slots, **dict(num_slots=6) | keywords)


def test_replay_may_accept_what_it_keeps_records_of():
    testing.check_slots([1, 2], 6, num_accepted=[3, 1])
    with pytest.raises(ValueError, match=r"num_accepted 0 is outside 1\.\."):
        testing.check_slots([1, 2], 6, num_accepted=[0, 1])


def test_a_row_that_pads_the_batch_has_no_counts():
    testing.check_slots([[0, 1], [-1, -1]], 6, num_accepted=[2, 0])


def test_under_jit_it_says_where_to_call_it():
    with pytest.raises(ValueError, match="Call check_slots on the host, outside jit"):
        jax.jit(lambda slots: testing.check_slots(slots, 6))(np.arange(3))


def test_every_fault_of_a_slot_table_is_counted():
    with pytest.raises(ValueError, match=r"(?s)30 faults.*and 10 more"):
        testing.check_slots(np.arange(30), 0)


def test_columns_that_no_token_writes_may_name_anything():
    table, rows = np.array([[0, 1, 99], [3, 0, 1]]), dict(num_accepted=[1, 1])
    with pytest.raises(ValueError, match=r"^slots has 3 faults"):
        testing.check_slots(table, 6, **rows)
    testing.check_slots(table, 6, **rows, cu_seqlens=[0, 2, 3])
    with pytest.raises(ValueError, match=r"1 fault:\s+slot 0 .* \(0, 0\), \(1, 1\)"):
        testing.check_slots(table, 6, **rows, cu_seqlens=[0, 1, 3])
