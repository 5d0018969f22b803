"""Weights and their index by someone who wishes ill: an error each, at once."""

import shutil
import struct

import checkpoints
import pytest
import untrusted
from checkpoints import EMBEDDING, edit_json
from untrusted import read_header, refused, write_header

from gdn_jax import models
from gdn_jax.models import files

pytestmark = pytest.mark.once

saved, copied = checkpoints.saved, checkpoints.copied
unchecked = untrusted.unchecked


def first(change):
    """Changes the first tensor's entry of a header."""

    def edit(header):
        name = next(name for name in header if name != "__metadata__")
        change(header[name])

    return edit


def put(**fields):
    return first(lambda entry: entry.update(fields))


def overlap(header):
    header[EMBEDDING]["data_offsets"] = header["lm_head.weight"]["data_offsets"]


def tensor(name, **fields):
    entry = dict(dtype="F32", shape=[0], data_offsets=[0, 0]) | fields
    return lambda header: header.update({name: entry})


HEADERS = {
    "a shape of 2^124": put(shape=[2**62, 2**62]),
    "a shape of 2^63": put(shape=[2**63]),
    "a shape of 2^64": put(shape=[2**64]),
    "a shape of nothing, times 2^63": put(shape=[0, 2**63]),
    "a shape of a million axes": put(shape=[1] * 10**6),
    "a negative shape": put(shape=[-1]),
    "a broken shape": put(shape=[1.5]),
    "a shape of text": put(shape="16"),
    "no shape": first(lambda entry: entry.pop("shape")),
    "an unknown dtype": put(dtype="F1"),
    "a dtype that is a number": put(dtype=32),
    "a wider dtype": put(dtype="F64"),
    "offsets past the end": put(data_offsets=[0, 10**9]),
    "offsets past all ends": put(data_offsets=[0, 2**64 - 1]),
    "negative offsets": put(data_offsets=[-4, 0]),
    "offsets that fall": put(data_offsets=[100, 0]),
    "three offsets": put(data_offsets=[0, 1, 2]),
    "offsets that overlap": overlap,
    "a hole": tensor("stranger", shape=[1], data_offsets=[10**6, 10**6 + 4]),
    "metadata that is a list": lambda header: header.update(__metadata__=[]),
    "nested metadata": lambda header: header.update(__metadata__=dict(a={})),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_headers_that_lie(copied, fault):
    folder = copied("next")
    header, data = read_header(folder / files.SINGLE)
    HEADERS[fault](header)
    write_header(folder / files.SINGLE, header, data)
    with refused(folder, "1 broken or absent files", f"{files.SINGLE} ("):
        models.load(folder)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        bytes(8),
        b"\xff" * 8,
        struct.pack("<Q", 10**6) + b"{}",
        struct.pack("<Q", 99 * 10**6) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b'{"\xff"',
        struct.pack("<Q", 10**5) + b"[" * 10**5,
        struct.pack("<Q", 5 * 10**5) + b'{"a":' * 10**5,
    ],
    ids=lambda data: str(data[:12]),
)
def test_files_without_a_header(copied, data):
    folder = copied("next")
    (folder / files.SINGLE).write_bytes(data)
    with refused(folder, "1 broken or absent files", f"{files.SINGLE} ("):
        models.load(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put(dtype="I32"), "lm_head.weight I32"),
        (tensor("x" * 10**6), "1 tensors that are not of this model: xxx"),
        (tensor("\x1b[31mred\n"), r"\x1b[31mred\n"),
        (lambda header: [tensor(f"x{i}")(header) for i in range(10**4)], "9980 more"),
        (
            lambda header: [tensor(f"mtp.layers.{i}.x")(header) for i in range(3000)],
            "num_mtp_layers is 3000, wanted 0 to 1000",
        ),
    ],
    ids=["integers", "a long name", "a name for a terminal", "names", "MTP layers"],
)
def test_tensors_that_no_model_has(copied, change, told):
    folder = copied("next")
    header, data = read_header(folder / files.SINGLE)
    change(header)
    write_header(folder / files.SINGLE, header, data)
    with refused(folder, told):
        models.load(folder)


def move_out(folder):
    """The weights, out of a model's folder to where an index could name them."""
    return (folder / files.SINGLE).rename(folder.parent / "outside.safetensors")


def point(folder, file):
    """An index of the tensors that are, or were, in a file."""
    found = next(folder.parent.rglob("*.safetensors"))
    names = (name for name in read_header(found)[0] if name != "__metadata__")
    edit_json(folder, files.INDEX, weight_map=dict.fromkeys(names, file))


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "inside/../../outside.safetensors",
        "inside/a.safetensors",
        "./a.safetensors",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "/dev/zero",
        "a\0.safetensors",
        "a\n.safetensors",
        "\ud800.safetensors",
        "config.json",
        "..",
        ".",
        "",
        5,
        None,
        True,
        ["a.safetensors"],
        {},
    ],
    ids=ascii,
)
def test_an_index_names_files_of_its_own_folder_alone(copied, file):
    folder = copied("next")
    move_out(folder)
    (folder / "inside").mkdir()
    point(folder, file)
    with refused(folder / files.INDEX, "wanted a safetensors file in its own folder"):
        models.load(folder)


def test_an_index_names_no_absolute_path(copied):
    folder = copied("next")
    outside = move_out(folder)
    point(folder, str(outside))
    with refused(folder / files.INDEX, "outside.safetensors', wanted a safetensors"):
        models.load(folder)


@pytest.mark.parametrize("weight_map", [None, [], "a.safetensors", 5])
def test_an_index_of_nothing(copied, weight_map):
    folder = copied("next")
    move_out(folder)
    edit_json(folder, files.INDEX, weight_map=weight_map)
    with refused(folder / files.INDEX, "has no weight_map"):
        models.load(folder)


def test_an_index_of_files_without_end(copied):
    folder = copied("next")
    move_out(folder)
    names = {f"x{i}": f"{i}.safetensors" for i in range(10**4)}
    names["y"] = "y" * 4000 + ".safetensors"  # more than a file system takes
    edit_json(folder, files.INDEX, weight_map=names)
    with refused(folder, "10001 broken or absent files: 0.safetensors (absent"):
        models.load(folder)


def test_a_link_out_of_the_folder_is_its_owners(saved, copied):
    """Hugging Face's cache is a folder of links."""
    folder = copied("next")
    (folder / "a.safetensors").symlink_to(move_out(folder))
    point(folder, "a.safetensors")
    checkpoints.assert_same(models.load(folder)[1], saved("next")[2])


def loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize("is_index", [True, False])
@pytest.mark.parametrize("make", [untrusted.fifo, untrusted.folder, loop])
def test_weights_that_are_no_file(copied, make, is_index):
    folder = copied("next")
    if is_index:
        point(folder, "a.safetensors")
    (folder / files.SINGLE).unlink()
    make(folder / "a.safetensors")
    with refused(folder, "1 broken or absent files", "a.safetensors ("):
        models.load(folder)


@pytest.mark.parametrize("make", [untrusted.fifo, untrusted.folder])
def test_no_other_weights_are_taken_for_what_is_no_file(copied, make):
    folder = copied("next")
    shutil.copy(folder / files.SINGLE, folder / "a.safetensors")
    make(folder / files.SINGLE)
    with refused(folder, f"{files.SINGLE} (no file"):
        models.load(folder)
