"""Parts of Megatron models, written from all processes that have one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bioinit
from tests import test_save_ranks
from tests.processes import together
from tests.test_save_ranks import assert_same, start, stored, write, write_source

pytestmark = test_save_ranks.pytestmark

CELLS: tuple[tuple[str, dict[str, int]], ...] = (
    ("llama", {"pp": 2}),
    ("llama", {"pp": 2, "vpp": 2}),
    ("mixtral", {"ep": 2}),
    ("llama", {"tp": 2}),
)


def named(name: str, mesh: dict[str, int]) -> str:
    return "-".join((name, *mesh))


def by_two(top: Path) -> list[str]:
    """All that two ranks do; what megatron-core's own loader gives, and should not."""
    from megatron.core import parallel_state

    for name, mesh in CELLS:
        parallel_state.destroy_model_parallel()
        axes = ", ".join(f"{axis}: {ways}" for axis, ways in mesh.items())
        words = ("model.backend=megatron", "placement.strategy=megatron")
        done = start(top / name / "from", name, *words, f"placement.mesh={{{axes}}}")
        out = top / named(name, mesh)
        done.save(out / "hf")
        write(done, out / "nemo2", "nemo2", "torch_dist")
    return read_by_megatron(done.model, top / "llama-pp/nemo2/weights")


def read_by_megatron(model: Any, folder: Path) -> list[str]:
    """Names of the parameters of ``model`` of which ``folder`` holds something else."""
    from megatron.core import dist_checkpointing

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]
    held = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    asked = model.sharded_state_dict(prefix="module.")
    found = dist_checkpointing.load(asked, str(folder))
    prefix = "module."
    parts = {name.removeprefix(prefix): found[name] for name in found if name.startswith(prefix)}
    model.load_state_dict(parts)
    return [n for n, parameter in model.named_parameters() if not torch.equal(parameter, held[n])]


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    found = tmp_path_factory.mktemp("one")
    for name in ("llama", "mixtral"):
        write_source(name, found / name / "from")
        bioinit.convert(found / name / "from", found / name / "nemo2", "nemo2")
    return found


def test_parts_of_megatron_models_are_written_as_the_whole_is(top: Path) -> None:
    wrong = together(2, by_two, top)
    for name, mesh in CELLS:
        out = top / named(name, mesh)
        assert_same(stored(out / "hf"), stored(top / name / "from"))
        assert_same(stored(out / "nemo2"), stored(top / name / "nemo2"))
    assert wrong == [[], []]  # two stages wrote what two parts of every layer read
