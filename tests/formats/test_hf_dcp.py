"""torch's distributed checkpoint for the hub: pieces of tensors in safetensors files."""

import json
import random
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from bioinit import formats
from bioinit.errors import CorruptCheckpoint, UnfinishedCheckpoint
from bioinit.storage import Folder


def write_tiny(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Written by torch's own writer, as one rank."""
    writer = dcp.HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), storage_writer=writer, no_dist=True)


def write_parts(folder: Path, parts: list[dict[str, tuple[tuple[int, ...], torch.Tensor]]]) -> None:
    """One file per rank, as the same writer names and notes them."""
    folder.mkdir(exist_ok=True)
    for rank, part in enumerate(parts, 1):
        noted = {name: {"saved_offsets": list(at)} for name, (at, _) in part.items()}
        save_file(
            {name: tensor.contiguous() for name, (_, tensor) in part.items()},
            folder / f"shard-{rank:05}-model-00001-of-00001.safetensors",
            metadata={"DCP_SHARDING_INFO": json.dumps(noted), "DCP_VERSION": "1.0", "format": "pt"},
        )


def opened(path: Path):
    return formats.open_weights(Folder.at(path))


def whole(contents, name: str) -> torch.Tensor:
    stored = contents.tensors[name]
    made = torch.empty(stored.shape, dtype=stored.dtype)
    for file, offset, box in stored.pieces:
        count = made.new_empty(box.sizes).numel()
        if not count:
            continue
        data = contents.files[file].read(offset, count * stored.dtype.itemsize)
        region = tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))
        flat = torch.frombuffer(bytearray(data), dtype=stored.dtype)
        made[region] = flat.view(box.sizes)
    return made


def test_pieces_of_one_tensor_in_several_files_are_merged(tmp_path):
    x, y = torch.randn(7, 4), torch.arange(5)
    write_parts(
        tmp_path,
        [
            {"x": ((0, 0), x[:3]), "y": ((0,), y)},
            {"x": ((3, 0), x[3:, :1])},
            {"x": ((3, 1), x[3:, 1:])},
        ],
    )
    name, contents = opened(tmp_path)
    assert name == "hf_dcp"
    assert torch.equal(whole(contents, "x"), x) and torch.equal(whole(contents, "y"), y)
    assert len(contents.tensors["x"].pieces) == 3


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_along_the_first_dim_is_put_together_again(seed, tmp_path):
    chance = random.Random(seed)
    x = torch.randn(chance.randrange(1, 20), chance.randrange(1, 5))
    cuts = sorted(chance.randrange(len(x) + 1) for _ in range(chance.randrange(5)))
    parts = zip([0, *cuts], [*cuts, len(x)], strict=True)
    write_parts(tmp_path, [{"x": ((a, 0), x[a:b])} for a, b in parts])
    assert torch.equal(whole(opened(tmp_path)[1], "x"), x)


def test_the_merged_files_beside_the_parts_are_what_is_read(tmp_path):
    x = torch.randn(4, 2)
    write_parts(tmp_path / "sharded", [{"x": ((0, 0), x[:2])}, {"x": ((2, 0), x[2:])}])
    alone = opened(tmp_path)
    assert alone[0] == "hf_dcp" and torch.equal(whole(alone[1], "x"), x)
    save_file({"x": x + 1}, tmp_path / "model-00001-of-00001.safetensors")
    name, contents = opened(tmp_path)
    assert name == "safetensors" and torch.equal(whole(contents, "x"), x + 1)
    assert opened(tmp_path / "sharded")[0] == "hf_dcp"


def test_the_folder_that_automodel_keeps_the_config_in_is_searched_for_one(tmp_path):
    model = tmp_path / "model"
    write_parts(model, [{"x": ((0,), torch.zeros(2))}])
    (model / ".hf_metadata").mkdir()
    (tmp_path / "optim").mkdir()
    for path in (tmp_path, model):
        name, contents = opened(path)
        assert name == "hf_dcp" and set(contents.tensors) == {"x"}
        assert model / ".hf_metadata" in [home.path for home in contents.homes]


FOUR = [{"x": ((2 * rank, 0), torch.full((2, 3), float(rank)))} for rank in range(4)]
FIRST, LAST = (f"shard-{rank:05}-model-00001-of-00001.safetensors" for rank in (1, 4))


def write_index(folder: Path, total: object, *names: str) -> None:
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_that_nobody_knows_how_many_ranks_there_were_is_said(tmp_path):
    write_parts(tmp_path, FOUR)
    (tmp_path / LAST).unlink()
    metadata = opened(tmp_path)[1].metadata
    assert "how many ranks" in metadata["doubt"] and "those of 3 are there" in metadata["doubt"]
    assert metadata["layout"].startswith("3 files by 3 ranks, and the files do not say how many")


def test_one_rank_alone_is_no_doubt(tmp_path):
    write_parts(tmp_path, FOUR[:1])
    assert "doubt" not in opened(tmp_path)[1].metadata


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_the_files_of_an_earlier_rank_are_missed_though_the_rest_would_fit(missing, tmp_path):
    write_parts(tmp_path, [{f"t{rank}": ((0,), torch.ones(1))} for rank in range(4)])
    (tmp_path / f"shard-{missing:05}-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(UnfinishedCheckpoint, match=f"shard-{missing:05}-model.* is missing"):
        opened(tmp_path)


def test_ranks_may_be_counted_from_0(tmp_path):
    write_parts(tmp_path, FOUR[:2])
    for rank in (1, 2):
        name = "shard-{:05}-model-00001-of-00001.safetensors"
        (tmp_path / name.format(rank)).rename(tmp_path / name.format(rank - 1))
    assert torch.equal(whole(opened(tmp_path)[1], "x")[2:], torch.ones(2, 3))


@pytest.mark.parametrize("inside", ["", "sharded", "consolidated"])
def test_an_index_of_the_merged_files_tells_whether_all_ranks_are_there(inside, tmp_path):
    parts = tmp_path / ("sharded" if inside == "sharded" else "")
    write_parts(parts, FOUR)
    home = tmp_path / ("consolidated" if inside == "consolidated" else "")
    home.mkdir(exist_ok=True)
    write_index(home, 4 * 2 * 3 * 4, "x")
    metadata = opened(tmp_path)[1].metadata
    assert "doubt" not in metadata and metadata["layout"] == "4 files by 4 ranks"
    (parts / LAST).unlink()
    with pytest.raises(UnfinishedCheckpoint, match=r"counts 96 bytes.* hold 72"):
        opened(tmp_path)
    write_index(home, 72, "x", "of.rank.4")
    with pytest.raises(UnfinishedCheckpoint, match=r"lists 'of\.rank\.4'"):
        opened(tmp_path)


@pytest.mark.parametrize("total", [None, "96", 10])
def test_an_index_that_does_not_count_what_is_there_dispels_no_doubt(total, tmp_path):
    write_parts(tmp_path, FOUR)
    write_index(tmp_path, total, "x")
    assert "doubt" in opened(tmp_path)[1].metadata


def test_a_rank_that_had_nothing_to_store_is_not_missed_if_an_index_counts_the_rest(tmp_path):
    write_parts(tmp_path, [FOUR[0], {"y": ((0,), torch.ones(1))}, FOUR[1]])
    (tmp_path / "shard-00002-model-00001-of-00001.safetensors").unlink()
    write_index(tmp_path, 48, "x")
    assert "doubt" not in opened(tmp_path)[1].metadata


def test_a_note_far_longer_than_the_tensors_it_is_about_is_corrupt(tmp_path):
    note = json.dumps({"x": {"saved_offsets": [0]}, "y": [[]] * 400})
    save_file({"x": torch.zeros(2)}, tmp_path / FIRST, metadata={"DCP_SHARDING_INFO": note})
    with pytest.raises(CorruptCheckpoint, match=r"takes .* letters"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["\U0001f9ec" * 200, "\x01" * 200, "x"])
def test_a_note_about_odd_names_is_not_too_long(name, tmp_path):
    far = {f"{name}{i}": (((1 << 62),) * 8, torch.zeros((0,) * 8)) for i in range(20)}
    write_parts(tmp_path, [far])
    with pytest.raises(CorruptCheckpoint, match=r"^(?!.*letters)"):
        opened(tmp_path)


def test_torch_reads_the_same(tmp_path):
    x = torch.randn(6, 3)
    write_parts(tmp_path, [{"x": ((0, 0), x[:2])}, {"x": ((2, 0), x[2:])}])
    state = {"x": torch.zeros(6, 3)}
    reader = dcp.HuggingFaceStorageReader(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader, no_dist=True)
    assert torch.equal(whole(opened(tmp_path)[1], "x"), state["x"])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([{"x": ((0,), torch.zeros(2))}, {"x": ((3,), torch.zeros(2))}], "no chunk holds 2 to 3"),
        ([{"x": ((0,), torch.zeros(2))}, {"x": ((1,), torch.zeros(2))}], "overlap"),
        ([{"x": ((1 << 62,), torch.zeros(2))}], "no chunk holds 0 to"),
        ([{"x": ((0, 0), torch.zeros(2))}], "does not say where"),
        ([{"x": ((-1,), torch.zeros(2))}], "does not say where"),
        (
            [{"x": ((0,), torch.zeros(2))}, {"x": ((2,), torch.zeros(2, dtype=torch.int8))}],
            "torch.int8",
        ),
        ([{"x": ((0,), torch.zeros(2))}, {"x": ((2, 0), torch.zeros(2, 1))}], "Fetch or write"),
    ],
)
def test_pieces_that_do_not_make_a_tensor_are_corrupt(parts, said, tmp_path):
    write_parts(tmp_path, parts)
    with pytest.raises(CorruptCheckpoint, match=said):
        opened(tmp_path)


@pytest.mark.parametrize("note", ["[", "[]", '{"x": 3}', '{"x": {"saved_offsets": [true]}}', "{}"])
def test_a_note_that_says_nothing_is_corrupt(note, tmp_path):
    save_file(
        {"x": torch.zeros(2)},
        tmp_path / "shard-00001-model-00001-of-00001.safetensors",
        metadata={"DCP_SHARDING_INFO": note},
    )
    with pytest.raises(CorruptCheckpoint, match="DCP_SHARDING_INFO"):
        opened(tmp_path)


def test_parts_of_two_checkpoints_are_not_mixed(tmp_path):
    write_parts(tmp_path, [{"x": ((0,), torch.zeros(2))}])
    save_file({"y": torch.zeros(1)}, tmp_path / "shard-00001-model-00001-of-00002.safetensors")
    with pytest.raises(CorruptCheckpoint, match="several checkpoints"):
        opened(tmp_path)
