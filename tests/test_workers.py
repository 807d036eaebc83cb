"""Threads that read and write: what they leave of the process, and how they stop."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bioinit.storage import run_workers

ROOT = Path(__file__).parents[1]
# conftest.py sets one thread for all tests, so whether that comes back shows only elsewhere.
LEFT = """
import sys, threading, torch
torch.set_num_threads(3)
from pathlib import Path
from bioinit.formats import load
from bioinit.formats.protocol import Outgoing, WriteOptions
from bioinit.storage import Journal
import bioinit

folder = Path(sys.argv[1])
source = torch.nn.Linear(4, 4)

def later():
    found = []
    new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    new.start(), new.join()
    return found + [torch.get_num_threads()]

for _ in range(20):
    bioinit.load_weights(torch.nn.Linear(256, 256), folder / "many.safetensors")
print(*later())

def fill(first, memory):
    memory.zero_()

tensors = [Outgoing(f"t{i}", (8,), torch.float32, fill) for i in range(64)]
for i in range(20):
    out = folder / str(i)
    out.mkdir()
    with Journal(out, "") as journal:
        load("safetensors").write(out, tensors, WriteOptions(max_shard_bytes=32), journal)
print(*later())
"""


def test_the_process_keeps_its_threads_after_loading_and_after_writing(tmp_path: Path):
    save_file(
        {"weight": torch.zeros(256, 256).bfloat16(), "bias": torch.zeros(256).bfloat16()},
        tmp_path / "many.safetensors",
    )
    done = subprocess.run(
        [sys.executable, "-c", LEFT, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["3 3", "3 3"], done.stderr


def test_pools_that_overlap_leave_what_was_there_before_both():
    before = torch.get_num_threads()
    inside, leave = threading.Barrier(2), threading.Event()

    def long(stopped: threading.Event) -> None:
        inside.wait()
        leave.wait()

    torch.set_num_threads(2)
    try:
        first = threading.Thread(target=run_workers, args=(long, 1))
        first.start()
        inside.wait()
        second = threading.Thread(target=run_workers, args=(lambda stopped: leave.set(), 1))
        second.start()
        second.join()
        first.join()
        found: list[int] = []
        new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        new.start()
        new.join()
        assert found == [2]
    finally:
        torch.set_num_threads(before)


def test_when_one_worker_fails_the_others_are_told_and_the_error_comes_out():
    turn = iter(range(3))
    lock = threading.Lock()

    def work(stopped: threading.Event) -> None:
        with lock:
            number = next(turn)
        if number == 1:
            raise ValueError("the disk is gone")
        assert stopped.wait(20)

    with pytest.raises(ValueError, match="the disk is gone"):
        run_workers(work, 3)


def test_nothing_to_do_is_done_at_once():
    run_workers(lambda stopped: None, 0)
