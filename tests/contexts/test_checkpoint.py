"""Opening a checkpoint: what it holds, reading regions of it, and what is refused at the door."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import bioinit
from bioinit.config import TrainableModelConfig
from bioinit.contexts import Checkpoint, find, load_context, open_checkpoint
from bioinit.errors import (
    ConfigError,
    CorruptCheckpoint,
    RefusedCheckpoint,
    StorageError,
    UnknownFormat,
)
from bioinit.formats.protocol import Contents, Piece, StoredTensor
from bioinit.layout import Box
from bioinit.record import make_record, save_context
from bioinit.storage import File, Folder

TENSORS = {
    "embed.weight": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "head.bias": torch.arange(3, dtype=torch.bfloat16),
    "scale": torch.tensor(7.5, dtype=torch.float64),
    "nothing": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
}


@dataclass(kw_only=True)
class Config(TrainableModelConfig):
    hidden_size: int = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    write(tmp_path, "config.json", {"model_type": "esm", "hidden_size": 4})
    return tmp_path


def write(folder: Path, name: str, data: Any) -> None:
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))


def test_an_open_checkpoint_says_what_it_holds(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.format == "safetensors" and checkpoint.dialect is None
        assert checkpoint.path == folder and set(checkpoint.tensors) == set(TENSORS)
        assert checkpoint.tensors["embed.weight"].shape == (6, 4)
        assert checkpoint.tensors["head.bias"].dtype is torch.bfloat16
        assert checkpoint.bytes == sum(t.nbytes for t in TENSORS.values())
        assert checkpoint.context is not None and checkpoint.context.model == "esm"
        assert [file.name for file in checkpoint.files] == ["model.safetensors"]


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_read_as_it_was_stored(folder: Path, name: str) -> None:
    with open_checkpoint(folder / "model.safetensors") as checkpoint:
        found = checkpoint.read(name)
    assert found.dtype == TENSORS[name].dtype and torch.equal(found, TENSORS[name])


def test_what_was_read_is_a_tensor_of_its_own(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        checkpoint.read("embed.weight").zero_()
        assert torch.equal(checkpoint.read("embed.weight"), TENSORS["embed.weight"])


@pytest.mark.parametrize(
    ("offsets", "sizes"), [((0, 0), (6, 4)), ((2, 1), (3, 2)), ((5, 3), (1, 1)), ((0, 2), (6, 0))]
)
def test_a_region_is_read_without_the_rest(
    folder: Path, offsets: tuple[int, int], sizes: tuple[int, int]
) -> None:
    rows, columns = (slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
    with open_checkpoint(folder) as checkpoint:
        found = checkpoint.read("embed.weight", (offsets, sizes))
        assert torch.equal(found, TENSORS["embed.weight"][rows, columns])
        read = sum(file.bytes_read for file in checkpoint.files)
        assert found.numel() == 24 or read < 2048


@pytest.mark.parametrize("region", [((0,), (6,)), ((0, 0), (7, 4)), ((-1, 0), (1, 1))])
def test_a_region_outside_of_the_tensor_is_refused(folder: Path, region: Any) -> None:
    with open_checkpoint(folder) as checkpoint, pytest.raises(ConfigError, match="shape"):
        checkpoint.read("embed.weight", region)


def test_an_unknown_tensor_is_refused_with_the_closest(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint, pytest.raises(ConfigError, match=r"embed\.weight"):
        checkpoint.read("embed.weigth")


def pieces_of(path: Path, pieces: list[Piece], shape: tuple[int, ...]) -> Checkpoint:
    contents = Contents((File.at(path),), {"w": StoredTensor(shape, torch.float32, tuple(pieces))})
    return Checkpoint(Folder.at(path), "made_up", contents, None)


def test_pieces_and_transposed_storage_come_out_right(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    path = tmp_path / "bytes"
    upper = whole[:2].contiguous()
    lower = whole[2:].t().contiguous()
    path.write_bytes(b"xyz" + upper.numpy().tobytes() + lower.numpy().tobytes())
    pieces = [
        Piece(0, 3, Box((0, 0), (2, 4), 0, (4, 1))),
        Piece(0, 3, Box((2, 0), (4, 4), 8, (1, 4))),
    ]
    with pieces_of(path, pieces, (6, 4)) as checkpoint:
        assert torch.equal(checkpoint.read("w"), whole)
        assert torch.equal(checkpoint.read("w", ((1, 1), (4, 2))), whole[1:5, 1:3])


def test_a_tensor_with_a_hole_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(64))
    pieces = [Piece(0, 0, Box((0, 0), (2, 4), 0, (4, 1)))]
    with pieces_of(path, pieces, (3, 4)) as checkpoint:
        assert checkpoint.read("w", ((0, 0), (2, 4))).shape == (2, 4)
        with pytest.raises(CorruptCheckpoint, match="8 of the 12"):
            checkpoint.read("w")


def test_the_digest_changes_with_headers_sizes_and_times(folder: Path) -> None:
    def digest() -> str:
        with open_checkpoint(folder) as checkpoint:
            return checkpoint.digest

    first = digest()
    assert len(first) == 64 and digest() == first
    (folder / "model.safetensors").touch()
    touched = digest()
    assert touched != first
    save_file({"renamed" if k == "scale" else k: v for k, v in TENSORS.items()}, folder / "x")
    (folder / "x").replace(folder / "model.safetensors")
    assert digest() not in (first, touched)


def test_the_public_names_are_these(folder: Path) -> None:
    with bioinit.open_checkpoint(folder) as checkpoint:
        assert isinstance(checkpoint, bioinit.Checkpoint)


# ---- refusals


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        {"compression_config": {"format": "dense"}},
    ],
)
def test_a_quantized_checkpoint_is_refused_with_the_cure(folder: Path, config: Any) -> None:
    write(folder, "config.json", config)
    with pytest.raises(RefusedCheckpoint, match="dequantize"):
        open_checkpoint(folder)
    with pytest.raises(RefusedCheckpoint):
        open_checkpoint(folder / "model.safetensors")


def test_null_says_that_nothing_is_quantized_or_remote(folder: Path) -> None:
    write(folder, "config.json", {"quantization_config": None, "auto_map": None})
    open_checkpoint(folder).close()


def test_remote_code_is_refused_and_named(folder: Path) -> None:
    (folder / "modeling_mine.py").write_text("raise SystemExit('this ran')")
    write(folder, "config.json", {"auto_map": {"AutoModel": "modeling_mine.Model"}})
    with pytest.raises(RefusedCheckpoint, match="modeling_mine"):
        open_checkpoint(folder)


def test_a_bare_adapter_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "adapter_config.json", {"peft_type": "LORA"})
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RefusedCheckpoint, match="merge_and_unload"):
        open_checkpoint(tmp_path)


def test_an_adapter_beside_a_whole_model_is_not_looked_at(folder: Path) -> None:
    write(folder, "adapter_config.json", {"peft_type": "LORA"})
    open_checkpoint(folder).close()


@pytest.mark.parametrize("uri", ["hf://org/name", "s3://bucket/key", "gs://b/k", "https://x/y"])
def test_what_is_not_local_is_to_be_downloaded_first(uri: str) -> None:
    for call in (open_checkpoint, load_context):
        with pytest.raises(StorageError, match="Download it first"):
            call(uri)


def test_a_path_with_equals_signs_and_dots_is_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "epoch=0-step=9-consumed_samples=20.0-last"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.path == folder and checkpoint.context is None


def test_a_missing_path_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1, "a": 2}'])
def test_a_damaged_config_is_corrupt(folder: Path, text: str) -> None:
    write(folder, "config.json", text)
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        open_checkpoint(folder)


# ---- contexts


def test_ours_is_preferred_and_the_other_one_is_beside_it(folder: Path) -> None:
    write(folder, "generation_config.json", {})
    save_context(make_record(Config, {"hidden_size": 9}), folder)
    context = find((Folder.at(folder),))
    assert context is not None
    assert context.dialect == "bioinit" and context.data["hidden_size"] == 9
    [other] = context.beside
    assert other.dialect == "hf" and list(context.carried) == ["generation_config.json"]


@pytest.mark.parametrize("subpath", ["model", "model.config"])
def test_the_model_s_fields_are_plain_data_in_both_dialects(folder: Path, subpath: str) -> None:
    assert load_context(folder, subpath=subpath) == {"model_type": "esm", "hidden_size": 4}
    assert load_context(folder, f"{subpath}.hidden_size") == 4
    assert load_context(folder)["model"]["hidden_size"] == 4
    save_context(make_record(Config, {"hidden_size": 9}), folder)
    assert load_context(folder, subpath=subpath)["hidden_size"] == 9
    assert load_context(folder / "context", f"{subpath}.hidden_size") == 9
    assert load_context(folder / "model.safetensors", subpath)["hidden_size"] == 9


@pytest.mark.parametrize(
    ("subpath", "says"),
    [
        ("data", "There is: model"),
        ("model.config.hiden_size", "'hidden_size'"),
        ("model.hidden_size.x", "single value"),
    ],
)
def test_a_missing_subpath_is_an_error_that_lists_what_there_is(
    folder: Path, subpath: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load_context(folder, subpath)


def test_a_folder_that_says_nothing_of_itself_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormat, match=r"config\.json"):
        load_context(tmp_path)
