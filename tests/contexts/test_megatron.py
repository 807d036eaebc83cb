"""Megatron-LM's arguments: from ``common.pt``, from a rank's file, from DeepSpeed's."""

import enum
import pickle
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.planner import WriteItemType

from bioinit.contexts import load_context
from bioinit.contexts.megatron import CONTEXT
from bioinit.contexts.protocol import Context
from bioinit.errors import CorruptCheckpoint
from bioinit.storage import Folder


class Unlisted(enum.Enum):
    ONE = 1


def arguments(**more: Any) -> Namespace:
    return Namespace(
        num_layers=2, hidden_size=8, swiglu=True, params_dtype=torch.bfloat16, lr=None,
        activation_func=torch.nn.functional.silu, betas=(0.9, 0.95),
        kind=WriteItemType.TENSOR, unlisted=Unlisted.ONE,
        rng=torch.zeros(3), nested=Namespace(a=1), **more,
    )  # fmt: skip


PLANNER = "torch.distributed.checkpoint.planner"
PLACES = [
    ("common.pt", {}),
    ("model_optim_rng.pt", {}),
    ("mp_rank_00/model_optim_rng.pt", {"model": {"w": torch.zeros(2)}}),
    ("mp_rank_00_000/model_optim_rng.pt", {"model": {"w": torch.zeros(2)}}),
    ("mp_rank_00_model_states.pt", {"module": {"w": torch.zeros(2)}}),
]


def write(folder: Path, place: str, value: Any, **how: Any) -> Path:
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, folder / place, **how)
    return folder


def read(folder: Path) -> Context:
    context = CONTEXT.read(Folder.at(folder))
    assert context is not None
    return context


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("place", "beside"), PLACES)
def test_the_arguments_are_plain_data(
    tmp_path: Path, place: str, beside: dict[str, Any], old: bool
) -> None:
    value = {"args": arguments(), "iteration": 7, "checkpoint_version": 3.0, **beside}
    write(tmp_path, place, value, _use_new_zipfile_serialization=not old)
    context = read(tmp_path)
    assert context.dialect == "megatron" and context.model is None
    assert context.where == f"{tmp_path / place} (args)"
    data = dict(context.data)
    assert data.pop("kind") == {
        "_target_": f"{PLANNER}.WriteItemType",
        "_args_": [WriteItemType.TENSOR.value],
    }
    assert data.pop("unlisted") == {"refused": f"{__name__}.Unlisted"}
    assert data == {
        "num_layers": 2, "hidden_size": 8, "swiglu": True, "lr": None,
        "params_dtype": "torch.bfloat16", "betas": [0.9, 0.95],
        "activation_func": "torch.nn.functional.silu",
        "nested": {"_target_": "argparse.Namespace", "a": 1},
    }  # fmt: skip
    assert context.tree["iteration"] == 7 and context.tree["checkpoint_version"] == 3.0


def test_arguments_may_be_a_mapping_or_another_namespace(tmp_path: Path) -> None:
    for args in ({"num_layers": 2}, types.SimpleNamespace(num_layers=2)):
        assert read(write(tmp_path, "common.pt", {"args": args})).data == {"num_layers": 2}


def test_a_mapping_in_a_file_of_deepspeed_s_is_neox_s(tmp_path: Path) -> None:
    context = read(write(tmp_path, "mp_rank_00_model_states.pt", {"args": {"num-layers": 2}}))
    assert context.dialect == "neox" and context.data == {"num_layers": 2}


def test_the_first_rank_speaks(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path, f"mp_rank_{rank:02}/model_optim_rng.pt", {"args": Namespace(rank=rank)})
    assert read(tmp_path).data == {"rank": 0}


@pytest.mark.parametrize(
    "value", [{}, {"args": None}, {"args": [1]}, {"args": {1: 2}}, [1], {"hyper_parameters": {}}]
)
def test_what_has_no_arguments_holds_none(tmp_path: Path, value: Any) -> None:
    assert CONTEXT.read(Folder.at(write(tmp_path, "common.pt", value))) is None


def test_nemo_2_s_common_file_holds_none(fixtures_dir: Path) -> None:
    for name in ("llama_tp1", "esm2_tp2"):
        assert CONTEXT.read(Folder.at(fixtures_dir / "nemo2" / name / "weights")) is None


class Calls:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_nothing_in_the_arguments_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "common.pt", {"args": Namespace(num_layers=2, bad=Calls())})
    assert read(tmp_path).data == {"num_layers": 2, "bad": {"refused": "builtins.print"}}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["half", "junk", "empty"])
def test_a_damaged_file_is_corrupt_and_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path, "common.pt", {"args": arguments()})
    file = tmp_path / "common.pt"
    content = {"half": file.read_bytes()[: file.stat().st_size // 2], "junk": b"\x80\x02junk"}
    file.write_bytes(content.get(damage, b""))
    with pytest.raises(CorruptCheckpoint, match=r"common\.pt"):
        read(tmp_path)


def test_arguments_that_unfold_without_end_are_cut(tmp_path: Path) -> None:
    bomb: list[Any] = [0]
    for _ in range(60):
        bomb = [bomb] * 10
    write(tmp_path, "common.pt", {"args": {"n": 1, **{f"b{i}": bomb for i in range(1000)}}})
    context = read(tmp_path)
    assert context.data["n"] == 1 and len(pickle.dumps(context.tree)) < 1_000_000
    assert load_context(tmp_path, "model.config.n") == 1
