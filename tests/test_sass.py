"""The reader of what ptxas makes."""

import pytest
from sass import stale_selects

pytestmark = pytest.mark.once

FIRST = """
        /*00b0*/                   ISETP.NE.U32.AND P2, PT, R59, RZ, PT ;  /* 0x0 */
        /*0130*/                   SEL R72, RZ, 0x8000, !P2 ;
"""
AGAIN = "        /*9b50*/                   SEL R121, RZ, 0x8000, !P2 ;\n"


@pytest.mark.parametrize(
    ("between", "count"),
    [
        ("", 0),
        ("/*9b10*/ FSETP.GEU.AND P2, PT, R42, -126, PT ;\n", 1),
        ("/*9b10*/ @P0 FSETP.GEU.AND P1, P2, R42, -126, PT ;\n", 1),
        ("/*9b10*/ FSETP.GEU.AND P1, PT, R42, -126, P2 ;\n", 0),
        ("/*9b10*/ ISETP.NE.AND P2, PT, R69, RZ, PT ;\n", 0),
        (
            "/*9b10*/ FSETP.GEU.AND P2, PT, R42, -126, PT ;\n"
            "/*9b20*/ LOP3.LUT P2, RZ, R80, 0x1, RZ, 0xc0, !PT ;\n",
            0,
        ),
    ],
)
def test_a_select_made_again_from_another_predicate_is_found(between, count):
    assert len(stale_selects(FIRST + between + AGAIN)) == count


def test_a_select_by_a_comparison_of_floats_is_none():
    compares = "/*0510*/ FSETP.GT.AND P0, PT, R10, RZ, PT ;\n"
    select = "/*0530*/ SEL R10, RZ, 0x83000000, P0 ;\n"
    assert stale_selects(2 * (compares + select)) == []
