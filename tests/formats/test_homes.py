"""From the folder that a person points at to the weights, and to the saved config."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

import bioinit
from bioinit import formats
from bioinit.errors import (
    AmbiguousFormat,
    CorruptCheckpoint,
    RefusedCheckpoint,
    UnfinishedCheckpoint,
)
from bioinit.storage import Folder

STATE = {"w": torch.arange(6.0).view(2, 3)}


def write_step(folder: Path) -> Path:
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one process is what is meant
        dcp.save(STATE, checkpoint_id=folder, no_dist=True)
    return folder


def opened(path: Path) -> str:
    with bioinit.open_checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint.read("w"), STATE["w"])
        return checkpoint.format


def test_the_parent_of_steps_means_the_one_that_is_pointed_at(tmp_path):
    for number in (1, 3, 20):
        folder = tmp_path / f"iter_{number:07d}"
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            state = {"w": torch.full((2,), float(number))}
            dcp.save(state, checkpoint_id=folder, no_dist=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3\n")
    torch.save({"step": torch.tensor(3)}, tmp_path / "latest_train_state.pt")  # as Bridge does
    with bioinit.open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("w").tolist() == [3.0, 3.0]
    names = [home.path.name for home in formats.homes(Folder.at(tmp_path))]
    assert names == ["iter_0000003", tmp_path.name]


@pytest.mark.parametrize("said", ["release", "release\n"])
def test_a_release_is_a_step_too(tmp_path, said):
    write_step(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(said)
    assert opened(tmp_path) == "torch_dist"


def test_a_pointer_to_a_step_that_is_not_there_names_it_and_what_is(tmp_path):
    write_step(tmp_path / "iter_0000010")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("11")
    with pytest.raises(CorruptCheckpoint, match=r"'iter_0000011'.*has iter_0000010"):
        formats.open_weights(Folder.at(tmp_path))


@pytest.mark.parametrize("said", ["../elsewhere", "/etc", "", "a\0b", "."])
def test_a_pointer_never_leads_out(tmp_path, said):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "latest").write_text(said)
    with pytest.raises((RefusedCheckpoint, CorruptCheckpoint), match="it"):
        formats.open_weights(Folder.at(tmp_path / "it"))


def test_several_steps_and_no_pointer_are_ambiguous(tmp_path):
    write_step(tmp_path / "iter_0000001")
    write_step(tmp_path / "iter_0000002")
    with pytest.raises(AmbiguousFormat, match=r"2 saved steps.*Point at"):
        formats.open_weights(Folder.at(tmp_path))


def test_weights_gathered_beside_the_steps_are_preferred(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "latest").write_text("global_step5")
    (tmp_path / "global_step5").mkdir()
    assert opened(tmp_path) == "safetensors"


def test_weights_of_the_hub_beside_another_format_are_ambiguous(tmp_path):
    write_step(tmp_path / "it")
    save_file(STATE, tmp_path / "it" / "model.safetensors")
    with pytest.raises(AmbiguousFormat, match=r"torch_dist, and model\.safetensors"):
        formats.open_weights(Folder.at(tmp_path / "it"))
    assert opened(tmp_path / "it" / "model.safetensors") == "safetensors"


def test_weights_outside_and_inside_are_ambiguous(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    write_step(tmp_path / "weights")
    with pytest.raises(AmbiguousFormat, match="weights/"):
        formats.open_weights(Folder.at(tmp_path))


@pytest.mark.parametrize("pointed", ["", "weights"])
def test_a_marker_of_an_unfinished_save_is_believed(tmp_path, pointed):
    write_step(tmp_path / "last" / "weights")
    (tmp_path / "last-unfinished").touch()
    with pytest.raises(UnfinishedCheckpoint, match="last-unfinished"):
        formats.open_weights(Folder.at(tmp_path / "last" / pointed))


@pytest.mark.parametrize("pointed", ["", "weights", "weights/__0_0.distcp", "weights/.metadata"])
def test_the_saved_config_is_found_from_anywhere(tmp_path, pointed):
    write_step(tmp_path / "it" / "weights")
    (tmp_path / "it" / "config.json").write_text(json.dumps({"model_type": "esm"}))
    with bioinit.open_checkpoint(tmp_path / "it" / pointed) as checkpoint:
        assert checkpoint.context is not None and checkpoint.context.model == "esm"


def test_one_rank_stands_for_all_of_them(tmp_path):
    for rank in range(2):
        (tmp_path / f"mp_rank_{rank:02d}").mkdir()
        state = {"model.embedding.word_embeddings.weight": torch.full((4, 2), float(rank))}
        torch.save(state, tmp_path / f"mp_rank_{rank:02d}" / "model_weights.ckpt")
    for pointed in ("", "mp_rank_01", "mp_rank_01/model_weights.ckpt"):
        with bioinit.open_checkpoint(tmp_path / pointed) as checkpoint:
            assert checkpoint.format == "megatron_ranks"
            (tensor,) = checkpoint.tensors.values()
            assert tensor.shape == (8, 2)


@pytest.mark.parametrize(
    "model, optimizer", [("model", "optim"), ("pytorch_model_fsdp_0", "optimizer_0")]
)
def test_weights_beside_the_folder_of_an_optimizer_are_found(tmp_path, model, optimizer):
    write_step(tmp_path / model)
    write_step(tmp_path / optimizer)
    assert opened(tmp_path) == "torch_dist"


def test_an_empty_pointer_is_what_it_is(tmp_path):
    write_step(tmp_path / "iter_0000001")
    (tmp_path / "latest_checkpointed_iteration.txt").touch()
    with pytest.raises(CorruptCheckpoint, match="is empty"):
        formats.open_weights(Folder.at(tmp_path))


def test_a_bare_adapter_of_nemo_is_refused_with_its_base(tmp_path):
    write_step(tmp_path / "it" / "weights")
    said = {"model_ckpt_path": "/base/llama"}
    (tmp_path / "it" / "weights" / "adapter_metadata.json").write_text(json.dumps(said))
    with pytest.raises(RefusedCheckpoint, match=r"adapter.*'/base/llama'"):
        bioinit.open_checkpoint(tmp_path / "it")


def test_ranks_that_only_the_saved_config_knows_of_are_missed(tmp_path):
    (tmp_path / "mp_rank_00").mkdir()
    torch.save(STATE, tmp_path / "mp_rank_00" / "model_weights.ckpt")
    config = tmp_path / "model_config.yaml"
    config.write_text("tensor_model_parallel_size: 1\nhidden_size: 3\n")
    assert opened(tmp_path) == "megatron_ranks"
    config.write_text("tensor_model_parallel_size: 2\nhidden_size: 3\n")
    with pytest.raises(UnfinishedCheckpoint, match=r"1 tensor rank, and .*model_config.yaml says"):
        bioinit.open_checkpoint(tmp_path)
