"""What the docstrings of public names show can be typed in."""

import doctest
import inspect

import pytest

import gdn_jax
from gdn_jax import models, nn, sharding

NAMES = {
    f"{module.__name__}.{name}": inspect.getdoc(getattr(module, name)) or ""
    for module in (gdn_jax, nn, models, sharding)
    for name in getattr(module, "__all__", vars(module))
    if not name.startswith("_")
}
WITH_EXAMPLES = [name for name, text in NAMES.items() if ">>>" in text]


def test_what_users_begin_with_has_examples():
    ops = "fused", "chunk", "recurrent", "replay"
    wanted = {f"gdn_jax.{name}_update" for name in ops}
    others = "causal_conv1d", "grouped_dot", "SlotPool", "generate", "Engine"
    wanted |= {f"gdn_jax.{name}" for name in others}
    wanted |= {"gdn_jax.nn.GatedDeltaNet", "gdn_jax.models.load"}
    wanted |= {"gdn_jax.sharding.split", "gdn_jax.models.ShardedModel"}
    assert wanted <= set(WITH_EXAMPLES)


# What they call has tests of its own on every line of JAX.
@pytest.mark.once
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_an_example_holds(name):
    parser = doctest.DocTestParser()
    example = parser.get_doctest(NAMES[name], {}, name, None, 0)
    assert doctest.DocTestRunner().run(example).failed == 0
