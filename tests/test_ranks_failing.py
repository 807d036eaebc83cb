"""What goes wrong in one rank ends all of them: with its own words, soon, and with nothing left."""

import errno
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers

import bioinit
from bioinit.load import transfer
from bioinit.storage import File
from tests.processes import outcomes_of

pytestmark = pytest.mark.dist

SOON = 60
"""Seconds in which everybody must have ended, starting processes and importing included."""


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
    started(folder)


def given_other_overrides(folder: str) -> None:
    started(folder, f"init.seed={rank()}")


def filled_disk(folder: str, output: str, *overrides: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        started(folder, f"output_dir={output}", "output.format=torch_dist", *overrides)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_killed_rank_ends_the_others(llama):
    before = time.monotonic()
    outcomes = outcomes_of(3, killed_while_loading, str(llama), timeout=SOON)
    assert time.monotonic() - before < SOON
    assert outcomes[1] == ("died", -signal.SIGKILL)
    for kind, said in (outcomes[0], outcomes[2]):
        assert kind == "raised"
        assert "rank 1" in said.strip().splitlines()[-1]


def test_a_file_that_one_rank_cannot_read_is_the_error_of_all(llama):
    outcomes = outcomes_of(2, unreadable_in_one, str(llama), timeout=SOON)
    assert [kind for kind, _ in outcomes] == ["raised", "raised"]
    for _, said in outcomes:
        assert os.strerror(errno.EIO) in said
    assert "rank 1" in outcomes[0][1]


def test_ranks_that_were_told_different_things_hear_which(llama):
    outcomes = outcomes_of(2, given_other_overrides, str(llama), timeout=SOON)
    for kind, said in outcomes:
        assert kind == "raised"
        assert "ConfigError" in said
        assert "init.seed" in said
        assert "rank 1" in said


def test_a_full_disk_under_one_saver_leaves_nothing(llama, tmp_path):
    output = tmp_path / "out"
    outcomes = outcomes_of(2, filled_disk, str(llama), str(output), timeout=SOON)
    for kind, said in outcomes:
        assert kind == "raised"
        assert "StorageError" in said
    assert not list(tmp_path.iterdir())
