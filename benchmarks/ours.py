"""The ways of bioinit, through its public interface, and the limit of the machine."""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import replace
from pathlib import Path

import torch
from checkpoints import Cells
from peers import Job, Way, decoder, safetensors_files
from torch import nn

CHUNK = 16 << 20
HUGE = 2 << 20


def load_weights(job: Job) -> nn.Module:
    """``bioinit.load_weights`` into a module on meta."""
    import bioinit

    with torch.device("meta"):
        model = Cells(job.cells) if job.model == "cells" else decoder(job)
    extra: dict[str, object] = {}
    if job.device != "cpu":
        extra["device"] = job.device
    if job.check_finite:
        extra["check_finite"] = True
    if job.skip:
        extra["skip_prefixes"] = job.skip
    bioinit.load_weights(model, job.path, **extra)
    return model


def initialize(job: Job) -> nn.Module:
    """``bioinit.compose`` and ``bioinit.initialize`` with the family ``auto``."""
    import bioinit

    overrides = [f"model.initial_ckpt_path={job.path}", f"placement.dtype={job.dtype}"]
    if job.device != "cpu":
        overrides.append(f"placement.device={job.device}")
    if job.check_finite:
        overrides.append("init.check_finite=true")
    if job.skip:
        skip = ",".join(job.skip)
        overrides.append(f"model.initial_ckpt_skip_keys_with_these_prefixes=[{skip}]")
    return bioinit.initialize(bioinit.compose("auto/as_saved", overrides)).model


def from_safetensors(job: Job) -> nn.Module:
    """The same weights, stored as the module names them."""
    return load_weights(replace(job, path=str(Path(job.path).with_name("single"))))


def bare_preadv(job: Job) -> torch.Tensor:
    """Two threads, ``preadv`` of the same bytes into fresh memory that asks for huge pages."""
    files = [(os.open(file, os.O_RDONLY), os.stat(file).st_size) for file in safetensors_files(job)]
    total = sum(size for _, size in files)
    memory = mmap.mmap(-1, -(-total // HUGE) * HUGE + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    parts, at = [], 0
    for descriptor, size in files:
        for offset in range(0, size, CHUNK):
            length = min(CHUNK, size - offset)
            parts.append((descriptor, offset, view[at : at + length]))
            at += length

    def read(mine: list[tuple[int, int, memoryview]]) -> None:
        for descriptor, offset, target in mine:
            done = 0
            while done < len(target):
                done += os.preadv(descriptor, [target[done:]], offset + done)

    threads = [threading.Thread(target=read, args=(parts[i::2],)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for descriptor, _ in files:
        os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8, count=total)


def pinned_copy(job: Job) -> torch.Tensor:
    """The same number of bytes from two pinned buffers to the device: the limit of the bus."""
    total = sum(Path(file).stat().st_size for file in safetensors_files(job))
    device = torch.empty(total, dtype=torch.uint8, device=job.device)
    for number, at in enumerate(range(0, total, PINNED)):
        part = device[at : at + PINNED]
        part.copy_(_pinned()[number % 2][: part.numel()], non_blocking=True)
    return device


PINNED = 64 << 20
_buffers: list[torch.Tensor] = []


def _pinned() -> list[torch.Tensor]:
    """Two pinned buffers, made by the warm-up and so not on the clock."""
    while len(_buffers) < 2:
        _buffers.append(torch.ones(PINNED, dtype=torch.uint8, pin_memory=True))
    return _buffers


ENGINE = ("bioinit", "transformers")
OURS = {
    "load_weights": Way(label="bioinit.load_weights", run=load_weights, imports=ENGINE),
    "initialize": Way(
        label="bioinit.compose + initialize",
        run=initialize,
        imports=ENGINE,
        can=frozenset({"float32", "cuda"}),
    ),
}
LIMITS = {
    "limit": Way(
        label="limit: 2 threads of preadv into huge pages",
        run=bare_preadv,
        can=frozenset({"cells"}),
    ),
    "alike": Way(label="limit: bioinit.load_weights from safetensors", run=from_safetensors),
    "pinned": Way(label="limit: pinned host to device", run=pinned_copy, can=frozenset({"cuda"})),
}
