"""Any files of a model, whatever they hold: they load, or an error tells why."""

import json
import shutil

import checkpoints
import pytest
import untrusted
from hypothesis import given, settings
from hypothesis import strategies as st
from untrusted import SIZES, VALUES, bounded, read_header, write_header

from gdn_jax import models
from gdn_jax.models import Config, config_file, files

pytestmark = pytest.mark.once

saved = checkpoints.saved
unchecked = untrusted.unchecked

LIMITS = dict(derandomize=True, deadline=None, database=None)
NAME = "next with experts"
OF_A_TENSOR = (
    st.lists(st.sampled_from(SIZES[:-1]) | st.integers(0, 99), max_size=3)
    | st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3", "F4", "I8", "BOOL"])
    | VALUES
)


@st.composite
def changed(draw, found):
    """Bytes with a few others in them, and often a part of them gone."""
    found = bytearray(found)
    most = len(found) - 1
    places = st.integers(0, 7) | st.integers(0, min(4000, most)) | st.integers(0, most)
    for place in draw(st.lists(places, max_size=3)):
        found[place] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        begin, end = sorted(draw(st.tuples(places, places)))
        found[begin:end] = draw(st.binary(max_size=9))
    return bytes(found)


@pytest.fixture(scope="module")
def base(saved, tmp_path_factory):
    """A folder whose files the examples of a test take turns to break."""
    copies = tmp_path_factory.mktemp("untrusted")
    return shutil.copytree(saved(NAME)[0], copies / "model")


def loads_or_tells(folder):
    with bounded():
        try:
            models.load(folder)
        except ValueError as error:
            assert str(folder) in str(error) and len(str(error)) < 8000


@settings(max_examples=300, **LIMITS)
@given(data=st.data())
def test_any_config_is_read_or_refused(data, saved):
    config = json.loads((saved(NAME)[0] / "config.json").read_text())
    others = (*config_file.FIXED, *config_file.OTHER_KEYS, *config_file.ROPE_KEYS)
    keys = st.sampled_from([*config, *others, "text_config"]) | st.text(max_size=5)
    for key in data.draw(st.lists(keys, max_size=4)):
        config[key] = data.draw(VALUES)
    for key in data.draw(st.lists(st.sampled_from([*config]), max_size=2)):
        config.pop(key, None)
    with bounded():
        try:
            assert isinstance(Config.from_hf(config), Config)
        except ValueError as error:
            assert "config.json: " in str(error) and len(str(error)) < 8000


@settings(max_examples=200, **LIMITS)
@given(data=st.data())
def test_any_bytes_of_a_config_are_read_or_refused(data, saved, tmp_path_factory):
    found = (saved(NAME)[0] / "config.json").read_bytes()
    path = tmp_path_factory.getbasetemp() / "any_config.json"
    path.write_bytes(data.draw(changed(found)))
    with bounded():
        try:
            assert isinstance(Config.from_hf(path), Config)
        except ValueError as error:
            assert str(path) in str(error) and len(str(error)) < 8000


@settings(max_examples=25, **LIMITS)
@given(data=st.data())
def test_sizes_of_any_config_are_loaded_or_refused(data, saved, base):
    """Those that a model can have, so that it is the weights that refuse them."""
    before = (saved(NAME)[0] / "config.json").read_text()
    config = json.loads(before)
    sizes = [key for key, value in config.items() if type(value) is int]
    for key in data.draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=3)):
        config[key] = data.draw(st.sampled_from(SIZES[3:-2]) | st.integers(1, 2**28))
    (base / "config.json").write_text(json.dumps(config))
    try:
        loads_or_tells(base)
    finally:
        (base / "config.json").write_text(before)


@settings(max_examples=100, **LIMITS)
@given(data=st.data())
def test_any_header_is_read_or_refused(data, saved, base):
    header, behind = read_header(saved(NAME)[0] / files.SINGLE)
    names = st.sampled_from([*header])
    for name in data.draw(st.lists(names, max_size=3)):
        if name not in header:
            continue
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
        if field is None:
            header[data.draw(names | st.text(max_size=5))] = header.pop(name)
        else:
            header[name] = dict(header[name], **{field: data.draw(OF_A_TENSOR)})
    write_header(base / files.SINGLE, header, behind)
    loads_or_tells(base)


@settings(max_examples=100, **LIMITS)
@given(data=st.data())
def test_any_bytes_of_weights_are_read_or_refused(data, saved, base):
    found = (saved(NAME)[0] / files.SINGLE).read_bytes()
    (base / files.SINGLE).write_bytes(data.draw(changed(found)))
    loads_or_tells(base)
