"""Files as someone who wishes ill would make them; no tests of its own."""

import contextlib
import json
import os
import pathlib
import re
import signal
import struct

import jaxtyping
import pytest
from hypothesis import strategies as st

from gdn_jax.models.config_faults import LAYER_TYPES, MODEL_TYPES

SECONDS, BYTES = 20, 2**29  # far more than any file here takes, far less than it claims

# Of JSON, for hypothesis.
SIZES = (-(10**30), -1, 0, 1, 2, 3, 8, 1000, 2**28 - 1, 2**28, 2**62)
SIZES += (2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(SIZES)
    | st.integers()
    | st.floats()
    | st.sampled_from([*LAYER_TYPES, *MODEL_TYPES])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(autouse=True, scope="module")
def unchecked():
    """Errors are the library's own, not those of its annotations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@contextlib.contextmanager
def bounded(seconds=SECONDS):
    """Fails where the body takes long, or much memory."""

    def stop(*_):
        raise AssertionError(f"it took more than {seconds} s")

    before, peak = signal.signal(signal.SIGALRM, stop), _reset_peak()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert _peak() - peak < BYTES


@contextlib.contextmanager
def refused(path, *texts, error=ValueError):
    """By an error that names the file, says these texts, and fits a screen."""
    with bounded(), pytest.raises(error) as raised:
        yield
    message = str(raised.value)
    assert [text for text in (str(path), *texts) if text not in message] == []
    assert len(message) < 8000 and message.replace("\n", " ").isprintable()


def read_header(path):
    """Of a safetensors file, and what is behind it."""
    data = path.read_bytes()
    [size] = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(path, header, data, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if size is None else size
    path.write_bytes(struct.pack("<Q", size) + text + data)


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def bytes_of(data):
    return lambda path: path.write_bytes(data)


# What may be in a JSON file's place.
NO_JSON = {
    "nothing": bytes_of(b""),
    "no UTF-8": bytes_of(b'{"a": "\xff"}'),
    "UTF-16": bytes_of('{"a": 1}'.encode("utf-16")),
    "cut off": bytes_of(b'{"vocab_size": '),
    "a list": bytes_of(b"[1, 2]"),
    "zeros": bytes_of(bytes(100)),
    "nested arrays": bytes_of(b"[" * 10**5),
    "nested objects": bytes_of(b'{"a":' * 10**5),
    "endless digits": bytes_of(b'{"vocab_size": ' + b"9" * 10**5 + b"}"),
    "a FIFO": fifo,
    "a folder": folder,
}


def _reset_peak():
    """What a worker once had, compiling, would hide what the body takes."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
