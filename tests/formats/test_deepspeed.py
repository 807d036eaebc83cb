"""Checkpoints of DeepSpeed in which a file holds everything of a partition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bioinit import formats
from bioinit.contexts.checkpoint import Checkpoint
from bioinit.errors import (
    AmbiguousFormat,
    CheckpointError,
    CorruptCheckpoint,
    RefusedCheckpoint,
    UnfinishedCheckpoint,
)
from bioinit.storage import Folder

State = dict[str, torch.Tensor]


def file_name(rank: int) -> str:
    return f"mp_rank_{rank:02d}_model_states.pt"


def write_tiny(folder: Path, state: State) -> None:
    write(folder, [state])


def write(folder: Path, ranks: list[State], **more: object) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for rank, state in enumerate(ranks):
        whole = {
            "module": dict(state),
            "optimizer": None,
            "global_steps": 12,
            "mp_world_size": len(ranks),
            "dp_world_size": 4,
            "ds_version": "0.14.4",
            **more,
        }
        torch.save(whole, folder / file_name(rank))
    return folder


def opened(folder: Path) -> Checkpoint:
    where = Folder.at(folder)
    name, contents = formats.open_weights(where)
    return Checkpoint(where, name, contents, None)


def evo2(hidden: int = 16) -> tuple[State, dict[str, int | None]]:
    """Savanna's names of one Hyena block, and along which dim each is divided."""
    table: dict[str, tuple[tuple[int, ...], int | None]] = {
        "sequential.0.word_embeddings.weight": ((64, hidden), 0),
        "sequential.2.input_layernorm.weight": ((hidden,), None),
        "sequential.2.pre_mlp_layernorm.weight": ((hidden,), None),
        "sequential.2.mixer.dense_projection.weight": ((3 * hidden, hidden), 0),
        "sequential.2.mixer.hyena_proj_conv.short_conv_weight": ((3 * hidden, 3), 0),
        "sequential.2.mixer.mixer.conv_bias": ((hidden,), 0),
        "sequential.2.mixer.mixer.filter.decay": ((8, hidden), 0),
        "sequential.2.mixer.mixer.filter.gamma": ((hidden, 16), 0),
        "sequential.2.mixer.mixer.filter.h": ((8, 128), 0),
        "sequential.2.mixer.mixer.filter.p": ((hidden, 16), 0),
        "sequential.2.mixer.mixer.filter.R": ((hidden, 16), 0),
        "sequential.2.mixer.mixer.filter.t": ((1, 1, 128), None),
        "sequential.2.mixer.mixer.short_conv.short_conv_weight": ((8, 1, 7), 0),
        "sequential.2.mixer.rotary_emb.inv_freq": ((4,), None),
        "sequential.2.mixer.dense.weight": ((hidden, hidden), 1),
        "sequential.2.mixer.dense.bias": ((hidden,), None),
        "sequential.2.mlp.w1.weight": ((2 * hidden, hidden), 0),
        "sequential.2.mlp.w2.weight": ((2 * hidden, hidden), 0),
        "sequential.2.mlp.w3.weight": ((hidden, 2 * hidden), 1),
        "sequential.5.norm.weight": ((hidden,), None),
    }
    state = {name: torch.randn(shape).bfloat16() for name, (shape, _) in table.items()}
    return state, {name: dim for name, (_, dim) in table.items()}


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_savannas_partitions_of_evo_2_become_the_whole(count, tmp_path):
    state, dims = evo2()
    ranks: list[State] = [{} for _ in range(count)]
    for name, tensor in state.items():
        dim = dims[name]
        pieces = [tensor] * count if dim is None else tensor.chunk(count, dim=dim)
        for rank, piece in zip(ranks, pieces, strict=True):
            rank[name] = piece.clone()
    found = opened(write(tmp_path / "it", ranks))
    assert found.format == "deepspeed"
    assert set(found.tensors) == set(state)
    for name, tensor in state.items():
        assert torch.equal(found.read(name), tensor), name
    assert found.metadata["parallel"] == {"tensor": count, "data": 4}
    assert found.metadata["writer"] == "Savanna (DeepSpeed 0.14.4)"
    assert found.metadata["iteration"] == 12


def test_neox_without_pipeline_adds_up_its_biases(tmp_path):
    name = "sequential.2.attention.dense.bias"
    one, two = torch.randn(8), torch.randn(8)
    found = opened(write(tmp_path / "it", [{name: one}, {name: two}]))
    assert torch.equal(found.read(name), one + two)


def test_megatron_deepspeed_keeps_copies_of_them(tmp_path):
    name = "language_model.encoder.layers.0.self_attention.dense.bias"
    bias = torch.randn(8)
    found = opened(write(tmp_path / "it", [{name: bias}, {name: bias}]))
    assert torch.equal(found.read(name), bias)


def test_names_stay_as_they_are_under_module(tmp_path):
    state = {"encoder.block.0.weight": torch.randn(3, 3), "steps": torch.tensor(3)}
    found = opened(write(tmp_path / "it", [state]))
    assert set(found.tensors) == set(state)
    assert found.metadata["writer"] == "DeepSpeed 0.14.4"


def test_state_of_the_optimizer_is_told_apart_and_its_files_are_not_opened(tmp_path):
    state = {"norm.weight": torch.ones(4)}
    moments = {"state": {0: {"exp_avg": torch.ones(4)}}}
    folder = write(tmp_path / "it", [state, state], optimizer=moments)
    name = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    (folder / name).write_bytes(b"never opened")
    found = opened(folder)
    kinds = {key: tensor.kind for key, tensor in found.tensors.items()}
    assert kinds == {
        "norm.weight": "weight",
        "mp_rank_00.optimizer.state.0.exp_avg": "optimizer",
        "mp_rank_01.optimizer.state.0.exp_avg": "optimizer",
    }
    assert torch.equal(found.read("mp_rank_01.optimizer.state.0.exp_avg"), torch.ones(4))
    assert found.metadata["ignored"] == {name: "state of the optimizer"}


def test_zero_3_is_refused_with_the_way_out(tmp_path):
    folder = tmp_path / "by_name"
    folder.mkdir()
    torch.save({"module": {}}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(RefusedCheckpoint, match="zero_to_fp32"):
        opened(folder)
    folder = write(tmp_path / "by_shape", [{"a.weight": torch.empty(0), "b": torch.ones(2)}])
    with pytest.raises(RefusedCheckpoint, match=r"a\.weight"):
        opened(folder)


def test_experts_in_files_of_their_own_are_refused(tmp_path):
    folder = write(tmp_path / "it", [{"norm.weight": torch.ones(4)}])
    torch.save({}, folder / "layer_0_expert_3_mp_rank_00_model_states.pt")
    with pytest.raises(RefusedCheckpoint, match="expert_3"):
        opened(folder)


def test_missing_partitions_are_named(tmp_path):
    state = {"norm.weight": torch.ones(4)}
    folder = write(tmp_path / "gap", [state] * 3)
    (folder / file_name(1)).unlink()
    with pytest.raises(UnfinishedCheckpoint, match=file_name(1)):
        opened(folder)
    folder = write(tmp_path / "end", [state] * 3)
    (folder / file_name(2)).unlink()
    with pytest.raises(UnfinishedCheckpoint, match=file_name(2)):
        opened(folder)


def test_a_file_of_the_engine_alone_misses_the_layers(tmp_path):
    with pytest.raises(UnfinishedCheckpoint, match="layer_"):
        opened(write(tmp_path / "it", [{}]))


@pytest.mark.parametrize("said", ["args", "engine", "optimizer"])
def test_partitions_missing_at_the_end_are_told_by_arguments_and_other_files(said, tmp_path):
    state = {"norm.weight": torch.ones(4)}
    args = {"args": {"tensor_model_parallel_size": 2}} if said == "args" else {}
    folder = write(tmp_path / "it", [state], **args)
    if said == "engine":
        write(folder, [state], mp_world_size=2)
    if said == "optimizer":
        (folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt").write_bytes(b"never opened")
    with pytest.raises(UnfinishedCheckpoint, match=f"1 of 2 .*{file_name(1)}"):
        opened(folder)


def test_partitions_of_two_steps_do_not_belong_together(tmp_path):
    state = {"norm.weight": torch.ones(4)}
    folder = write(tmp_path / "it", [state, state])
    torch.save({"module": state, "global_steps": 13}, folder / file_name(1))
    with pytest.raises(CorruptCheckpoint, match=r"mp_rank_00.*_steps 12, and mp_rank_01.* 13"):
        opened(folder)


def test_sums_are_doubted_here_too(tmp_path):
    state = {"sequential.2.attention.dense.bias": torch.ones(4)}
    folder = write(tmp_path / "it", [state, state])
    found = opened(folder)
    assert "doubt" not in found.metadata
    assert found.read("sequential.2.attention.dense.bias").tolist() == [2.0] * 4
    assert ["as copies would be" in remark for file in found.files for remark in file.remarks] == [
        True
    ]
    write(folder, [state, state], args={"gpt_j_residual": False})
    assert "gpt_j_residual: false" in opened(folder).metadata["doubt"]


def test_a_name_that_nobody_knows_is_an_error_only_where_it_is_divided(tmp_path):
    state = {"norm.weight": torch.ones(4), "my.lora_a.weight": torch.randn(2, 4)}
    assert len(opened(write(tmp_path / "one", [state])).tensors) == 2
    with pytest.raises(AmbiguousFormat, match=r"my\.lora_a\.weight"):
        opened(write(tmp_path / "two", [state, state]))


@pytest.mark.parametrize(
    "value", [{"module": {"a.weight": 3}}, {"module": 3}, [1, 2], {"module": {"w": torch.ones(1)}}]
)
def test_what_is_no_partition_of_a_model_is_an_error_of_ours(value, tmp_path):
    folder = write(tmp_path / "it", [{"norm.weight": torch.ones(4)}] * 2)
    torch.save(value, folder / file_name(1))
    with pytest.raises(CheckpointError, match=r"mp_rank_0[01]_model_states"):
        opened(folder)
