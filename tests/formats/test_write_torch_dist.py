"""Distributed checkpoints as we write them, read by torch, by megatron-core and by ourselves."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from bioinit.contexts import open_checkpoint
from bioinit.errors import StorageError, UnfinishedCheckpoint
from bioinit.formats import _filling
from bioinit.formats.protocol import Outgoing
from bioinit.formats.torch_dist import parts
from bioinit.formats.torch_dist.index import Index, read_index
from bioinit.storage import File, Journal
from tests.writing import Killed, Source, assert_same, read, values, write

OPENER = "tests.formats.megatron_opener"
LAYOUTS = ("tp1", "tp2_swiglu", "pp2_swiglu_bf16", "ep2_moe")
SECONDS = 240
LAYERS = "module.decoder.layers"
STATE = {
    "module.embedding.word_embeddings.weight": values((50, 16), torch.bfloat16, 1),
    f"{LAYERS}.self_attention.linear_qkv.weight": values((3, 48, 16), torch.float32, 2),
    f"{LAYERS}.mlp.experts.experts.linear_fc1.weight": values((3, 4, 24, 16), torch.float32, 3),
    f"{LAYERS}.input_layernorm.weight": values((3, 16), torch.float32, 4),
    "module.decoder.final_layernorm.weight": values((16,), torch.float32, 5),
}
EXTRA = f"{LAYERS}.self_attention.linear_qkv._extra_state/shard_%d_3"
OBJECTS = {EXTRA % 0: b"", EXTRA % 1: b"what it keeps", EXTRA % 2: b""}


@pytest.fixture
def in_small_parts(monkeypatch):
    monkeypatch.setattr(parts, "CHUNK_BYTES", 800)
    monkeypatch.setattr(parts, "SMALLEST_PART", 3000)
    monkeypatch.setattr(parts, "LARGEST_PART", 3000)
    monkeypatch.setattr(parts, "worker_count", lambda: 1)


def index_of(folder):
    """Read without the classes of its writer, which would be imported."""
    index = Index()
    read_index(File.at(folder / ".metadata"), index)
    return index


def by_torch(folder, state):
    found = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=folder, no_dist=True)
    return found


def no_data(first, memory):
    raise AssertionError("nobody should ask")


def boxes(key, shape, dtype=torch.float32):
    found = parts.chunks_of(Outgoing(key, shape, dtype, no_data))
    return [(chunk.offsets, chunk.sizes, chunk.first) for chunk in found]


def test_torch_loads_it_without_a_process_group(tmp_path, in_small_parts):
    write("torch_dist", tmp_path, STATE, objects=OBJECTS)
    assert len(list(tmp_path.glob("*.distcp"))) > 3
    assert_same(by_torch(tmp_path, STATE), STATE)


def test_torch_makes_one_file_of_it_again(tmp_path, in_small_parts):
    write("torch_dist", tmp_path / "it", STATE, objects=OBJECTS)
    dcp_to_torch_save(tmp_path / "it", tmp_path / "it.pt")
    found = torch.load(tmp_path / "it.pt", weights_only=False)
    kept = {name: found.pop(name) for name in OBJECTS}
    assert_same(found, STATE)
    assert kept[EXTRA % 0] == [None] == kept[EXTRA % 2]
    assert kept[EXTRA % 1][0].getvalue() == b"what it keeps"


def test_our_reader_finds_every_bit_and_what_lies_beside(tmp_path, in_small_parts):
    common = {"iteration": 7, "state_dict": {}, "pytorch-lightning_version": "2.4.0"}
    write("torch_dist", tmp_path, STATE, objects=OBJECTS, common=common)
    with open_checkpoint(tmp_path) as checkpoint:
        metadata = checkpoint.metadata
    assert metadata["writer"].startswith("NeMo 2 (Lightning 2.4.0)")
    assert metadata["iteration"] == 7
    assert metadata["byte_objects"]["count"] == 3
    assert "ignored" not in metadata
    assert_same(read(tmp_path)[1], STATE)
    assert torch.load(tmp_path / "common.pt", weights_only=True) == common


def test_the_files_beside_are_byte_for_byte_those_of_megatron(tmp_path, fixtures_dir):
    """An object without content is stored as Megatron stores one, and so is the last file."""
    theirs = fixtures_dir / "nemo2" / "llama_tp1" / "weights"
    index = index_of(theirs)
    names = index.objects
    with open_checkpoint(theirs) as checkpoint:
        state = {key: checkpoint.read(key) for key in checkpoint.tensors}
    write("torch_dist", tmp_path, state, objects=dict.fromkeys(names, b""))
    ours = index_of(tmp_path)
    config = "metadata.json"
    assert (tmp_path / config).read_bytes() == (theirs / config).read_bytes()
    assert set(ours.objects) == set(names) and set(ours.tensors) == set(index.tensors)
    for name in names:
        one, other = (stored_object(f, i, name) for f, i in ((theirs, index), (tmp_path, ours)))
        assert one == other == [None]
    assert_same(read(tmp_path)[1], state)
    assert_same(by_torch(tmp_path, state), state)


def stored_object(folder, index, name):
    place = index.places[name, None]
    data = (folder / place.path).read_bytes()[place.offset :][: place.length]
    return torch.load(io.BytesIO(data), weights_only=True)


def test_megatron_core_loads_it_into_models_of_several_layouts(tmp_path):
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        pytest.skip("megatron-core opens what is written here")
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", OPENER, str(tmp_path), *LAYOUTS],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((tmp_path / name / "ours" / "metadata.json").exists() for name in LAYOUTS)


def test_no_chunk_crosses_from_one_layer_or_expert_into_the_next():
    assert boxes("decoder.layers.mlp.linear_fc1.weight", (2, 3, 4)) == [
        ((0, 0, 0), (1, 3, 4), 0),
        ((1, 0, 0), (1, 3, 4), 12),
    ]
    assert boxes("decoder.layers.mlp.experts.experts.linear_fc2.weight", (2, 2, 4)) == [
        ((0, 0, 0), (1, 1, 4), 0),
        ((0, 1, 0), (1, 1, 4), 4),
        ((1, 0, 0), (1, 1, 4), 8),
        ((1, 1, 0), (1, 1, 4), 12),
    ]
    assert boxes("decoder.layers.scale", (2,)) == [((0,), (1,), 0), ((1,), (1,), 1)]


def test_what_is_no_stack_is_one_chunk_where_it_is_small():
    assert boxes("decoder.layers.0.mlp.linear_fc1.weight", (6, 4)) == [((0, 0), (6, 4), 0)]
    assert boxes("embedding.weight", (6, 4)) == [((0, 0), (6, 4), 0)]
    assert boxes("scalar", ()) == [((), (), 0)]
    assert boxes("decoder.layers.empty", (0, 4)) == [((0, 0), (0, 4), 0)]


def test_large_ones_are_cut_into_rows_of_nearly_equal_number(monkeypatch):
    monkeypatch.setattr(parts, "CHUNK_BYTES", 64)  # four rows of four
    assert boxes("weight", (9, 4)) == [
        ((0, 0), (3, 4), 0),
        ((3, 0), (3, 4), 12),
        ((6, 0), (3, 4), 24),
    ]
    assert boxes("decoder.layers.x", (2, 5, 4)) == [
        ((0, 0, 0), (1, 3, 4), 0),
        ((0, 3, 0), (1, 2, 4), 12),
        ((1, 0, 0), (1, 3, 4), 20),
        ((1, 3, 0), (1, 2, 4), 32),
    ]
    assert boxes("wide", (2, 20)) == [
        ((0, 0), (1, 10), 0),
        ((0, 10), (1, 10), 10),
        ((1, 0), (1, 10), 20),
        ((1, 10), (1, 10), 30),
    ]


def test_chunks_of_rows_are_not_taken_for_tensor_parallel_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK_BYTES", 256)
    state = {
        "module.embedding.word_embeddings.weight": values((50, 16), torch.float32),
        f"{LAYERS}.self_attention.linear_proj.weight": values((2, 16, 16), torch.float32),
    }
    write("torch_dist", tmp_path, state)
    with open_checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.tensors["module.embedding.word_embeddings.weight"].pieces) > 4
        assert checkpoint.metadata["parallel"] == {"tensor": 1}


def test_a_chunk_is_all_that_is_ever_held(tmp_path, in_small_parts):
    source = write("torch_dist", tmp_path, STATE)
    assert 0 < source.largest <= 800
    assert sum(r.bytes for r in source.requests) == sum(t.nbytes for t in STATE.values())


def test_the_memory_of_a_thread_is_used_again(tmp_path, in_small_parts):
    addresses = set()
    state = {f"{n}.weight": values((10, 16), torch.float32, n) for n in range(30)}
    source = Source(state)

    def noting(outgoing):
        def fill(first, memory):
            addresses.add(memory.data_ptr())
            outgoing.fill(first, memory)

        return outgoing._replace(fill=fill)

    tensors = [noting(outgoing) for outgoing in source.outgoing]
    with Journal(tmp_path, "") as journal:
        parts.write(tmp_path, tensors, parts.WriteOptions(), journal)
    assert len(source.requests) >= 30 and len(addresses) == 1
    assert_same(read(tmp_path)[1], state)


def test_a_killed_writer_is_gone_on_with_and_finished_parts_are_left_alone(
    tmp_path, in_small_parts
):
    with pytest.raises(Killed):
        write("torch_dist", tmp_path, Source(STATE, breaks_at=20), objects=OBJECTS)
    whole = {path.name: path.stat() for path in tmp_path.glob("*.distcp")}
    assert len(whole) >= 2
    with pytest.raises(UnfinishedCheckpoint):
        read(tmp_path)
    (tmp_path / ".part-99").mkdir()  # as a process leaves it that had no time to tidy up
    (tmp_path / f"__0_{len(whole)}.distcp").write_bytes(b"PK\x03\x04 half of it")
    source = write("torch_dist", tmp_path, STATE, objects=OBJECTS)
    total = sum(tensor.nbytes for tensor in STATE.values())
    assert sum(r.bytes for r in source.requests) <= total - 2000 * len(whole)
    for name, before in whole.items():
        assert (tmp_path / name).stat().st_mtime_ns == before.st_mtime_ns
    assert not list(tmp_path.glob(".part*"))
    assert_same(read(tmp_path)[1], STATE)
    assert_same(by_torch(tmp_path, STATE), STATE)


def test_a_thread_in_the_middle_of_a_part_stops_when_another_fails(
    tmp_path, in_small_parts, monkeypatch
):
    size = 800 * 400
    monkeypatch.setattr(parts, "SMALLEST_PART", size)
    monkeypatch.setattr(parts, "LARGEST_PART", size)
    monkeypatch.setattr(parts, "worker_count", lambda: 2)
    source = Source({key: torch.zeros(size, dtype=torch.uint8) for key in "ab"}, breaks_at=20)
    with pytest.raises(Killed):
        write("torch_dist", tmp_path, source)
    assert len(source.requests) < 300
    assert os.listdir(tmp_path) == [Journal.NAME]


def test_a_noted_part_that_is_not_whole_any_more_is_written_again(tmp_path, in_small_parts):
    with pytest.raises(Killed):
        write("torch_dist", tmp_path, Source(STATE, breaks_at=20))
    os.truncate(tmp_path / "__0_0.distcp", 100)
    write("torch_dist", tmp_path, STATE)
    assert_same(read(tmp_path)[1], STATE)


def test_a_part_is_on_the_disk_before_it_has_its_name_or_a_note(tmp_path, monkeypatch):
    events = []
    real, note, rename = os.fsync, Journal.note, Path.rename

    def fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        real(descriptor)

    def noted(self, key, value):
        events.append(f"note {key}")
        note(self, key, value)

    def renamed(self, target):
        events.append(f"name {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Journal, "note", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    write("torch_dist", tmp_path, {"a": torch.ones(3)})
    assert events.index("__0_0.distcp") < events.index("name __0_0.distcp")
    assert events.index("name __0_0.distcp") < events.index("note __0_0.distcp")
    assert events.index("note __0_0.distcp") < events.index("name .metadata")


def test_the_index_names_no_path_of_this_machine_and_two_runs_are_alike(tmp_path, in_small_parts):
    for name in ("one", "other"):
        write("torch_dist", tmp_path / name, STATE, objects=OBJECTS)
    assert str(tmp_path).encode() not in (tmp_path / "one" / ".metadata").read_bytes()
    files = sorted(os.listdir(tmp_path / "one"))
    assert files == sorted(os.listdir(tmp_path / "other"))
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


@pytest.mark.parametrize("before", [True, False])
def test_how_torch_save_counts_checksums_is_what_it_was(before, tmp_path):
    found = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(before)
    try:
        write("torch_dist", tmp_path / "it", {"a": torch.ones(3)})
        with pytest.raises(Killed):
            write("torch_dist", tmp_path / "not", Source({"a": torch.ones(3)}, breaks_at=0))
        assert torch.serialization.get_crc32_options() == before
    finally:
        torch.serialization.set_crc32_options(found)


@pytest.mark.parametrize("limit", [300, 20_000])
def test_a_full_disk_is_a_storage_error(limit, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        with pytest.raises(StorageError, match=r"cannot write .*__0_0\.distcp: file too large"):
            write("torch_dist", tmp_path, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == [Journal.NAME]


def test_the_last_file_of_all_says_that_it_is_complete(tmp_path, monkeypatch):
    def full(self, metadata, results):
        raise OSError(28, "no space left")

    monkeypatch.setattr(parts._Writer, "finish", full)
    with pytest.raises(StorageError, match="no space left"):
        write("torch_dist", tmp_path, {"a": torch.ones(3)})
    assert not (tmp_path / "metadata.json").exists()
    monkeypatch.undo()
    source = write("torch_dist", tmp_path, {"a": torch.ones(3)})
    assert not source.requests
    assert json.loads((tmp_path / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


def test_no_more_threads_than_chunks_that_may_be_held(tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(parts, "worker_count", lambda: 8)
    real = _filling.write_units

    def counting(units, journal, *, workers):
        counts.append(workers)
        real(units, journal, workers=workers)

    monkeypatch.setattr(parts, "write_units", counting)
    write("torch_dist", tmp_path, {"a": torch.ones(3)})
    assert counts == [4] and 4 * parts.CHUNK_BYTES <= 128 * 2**20
