"""What goes wrong in one rank ends all of them: with its own words, soon, and with nothing left."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import transformers

import bioinit
from bioinit import ranks
from bioinit.errors import BioinitError
from bioinit.load import transfer
from bioinit.ranks.watch import Pace
from bioinit.storage import File
from tests.processes import outcomes_of, together

pytestmark = pytest.mark.dist

QUICK = Pace(tick=0.3, lost=4.0, join=60.0)
SOON = 150
"""Seconds in which everybody must have ended, with the start of processes on a busy machine."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failing") / "llama"
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def started(folder: str, *overrides: str) -> None:
    record = bioinit.compose(
        "llama/causal_lm",
        [f"model.initial_ckpt_path={folder}", "placement.strategy=fsdp2", *overrides],
    )
    bioinit.initialize(record)


def rank() -> int:
    return torch.distributed.get_rank()


def killed_while_loading(folder: str) -> None:
    ranks.PACE = QUICK
    original = transfer.Transfer._read

    def read(self, *arguments: object) -> None:
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *arguments)

    transfer.Transfer._read = read
    started(folder)


def unreadable_in_one(folder: str) -> None:
    original = File.read_into

    def read_into(self, offset: int, buffers: object) -> None:
        if rank() == 1 and self.path.suffix == ".safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(self, offset, buffers)

    if rank() == 1:
        File.read_into = read_into
    try:
        started(folder)
    finally:
        File.read_into = original


def told_other_things(folder: str) -> None:
    started(folder, f"init.seed={rank()}")


def filled_disk(folder: str, output: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        started(folder, f"output_dir={output}", "output.format=torch_dist")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def failing(folder: str, output: str) -> dict[str, tuple[str, str]]:
    """What this rank hears of each failure, one after the other."""
    heard = {}
    for fail, *more in ((unreadable_in_one,), (told_other_things,), (filled_disk, output)):
        with pytest.raises((BioinitError, OSError)) as raised:
            fail(folder, *more)
        heard[fail.__name__] = type(raised.value).__name__, str(raised.value)
    return heard


def test_a_killed_rank_ends_the_others(llama):
    outcomes = outcomes_of(3, killed_while_loading, str(llama), timeout=SOON)
    assert outcomes[1] == ("died", -signal.SIGKILL)
    for kind, said in (outcomes[0], outcomes[2]):
        assert kind == "raised"
        assert "rank 1" in said.strip().splitlines()[-1]


def test_what_fails_in_one_rank_fails_in_all_of_them(llama, tmp_path):
    heard = together(2, failing, str(llama), str(tmp_path / "out"), timeout=SOON)
    for rank, said in enumerate(heard):
        kind, message = said["unreadable_in_one"]
        assert kind == ("OSError" if rank else "BioinitError")
        assert os.strerror(errno.EIO) in message
        assert message.startswith("rank 1: ") == (rank == 0)
        kind, message = said["told_other_things"]
        assert kind == "ConfigError" and "rank 1 differs from rank 0 in init.seed" in message
        kind, message = said["filled_disk"]
        assert kind == "StorageError"
        assert message.startswith("rank 1: ") == (rank == 0)
    assert not list(tmp_path.iterdir())
