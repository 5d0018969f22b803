"""The smallest heads compile for an H200: Triton's compiler crashes on some shapes of
few values, and takes the process with it."""

import aot
import op_calls
import pytest

SIZES = [(1, 1), (1, 7), (8, 1)]


@pytest.mark.parametrize("name", op_calls.OPS)
@pytest.mark.parametrize(("K", "V"), SIZES)
def test_small_heads_compile(name, K, V, monkeypatch):
    monkeypatch.setattr(op_calls, "K", K)
    monkeypatch.setattr(op_calls, "V", V)
    call, arguments = op_calls.OPS[name](8, 3, 2)
    compiled = aot.compile_for_h200(call, *arguments, donate_argnums=0)
    assert any(aot.KERNEL_CALL in launch for launch in compiled.launches())
    assert compiled.resources()["spills"] == 0
