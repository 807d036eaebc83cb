"""Parts of Megatron models, written from all processes that have one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import bioinit
from bioinit import families, ranks
from bioinit.initialize.across import described_by
from bioinit.targets import slots
from tests import test_save_ranks
from tests.processes import together
from tests.test_save_ranks import RECIPES, Cell, assert_same, stored

pytestmark = test_save_ranks.pytestmark

written = test_save_ranks.written

MESHES = [("llama", {"tp": 2}), ("llama", {"pp": 2}), ("mixtral", {"ep": 2})]


class OfMegatron(Cell):
    """One part of a Megatron model, with its share of the values of the whole."""

    def __init__(self, top: Path, name: str, mesh: dict[str, int]) -> None:
        from bioinit.backends import megatron

        megatron.require_world(mesh)
        self.name, self.top = name, top / name
        self.checkpoint = bioinit.open_checkpoint(self.top / "from")
        self.family = families.load(name)
        shapes = {key: tensor.shape for key, tensor in self.checkpoint.tensors.items()}
        context = self.checkpoint.context
        assert context is not None
        self.config = described_by(self.family, context, {"backend": "megatron"}, shapes)
        self.backend = self.family.backend(self.config)
        self.model = self.backend.build(lambda: self.family.build(self.config))
        values = torch.load(self.top / "megatron.pt")
        located = self.backend.located(self.model)
        for slot in slots(self.model):
            part = located[slot.key]
            whole = torch.zeros(part.shape)
            whole[tuple(map(slice, values[part.key].shape))] = values[part.key]
            memory = torch.empty(slot.tensor.shape)
            for box in part.boxes:
                ends = map(sum, zip(*box[:2], strict=True))
                held = memory.as_strided(box.sizes, box.strides, box.start)
                held.copy_(whole[tuple(map(slice, box.offsets, ends))])
            real = nn.Parameter(memory)
            vars(real).update(vars(slot.tensor))
            slot.module._parameters[slot.name] = real


def megatron_cells(top: Path, out: Path) -> None:
    from megatron.core import parallel_state

    for name, mesh in MESHES:
        with ranks.together() as world:
            cell = OfMegatron(top, name, mesh)
            place = out / f"{name}-{'-'.join(mesh)}"
            cell.save(place / "hf", world)
            cell.save(place / "nemo2", world, "nemo2", "torch_dist")
            parallel_state.destroy_model_parallel()


@pytest.fixture
def of_megatron(written: Path) -> Iterator[Path]:
    """Beside each checkpoint, the values of the Megatron model that one process makes of it."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    from megatron.core import parallel_state

    for name in ("llama", "mixtral"):
        given = [f"model.initial_ckpt_path={written / name / 'from'}", "model.backend=megatron"]
        done = bioinit.initialize(bioinit.compose(RECIPES[name][0], given))
        torch.save(dict(done.model.named_parameters()), written / name / "megatron.pt")
    yield written
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_parts_of_megatron_models_are_written_as_the_whole_is(
    of_megatron: Path, tmp_path: Path
) -> None:
    together(2, megatron_cells, of_megatron, tmp_path)
    for name, mesh in MESHES:
        out, source = tmp_path / f"{name}-{'-'.join(mesh)}", of_megatron / name / "from"
        assert_same(stored(out / "hf"), stored(source))
        if not (of_megatron / name / "nemo2").exists():
            bioinit.convert(source, of_megatron / name / "nemo2", "nemo2")
        assert_same(stored(out / "nemo2"), stored(of_megatron / name / "nemo2"))
    script = Path(__file__).with_name("megatron_loads.py")
    command = [sys.executable, script, tmp_path / "llama-pp/nemo2/weights"]
    loaded = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert loaded.returncode == 0 and "loaded" in loaded.stdout, loaded.stderr[-2000:]
