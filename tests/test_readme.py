"""The README's code runs, in order, as printed."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_every_python_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["out"].shape == (3, 4, 4, 64)
    assert names["out"].any()
    assert names["y"].shape == (1, 1, 256) and names["y"].any()
