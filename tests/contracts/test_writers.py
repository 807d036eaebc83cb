"""What every format promises that models are written in.

A format is found by its ``write``. Its tests, ``tests/formats/test_write_<name>.py``, may say how
names are ``spelled(key)`` where the format does not take any, and which dtypes are ``UNWRITTEN``.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bioinit import formats
from bioinit.formats._filling import SLAB_BYTES
from tests.writing import Killed, Source, assert_same, read, values, write

TESTS = Path(__file__).parents[1] / "formats"
WRITERS = [n for n in formats.names() if formats.load(n).write is not None]
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
SHAPES = ((), (1,), (0,), (0, 3), (3, 0, 2), (7,), (5, 8), (3, 4, 5), (2, 1, 3, 2), (129, 3))
each_writer = pytest.mark.parametrize("name", WRITERS)


def module_for(name: str) -> ModuleType:
    path = TESTS / f"test_write_{name}.py"
    spec = importlib.util.spec_from_file_location(f"writing_of_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def odd_state(name: str) -> dict[str, torch.Tensor]:
    module = module_for(name)
    spelled = getattr(module, "spelled", str)
    unwritten = getattr(module, "UNWRITTEN", ())
    dtypes = [dtype for dtype in DTYPES if dtype not in unwritten]
    return {
        spelled(f"layers.{number}.{str(dtype).removeprefix('torch.')}"): values(
            shape, dtype, number
        )
        for number, shape in enumerate(SHAPES)
        for dtype in dtypes
    }


def test_the_formats_that_models_are_written_in_are_known():
    assert {"neox", "safetensors", "torch_dist"} <= set(WRITERS)


@each_writer
def test_odd_shapes_and_every_dtype_come_back_bit_for_bit(name, tmp_path):
    state = odd_state(name)
    write(name, tmp_path / "out", state)
    found, tensors = read(tmp_path / "out")
    assert found == name
    assert_same(tensors, state)


@each_writer
def test_no_element_is_asked_for_twice_and_never_much_of_it_at_once(name, tmp_path, monkeypatch):
    spelled = getattr(module_for(name), "spelled", str)
    large = values((3, 700, 1024), torch.float64)
    state = {spelled("large"): large, spelled("small"): values((17,), torch.bfloat16)}
    assert large.nbytes > SLAB_BYTES
    source = write(name, tmp_path / "out", state)
    assert sum(request.bytes for request in source.requests) == sum(map(nbytes, state.values()))
    assert source.largest <= 2 * SLAB_BYTES
    assert_same(read(tmp_path / "out")[1], state)


@each_writer
def test_a_writer_that_fails_leaves_no_thread_and_no_open_file(name, tmp_path):
    source = Source(odd_state(name), breaks_at=3)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Killed, match="killed half-way"):
        write(name, tmp_path / "out", source)
    assert not [t for t in threading.enumerate() if t.name.startswith("bioinit")]
    assert len(os.listdir("/proc/self/fd")) == open_before


KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from tests.writing import Source, write

name, folder, state = sys.argv[1], Path(sys.argv[2]), torch.load(sys.argv[3])
asked = 0

class Dying(Source):
    @property
    def outgoing(self):
        return [self.dying(outgoing) for outgoing in super().outgoing]

    def dying(self, outgoing):
        def fill(first, memory):
            global asked
            asked += 1
            if asked >= int(sys.argv[4]):  # threads may pass each other in between
                os.kill(os.getpid(), signal.SIGKILL)
            outgoing.fill(first, memory)

        return outgoing._replace(fill=fill)

write(name, folder, Dying(state), max_shard_bytes=4000)
"""


@each_writer
def test_a_process_that_is_killed_is_gone_on_with(name, tmp_path):
    module = module_for(name)
    spelled = getattr(module, "spelled", str)
    state = {spelled(f"layers.{n}.weight"): values((25, 40), torch.float32, n) for n in range(9)}
    torch.save(state, tmp_path / "state.pt")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, name, tmp_path / "out", tmp_path / "state.pt", "6"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    source = write(name, tmp_path / "out", state, max_shard_bytes=4000)
    assert len(source.requests) <= len(state)
    assert_same(read(tmp_path / "out")[1], state)


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes
