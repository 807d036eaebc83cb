"""torch's distributed checkpoint, plain and as Megatron-Core and NeMo 2 write it."""

import io
import json
import pickle
import random
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from bioinit import formats
from bioinit.errors import (
    CheckpointError,
    CorruptCheckpoint,
    RefusedCheckpoint,
    UnfinishedCheckpoint,
    UnknownFormat,
)
from bioinit.formats.protocol import Contents
from bioinit.storage import Folder

MEGATRON_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
Chunks = Iterable[tuple[tuple[int, ...], Tensor]]
SQUARE = {"w": [((0, 0), torch.ones(2, 4)), ((2, 0), torch.zeros(2, 4))]}


def save(state: Mapping[str, object], folder: Path, **options: object) -> None:
    writer = dcp.FileSystemWriter(folder, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), storage_writer=writer, no_dist=True)


def write_tiny(folder: Path, state: dict[str, Tensor]) -> None:
    save(state, folder)


def write_tiny_in_threads(folder: Path, state: dict[str, Tensor]) -> None:
    save(state, folder, thread_count=3)


def write_tiny_one_file_each(folder: Path, state: dict[str, Tensor]) -> None:
    save(state, folder, single_file_per_rank=False)


def write_chunks(
    folder: Path,
    tensors: Mapping[str, Chunks],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    before: bytes = b"",
    objects: Iterable[str] = (),
    change: object = None,
) -> Metadata:
    """The chunks as ranks of one each would have stored them, with torch's own classes."""
    folder.mkdir(exist_ok=True)
    described: dict[str, object] = {name: BytesStorageMetadata() for name in objects}
    places: dict[MetadataIndex, _StorageInfo] = {}
    contents = {0: io.BytesIO(before)}
    contents[0].seek(0, io.SEEK_END)
    for name, chunks in tensors.items():
        chunks = list(chunks)
        rank = len(chunks[0][0])
        shape = [max((at[d] + t.shape[d] for at, t in chunks), default=0) for d in range(rank)]
        described[name] = TensorStorageMetadata(
            TensorProperties(dtype=chunks[0][1].dtype),
            torch.Size((shapes or {}).get(name, shape)),
            [ChunkStorageMetadata(torch.Size(at), t.shape) for at, t in chunks],
        )
        for number, (at, tensor) in enumerate(chunks):
            file = contents.setdefault(number % 3, io.BytesIO())
            begin = file.tell()
            torch.save(tensor, file)
            where = _StorageInfo(f"__{number % 3}_0.distcp", begin, file.tell() - begin)
            places[MetadataIndex(name, at, index=number)] = where
    metadata = Metadata(described, None, places, None, "1.0.0")
    if change is not None:
        change(metadata)
    for number, file in contents.items():
        (folder / f"__{number}_0.distcp").write_bytes(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return metadata


def write_megatron(
    folder: Path, tensors: Mapping[str, Chunks], common: object = None, **options: object
) -> None:
    """The same with the two files that Megatron adds."""
    write_chunks(folder, tensors, **options)
    torch.save({} if common is None else common, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(MEGATRON_CONFIG))


def opened(path: Path) -> Contents:
    name, contents = formats.open_weights(Folder.at(path))
    assert name == "torch_dist"
    return contents


def whole(contents: Contents, name: str) -> Tensor:
    """A tensor put together from its pieces."""
    stored = contents.tensors[name]
    made = torch.empty(stored.shape, dtype=stored.dtype)
    item = stored.dtype.itemsize
    for file, offset, box in stored.pieces:
        if 0 in box.sizes:
            continue
        steps = zip(box.sizes, box.strides, strict=True)
        reach = 1 + sum((size - 1) * step for size, step in steps)
        data = contents.files[file].read(offset + box.start * item, reach * item)
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(stored.dtype)
        region = tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))
        made[region] = flat.as_strided(box.sizes, box.strides)
    return made


def same_bits(one: Tensor, other: Tensor) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(-1).view(torch.uint8)

    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bool(torch.equal(bits(one), bits(other)))
    )


def random_cut(
    chance: random.Random, shape: tuple[int, ...], at: tuple[int, ...] | None = None, depth: int = 4
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes that tile ``shape``: cut at random planes, one part at a time."""
    at = (0,) * len(shape) if at is None else at
    if not depth or not shape or chance.random() < 0.2:
        return [(at, shape)]
    dim = chance.randrange(len(shape))
    cut = chance.randrange(shape[dim] + 1)
    low = (*shape[:dim], cut, *shape[dim + 1 :])
    high = (*shape[:dim], shape[dim] - cut, *shape[dim + 1 :])
    begin = (*at[:dim], at[dim] + cut, *at[dim + 1 :])
    return random_cut(chance, low, at, depth - 1) + random_cut(chance, high, begin, depth - 1)


DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
]


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return torch.randn(shape, generator=generator).mul(30).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype, tmp_path):
    shapes = {"matrix": (3, 5), "scalar": (), "empty": (0, 4), "one": (1,)}
    state = {name: noise(shape, dtype) for name, shape in shapes.items()}
    save(state, tmp_path)
    contents = opened(tmp_path)
    assert all(same_bits(whole(contents, name), tensor) for name, tensor in state.items())


def view_of(chance: random.Random, tensor: Tensor) -> Tensor:
    """The same values, lying in memory in one of the ways in which they may be saved."""
    way = chance.randrange(4)
    if way == 0 or not tensor.dim():
        return tensor
    if way == 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    larger = torch.zeros([n + 3 for n in tensor.shape], dtype=tensor.dtype)
    inside = larger[tuple(slice(way, way + n) for n in tensor.shape)]
    inside[...] = tensor
    return inside


@pytest.mark.parametrize("seed", range(40))
def test_any_cut_of_any_tensor_in_any_strides_is_put_together_again(seed, tmp_path):
    chance = random.Random(seed)
    tensors, chunks = {}, {}
    for number in range(3):
        shape = tuple(chance.randrange(1, 7) for _ in range(chance.randrange(4)))
        tensor = noise(shape, chance.choice(DTYPES), seed)
        tensors[f"t{number}"] = tensor
        cuts = random_cut(chance, shape)
        chance.shuffle(cuts)
        # Empty chunks that begin alike share one entry, as they do in torch.
        parts = {}
        for at, sizes in sorted(cuts, key=lambda cut: 0 not in cut[1]):
            region = tuple(slice(a, a + n) for a, n in zip(at, sizes, strict=True))
            parts[at] = (at, view_of(chance, tensor[region]))
        chunks[f"t{number}"] = list(parts.values())
    write_chunks(tmp_path, chunks, before=b"\0" * chance.randrange(9))
    contents = opened(tmp_path)
    for name, tensor in tensors.items():
        assert same_bits(whole(contents, name), tensor)


@pytest.mark.parametrize("option", [{}, {"thread_count": 2}, {"single_file_per_rank": False}])
def test_one_safetensors_image_per_file_is_read_in_place(option, tmp_path):
    state = {"a": noise((3, 4), torch.float32), "b": noise((5,), torch.bfloat16), "count": 3}
    save(state, tmp_path, serialization_format=SerializationFormat.SAFETENSORS, **option)
    contents = opened(tmp_path)
    assert same_bits(whole(contents, "a"), state["a"])
    assert same_bits(whole(contents, "b"), state["b"])
    assert contents.metadata["byte_objects"] == {"count": 1, "names": ["count"]}


def test_nested_state_and_its_objects_are_listed_by_their_dotted_names(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    state = {"app": {"model": model.state_dict(), "optim": optimizer.state_dict()}, "step": 4}
    save(state, tmp_path)
    contents = opened(tmp_path)
    kinds = {name: stored.kind for name, stored in contents.tensors.items()}
    assert kinds["app.model.weight"] == kinds["app.model.bias"] == "weight"
    assert kinds["app.optim.state.0.exp_avg"] == "optimizer"
    assert {n for n, k in kinds.items() if k == "weight"} == {"app.model.weight", "app.model.bias"}
    assert "step" in contents.metadata["byte_objects"]["names"]
    moment = optimizer.state_dict()["state"][0]["exp_avg"]
    assert same_bits(whole(contents, "app.optim.state.0.exp_avg"), moment)


OPTIMIZERS = [
    "optimizer.state.exp_avg.module.decoder.layers.mlp.linear_fc1.weight",
    "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.param",
    "chained_1.optimizer.state.fp32_param.module.output_layer.weight",
    "optim.state.layers.0.wq.weight.exp_avg",
    "optimizer.param_groups.layers.0.wq.weight.lr",
    "optimizer_states.0.exp_avg",
    "generator_optim.state.0.step",
    "app.optim.state.0.step",
]
PERHAPS = ["train_state.step", "lr_scheduler.last_epoch", "scaler.mean", "loops.0", "rng.state"]


@pytest.mark.parametrize("beside", ["net.weight", "model.net.weight"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_an_optimizer_is_no_weight_whatever_lies_beside_it(name, beside, tmp_path):
    save({name: torch.ones(2), beside: torch.ones(2)}, tmp_path)
    kinds = {key: stored.kind for key, stored in opened(tmp_path).tensors.items()}
    assert kinds == {name: "optimizer", beside: "weight"}


@pytest.mark.parametrize("name", PERHAPS)
def test_modules_that_are_called_like_state_of_training_are_weights_of_a_bare_model(name, tmp_path):
    save({name: torch.ones(2), "net.weight": torch.ones(2)}, tmp_path)
    assert {stored.kind for stored in opened(tmp_path).tensors.values()} == {"weight"}


@pytest.mark.parametrize("name", PERHAPS)
@pytest.mark.parametrize("container", ["model", "app", "module", "state_dict"])
def test_beside_a_model_in_a_container_they_are_state_of_training(name, container, tmp_path):
    save({name: torch.ones(2), f"{container}.net.weight": torch.ones(2)}, tmp_path)
    assert opened(tmp_path).tensors[name].kind == "optimizer"


@pytest.mark.parametrize("name", PERHAPS)
def test_what_megatron_wrote_beside_its_weights_is_state_of_training(name, tmp_path):
    write_megatron(tmp_path, {name: [((0,), torch.ones(2))], "w.weight": [((0,), torch.ones(2))]})
    assert opened(tmp_path).tensors[name].kind == "optimizer"


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.0.weight", "optimizer", "head.state.weight", "w", "optimized.head.weight"),
        *("optim_proj.weight", "decoder.optimizer.weight"),
    ],
)
def test_weights_are_no_state_of_training(name, tmp_path):
    save({name: torch.ones(2), "net.weight": torch.ones(2)}, tmp_path)
    assert opened(tmp_path).tensors[name].kind == "weight"


def test_optimizer_tensors_are_listed_unread_and_readable_in_any_part(tmp_path):
    moment, flat = noise((5, 6), torch.float32), noise((11,), torch.bfloat16)
    chunks = {
        "w": [((0,), torch.ones(2))],
        "optimizer.state.exp_avg.w": [
            ((0, 0), moment[:2].t().contiguous().t()),
            ((2, 0), moment[2:, :3]),
            ((2, 3), moment[2:, 3:]),
        ],
        "optimizer.state.flat": [((0,), flat[:4]), ((4,), flat[4:])],
    }
    write_chunks(tmp_path, chunks)
    contents = opened(tmp_path)
    assert contents.tensors["optimizer.state.flat"].kind == "optimizer"
    read = sum(file.bytes_read for file in contents.files[:-1])
    assert read < 4000, "more than one item was looked at"
    assert same_bits(whole(contents, "optimizer.state.exp_avg.w"), moment)
    assert same_bits(whole(contents, "optimizer.state.flat"), flat)
    made = contents.files[-1]
    everything = made.read(0, made.size)
    assert all(
        made.read(at, size) == everything[at : at + size]
        for at in range(0, made.size, 7)
        for size in (0, 1, 8, min(90, made.size - at))
        if at + size <= made.size
    )


def test_optimizer_chunks_that_do_not_fill_their_tensor_do_not_keep_weights_from_opening(tmp_path):
    chunks = {"w": [((0,), torch.ones(2))], "optimizer.state.x": [((3,), torch.ones(2))]}
    write_chunks(tmp_path, chunks)
    contents = opened(tmp_path)
    assert set(contents.tensors) == {"w"}
    assert "no chunk holds 0 to 3" in contents.metadata["unreadable"]["optimizer.state.x"]


def test_a_chunk_is_one_small_read_once_an_alike_one_was_seen(tmp_path):
    layers = [((i, 0), torch.full((1, 4000), float(i))) for i in range(50)]
    write_chunks(tmp_path, {"w": layers})
    contents = opened(tmp_path)
    assert sum(file.bytes_read for file in contents.files) < 3 * 66_000 + 50 * 1100
    assert same_bits(whole(contents, "w"), torch.cat([t for _, t in layers]))


def test_dims_of_one_that_the_item_lacks_are_put_back(tmp_path):
    tensor = noise((3, 4), torch.float32)

    def stack(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["w"]
        entry.size = torch.Size((1, 3, 1, 4))
        entry.chunks = [ChunkStorageMetadata(torch.Size((0, 0, 0, 0)), torch.Size((1, 3, 1, 4)))]
        ((_, place),) = metadata.storage_data.items()
        metadata.storage_data = {MetadataIndex("w", torch.Size((0, 0, 0, 0))): place}

    write_chunks(tmp_path, {"w": [((0, 0), tensor)]}, change=stack)
    assert same_bits(whole(opened(tmp_path), "w"), tensor.view(1, 3, 1, 4))


def test_megatrons_files_tell_the_writer_and_its_layout(tmp_path):
    from argparse import Namespace

    args = Namespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=4, hidden_size=8)
    common = {"args": args, "iteration": 7, "checkpoint_version": 3.0}
    objects = [f"decoder.layers.{i}.mlp._extra_state/shard_{i}_2" for i in range(2)]
    write_megatron(tmp_path, SQUARE, common, objects=objects)
    metadata = opened(tmp_path).metadata
    assert metadata["parallel"] == {"tensor": 2, "pipeline": 4}
    assert metadata["iteration"] == 7 and metadata["checkpoint_version"] == 3.0
    assert metadata["writer"] == "Megatron-LM, torch.distributed.checkpoint 1.0.0"
    assert metadata["byte_objects"] == {"count": 2, "names": ["decoder.layers.*.mlp._extra_state"]}
    assert metadata["objects"]["args"]["state"]["hidden_size"] == 8
    json.dumps(metadata)


@pytest.mark.parametrize(
    ("common", "beside", "program"),
    [
        ({"pytorch-lightning_version": "2.5.0", "global_step": 3}, (), "NeMo 2 (Lightning 2.5.0)"),
        ({"iteration": 3}, ("run_config.yaml",), "Megatron-Bridge"),
        ({"iteration": 3}, (), "megatron-core"),
    ],
)
def test_the_program_that_wrote_it_is_told_by_what_it_leaves(common, beside, program, tmp_path):
    write_megatron(tmp_path, SQUARE, common)
    for name in beside:
        (tmp_path / name).write_text("model: {}")
    metadata = opened(tmp_path).metadata
    assert metadata["writer"].startswith(f"{program}, torch")
    assert metadata["iteration"] == 3


@pytest.mark.parametrize(
    ("name", "ranks"), [("esm2_tp1", 1), ("esm2_tp2", 2), ("llama_tp1", 1)], ids=str
)
def test_what_nemo_2_wrote_is_read_as_torch_reads_it(name, ranks, fixtures_dir):
    folder = fixtures_dir / "nemo2" / name / "weights"
    contents = opened(folder)
    state = {
        key: torch.empty(stored.shape, dtype=stored.dtype)
        for key, stored in contents.tensors.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert state and all(same_bits(whole(contents, key), state[key]) for key in state)
    assert contents.metadata["parallel"] == {"tensor": ranks}
    assert contents.metadata["layout"].endswith(f"by {ranks} rank{'s' if ranks > 1 else ''}")
    assert contents.metadata["writer"].startswith("NeMo 2")
    names = contents.metadata["byte_objects"]["names"]
    assert names and all(name.endswith("._extra_state") for name in names)


def test_an_index_per_rank_is_read_as_one(tmp_path):
    whole_index = write_chunks(tmp_path, SQUARE)
    entry = whole_index.state_dict_metadata["w"]
    for rank, (index, place) in enumerate(whole_index.storage_data.items()):
        mine = TensorStorageMetadata(entry.properties, entry.size, [entry.chunks[rank]])
        part = Metadata({"w": mine}, None, {index: place})
        (tmp_path / f"__{rank}.metadata").write_bytes(pickle.dumps(part))
    (tmp_path / ".metadata").unlink()
    contents = opened(tmp_path)
    assert same_bits(whole(contents, "w"), torch.cat([t for _, t in SQUARE["w"]]))


def write_ranks(folder: Path) -> None:
    """Two ranks that did not talk to each other, each with a file and an index of its own."""
    for rank in (0, 1):
        alone = folder / f"rank{rank}"
        save({f"t{rank}": torch.ones(2)}, alone)
        (alone / ".metadata").rename(folder / f"__{rank}.metadata")
        (alone / "__0_0.distcp").rename(folder / f"__{rank}_0.distcp")
        alone.rmdir()
    index = pickle.loads((folder / "__1.metadata").read_bytes())
    for place in index.storage_data.values():
        place.relative_path = "__1_0.distcp"
    (folder / "__1.metadata").write_bytes(pickle.dumps(index))


def test_a_rank_without_its_index_is_unfinished(tmp_path):
    write_ranks(tmp_path)
    assert set(opened(tmp_path).tensors) == {"t0", "t1"}
    (tmp_path / "__1.metadata").unlink()
    with pytest.raises(UnfinishedCheckpoint, match=r"__1\.metadata.* is missing"):
        opened(tmp_path)


def test_a_file_that_the_index_of_its_rank_does_not_name_is_unfinished(tmp_path):
    write_ranks(tmp_path)
    (tmp_path / "__1_1.distcp").write_bytes(b"x")
    with pytest.raises(UnfinishedCheckpoint, match=r"__1_1.*__1\.metadata.* does not name it"):
        opened(tmp_path)


def test_files_of_another_save_that_no_index_names_are_said(tmp_path):
    save({"w": torch.ones(2)}, tmp_path)
    assert "ignored" not in opened(tmp_path).metadata
    (tmp_path / "__7_0.distcp").write_bytes((tmp_path / "__0_0.distcp").read_bytes())
    (tmp_path / "__8_0.distcp").touch()
    assert opened(tmp_path).metadata["ignored"] == {"__7_0.distcp": "no index names it"}


def test_a_step_of_bridge_that_was_stopped_at_once_is_unfinished(tmp_path):
    (tmp_path / "run_config.yaml").write_text("model: {}")
    torch.save({"step": torch.tensor(1)}, tmp_path / "train_state.pt")
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(UnfinishedCheckpoint, match=r"no \.metadata"):
        opened(tmp_path)


def test_a_step_of_bridge_without_megatrons_files_names_its_writer(tmp_path):
    save({"scaler.mean": torch.ones(2), "w.weight": torch.ones(2)}, tmp_path)
    (tmp_path / "run_config.yaml").write_text("model: {}")
    torch.save({"step": torch.tensor(1)}, tmp_path / "train_state.pt")
    found = opened(tmp_path)
    assert found.metadata["writer"].startswith("Megatron-Bridge, torch")
    assert found.tensors["scaler.mean"].kind == "optimizer"


def test_an_index_larger_than_any_is_not_even_read(tmp_path):
    save({"w": torch.ones(2)}, tmp_path)
    with open(tmp_path / ".metadata", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptCheckpoint, match="no index has more than"):
        opened(tmp_path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("place", ["last", "first", "in a name"])
def test_the_plans_that_megatron_appends_are_passed_over_wherever_they_are(
    protocol, place, tmp_path
):
    def add_plans(metadata: Metadata) -> None:
        plans = [[MetadataIndex("w", (0, 0))] * 3]
        before = dict(metadata.__dict__)
        if place == "first":
            metadata.__dict__.clear()
        metadata.all_local_plans = plans
        metadata.__dict__.update(before)
        if place == "in a name":
            metadata.state_dict_metadata["all_local_plans"] = BytesStorageMetadata()

    index = write_chunks(tmp_path, SQUARE, change=add_plans)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index, protocol=protocol))
    assert same_bits(whole(opened(tmp_path), "w"), torch.cat([t for _, t in SQUARE["w"]]))


def test_an_index_of_old_torch_is_read(tmp_path):
    def age(metadata: Metadata) -> None:
        for name in ("storage_meta", "version"):
            del metadata.__dict__[name]
        metadata.planner_data = {"w": ("w",)}

    write_chunks(tmp_path, SQUARE, change=age)
    assert set(opened(tmp_path).tensors) == {"w"}
    assert "before 1.0.0" in opened(tmp_path).metadata["writer"]


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_one_of_its_files_stands_for_the_folder(name, tmp_path):
    write_chunks(tmp_path, SQUARE)
    contents = formats.open_weights(Folder.at(tmp_path / name))[1]
    assert set(contents.tensors) == {"w"}


# What was not finished


def test_without_an_index_it_is_unfinished(tmp_path):
    write_chunks(tmp_path, SQUARE)
    (tmp_path / ".metadata").rename(tmp_path / ".metadata.tmp")
    with pytest.raises(UnfinishedCheckpoint, match=r"2 \.distcp files.*\.metadata\.tmp"):
        opened(tmp_path)


def test_missing_files_are_counted_and_named(tmp_path):
    write_chunks(tmp_path, SQUARE)
    (tmp_path / "__1_0.distcp").unlink()
    with pytest.raises(UnfinishedCheckpoint, match=r"lacks 1 of the 2 files.*__1_0\.distcp"):
        opened(tmp_path)
    (tmp_path / "__0_0.distcp").unlink()
    with pytest.raises(UnfinishedCheckpoint, match="lacks 2 of the 2 files"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["metadata.json", "common.pt"])
def test_megatrons_files_belong_together(name, tmp_path):
    write_megatron(tmp_path, SQUARE)
    (tmp_path / name).unlink()
    with pytest.raises(UnfinishedCheckpoint, match=name.replace(".", r"\.")):
        opened(tmp_path)


def test_only_the_file_that_megatron_writes_first_is_unfinished(tmp_path):
    torch.save({"iteration": 1}, tmp_path / "common.pt")
    with pytest.raises(UnfinishedCheckpoint):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sharded_backend_version": 2}, "sharded_backend_version 2"),
        ({"common_backend": "msgpack"}, "common_backend 'msgpack'"),
        ({"sharded_backend": "another"}, "sharded_backend 'another'"),
    ],
)
def test_another_version_of_megatrons_format_is_refused_with_what_it_says(change, said, tmp_path):
    write_megatron(tmp_path, SQUARE)
    (tmp_path / "metadata.json").write_text(json.dumps({**MEGATRON_CONFIG, **change}))
    with pytest.raises(RefusedCheckpoint, match=said):
        opened(tmp_path)


def test_keys_that_megatron_may_add_are_passed_over(tmp_path):
    write_megatron(tmp_path, SQUARE)
    (tmp_path / "metadata.json").write_text(json.dumps({**MEGATRON_CONFIG, "written": "today"}))
    assert set(opened(tmp_path).tensors) == {"w"}


# What contradicts itself, and what is refused


def changed(what: str, **values: object):
    """A change of every place in the index, or of every entry for a tensor."""

    def change(metadata: Metadata) -> None:
        held = metadata.storage_data if what == "place" else metadata.state_dict_metadata
        for entry in held.values():
            for name, value in values.items():
                object.__setattr__(entry, name, value)

    return change


@pytest.mark.parametrize("path", ["/etc/passwd", "../other/__0_0.distcp", "a/../../b", "", "./x"])
def test_a_place_outside_the_folder_is_refused(path, tmp_path):
    write_chunks(tmp_path, SQUARE, change=changed("place", relative_path=path))
    with pytest.raises(RefusedCheckpoint, match="leads out of it"):
        opened(tmp_path)


def test_an_item_that_went_through_a_codec_is_refused_with_its_name(tmp_path):
    write_chunks(tmp_path, SQUARE, change=changed("place", transform_descriptors=["stream.zstd"]))
    with pytest.raises(RefusedCheckpoint, match=r"stream\.zstd"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        changed("place", offset=3),
        changed("place", offset=-1),
        changed("place", offset=1 << 80),
        changed("place", length=100),
        changed("place", length=1 << 62),
        changed("place", offset=None),
        changed("place", relative_path=None),
        changed("tensor", size=torch.Size((5, 4))),
        changed("tensor", size=torch.Size((3, 4))),
        changed("tensor", size=torch.Size((1 << 40, 1 << 40))),
        changed("tensor", size=[1, "4"]),
        changed("tensor", size=None),
        changed("tensor", chunks=[]),
        changed("tensor", chunks=None),
        changed("tensor", chunks=[3]),
        changed("tensor", properties=None),
        changed("tensor", properties=TensorProperties(dtype=torch.float64)),
        changed("tensor", properties=TensorProperties(dtype=torch.int32)),
        lambda metadata: metadata.storage_data.clear(),
        lambda metadata: setattr(metadata, "storage_data", None),
        lambda metadata: setattr(metadata, "state_dict_metadata", [1]),
        lambda metadata: metadata.state_dict_metadata.update({3: 4}),
    ],
)
def test_an_index_that_contradicts_itself_or_its_files_is_corrupt(change, tmp_path):
    write_chunks(tmp_path, SQUARE, change=change)
    with pytest.raises(CorruptCheckpoint):
        opened(tmp_path)


def test_chunks_that_overlap_or_leave_a_gap_are_corrupt(tmp_path):
    write_chunks(tmp_path, {"w": [((0,), torch.ones(3)), ((2,), torch.ones(3))]})
    with pytest.raises(CorruptCheckpoint, match="overlap"):
        opened(tmp_path)
    write_chunks(tmp_path, {"w": [((0,), torch.ones(3)), ((4,), torch.ones(3))]})
    with pytest.raises(CorruptCheckpoint, match="no chunk holds 3 to 4"):
        opened(tmp_path)


def test_an_index_of_an_optimizer_that_names_no_file_is_corrupt(tmp_path):
    chunks = {"optimizer.state.x": [((0,), torch.ones(2))]}
    write_chunks(tmp_path, chunks, change=lambda metadata: metadata.storage_data.clear())
    with pytest.raises(CorruptCheckpoint, match="but no file"):
        opened(tmp_path)


def test_items_that_overlap_are_corrupt(tmp_path):
    def overlap(metadata: Metadata) -> None:
        first, second = metadata.storage_data.values()
        second.relative_path, second.offset = first.relative_path, first.length // 2

    write_chunks(tmp_path, SQUARE, change=overlap)
    with pytest.raises(CorruptCheckpoint, match="inside another one"):
        opened(tmp_path)


@pytest.mark.parametrize("state", [["a", "b"], ["a", "a"]], ids=["two tensors", "two chunks"])
def test_an_item_is_one_chunk_of_one_tensor(state, tmp_path):
    """Both would be given the same numbers."""

    def alias(metadata: Metadata) -> None:
        first, second = metadata.storage_data.values()
        second.__dict__.update(first.__dict__)

    names = dict.fromkeys(state)
    chunks = [((0,), torch.ones(2)), ((2,), torch.zeros(2))]
    tensors = {"a": chunks} if len(names) == 1 else {n: chunks[:1] for n in names}
    write_chunks(tmp_path, tensors, change=alias)
    with pytest.raises(CorruptCheckpoint, match=r"'a'.* lie in the same item of __0_0\.distcp"):
        opened(tmp_path)


def test_items_do_not_lie_in_an_image_of_other_tensors(tmp_path):
    save({"a": torch.ones(2), "b": torch.ones(9)}, tmp_path)
    image = tmp_path / "image"
    save({"a": torch.ones(2)}, image, serialization_format=SerializationFormat.SAFETENSORS)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    places = {index.fqn: place for index, place in metadata.storage_data.items()}
    first = (image / "__0_0.distcp").read_bytes()
    second = (tmp_path / "__0_0.distcp").read_bytes()[places["b"].offset :][: places["b"].length]
    (tmp_path / "__0_0.distcp").write_bytes(first + second)
    places["a"].offset, places["a"].length, places["b"].offset = 0, 0, len(first)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptCheckpoint, match="other items"):
        opened(tmp_path)


def test_any_number_of_names_of_one_item_cost_one_look_at_it(tmp_path):
    write_chunks(tmp_path, {"optimizer.state.x": [((0,), torch.arange(3.0))]})
    contents = opened(tmp_path)
    made = contents.files[-1]
    made.read(0, 12)
    before = contents.files[0].bytes_read
    assert made.read(0, 12) == torch.arange(3.0).numpy().tobytes()
    assert contents.files[0].bytes_read == before + 12


def test_a_chunk_that_torchs_writer_lost_is_said(tmp_path):
    """Two chunks of a tensor in one safetensors image: the writer keeps the last."""
    save({"w": torch.ones(2)}, tmp_path, serialization_format=SerializationFormat.SAFETENSORS)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["w"]
    entry.size, entry.chunks = (
        torch.Size((4,)),
        [ChunkStorageMetadata(torch.Size((at,)), torch.Size((2,))) for at in (0, 2)],
    )
    (place,) = metadata.storage_data.values()
    metadata.storage_data = {MetadataIndex("w", torch.Size((at,))): place for at in (0, 2)}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptCheckpoint, match="kept only one of several chunks"):
        opened(tmp_path)


def test_one_list_of_chunks_named_many_times_costs_nothing(tmp_path):
    chunk = ChunkStorageMetadata(torch.Size((0,)), torch.Size((1,)))
    entry = TensorStorageMetadata(TensorProperties(), torch.Size((1,)), [chunk] * 5000)
    metadata = Metadata({f"t{i}": entry for i in range(5000)}, None, {})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptCheckpoint, match="more chunks than the index has room for"):
        opened(tmp_path)


class Call:
    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def test_nothing_that_a_pickle_asks_for_is_called(tmp_path):
    flag = tmp_path / "called"
    write_megatron(tmp_path, SQUARE, {"x": Call(exec, f"open({str(flag)!r}, 'w')")})
    opened(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Call(exec, f"open({str(flag)!r}, 'w')")))
    with pytest.raises(CheckpointError):
        formats.open_weights(Folder.at(tmp_path))
    assert not flag.exists()


def test_a_tensor_that_only_code_could_make_is_refused(tmp_path):
    class Wrapped(torch.Tensor):
        def __reduce_ex__(self, protocol):
            return eval, ("1",)

    write_chunks(tmp_path, {"w": [((0,), torch.ones(2).as_subclass(Wrapped))]})
    with pytest.raises(RefusedCheckpoint, match="'w'"):
        opened(tmp_path)


def test_a_file_that_happens_to_be_called_like_the_index_is_not_recognized(tmp_path):
    (tmp_path / ".metadata").write_text("created by somebody else")
    with pytest.raises(UnknownFormat):
        formats.open_weights(Folder.at(tmp_path))


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_in_the_index_is_an_error_of_ours_or_harmless(seed, tmp_path):
    write_megatron(tmp_path, {**SQUARE, "optimizer.state.w": [((0,), torch.ones(3))]})
    index = tmp_path / ".metadata"
    data, chance = index.read_bytes(), random.Random(seed)
    for _ in range(150):
        at = chance.randrange(len(data))
        index.write_bytes(data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :])
        try:
            contents = formats.open_weights(Folder.at(tmp_path))[1]
            for name in contents.tensors:
                whole(contents, name)
        except CheckpointError:
            continue
