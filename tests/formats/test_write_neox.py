"""GPT-NeoX's files as we write them, read by torch and by our own merger."""

import errno
import os
import resource
import signal

import pytest
import torch

from bioinit.contexts import open_checkpoint
from bioinit.errors import ConfigError, StorageError
from bioinit.formats import _filling
from bioinit.formats.neox import layers
from bioinit.storage import Journal
from tests.writing import Killed, Source, assert_same, bits, read, values, write

HIDDEN, FFN, VOCAB = 16, 64, 48
STEP = "global_step0"


def spelled(key):
    return f"2.{key}"


def file_of(folder, layer, part):
    return folder / STEP / f"layer_{layer:02d}-model_{part:02d}-model_states.pt"


def numbers(shape, dtype, seed):
    """Ordinary numbers, and the ones that a sum could change."""
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    smallest = torch.finfo(dtype).smallest_normal / 4
    found.view(-1)[:4] = torch.tensor([-0.0, 0.0, float("inf"), smallest]).to(dtype)
    return found


def model(dtype=torch.float32):
    """A model of two layers, named as the reader names it."""
    in_layer = {
        "input_layernorm.weight": (HIDDEN,),
        "input_layernorm.bias": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "attention.query_key_value.weight": (3 * HIDDEN, HIDDEN),
        "attention.query_key_value.bias": (3 * HIDDEN,),
        "attention.rotary_emb.inv_freq": (4,),
        "attention.dense.weight": (HIDDEN, HIDDEN),
        "attention.dense.bias": (HIDDEN,),
        "mlp.dense_h_to_4h.weight": (FFN, HIDDEN),
        "mlp.dense_h_to_4h.bias": (FFN,),
        "mlp.dense_4h_to_h.weight": (HIDDEN, FFN),
        "mlp.dense_4h_to_h.bias": (HIDDEN,),
    }
    shapes = {"0.word_embeddings.weight": (VOCAB, HIDDEN)}
    for layer in (2, 3):
        shapes |= {f"{layer}.{name}": shape for name, shape in in_layer.items()}
    shapes |= {"5.norm.weight": (HIDDEN,), "5.norm.bias": (HIDDEN,)}
    shapes |= {"6.final_linear.weight": (VOCAB, HIDDEN)}
    return {key: numbers(shape, dtype, n) for n, (key, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("partitions", [1, 2, 4])
def test_our_reader_finds_every_bit_whatever_the_partitions(partitions, dtype, tmp_path):
    state = model(dtype)
    write("neox", tmp_path, state, partitions=partitions)
    assert (tmp_path / "latest").read_bytes() == STEP.encode()
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.metadata["parallel"] == {"tensor": partitions}
    name, found = read(tmp_path)
    assert name == "neox"
    assert_same(found, state)


def test_each_partition_holds_its_rows_its_columns_and_copies(tmp_path):
    state = model()
    write("neox", tmp_path, state, partitions=2)
    for part in (0, 1):
        held = torch.load(file_of(tmp_path, 2, part), weights_only=True)
        assert list(held) == [key[2:] for key in state if key.startswith("2.")]
        rows = slice(part * FFN // 2, (part + 1) * FFN // 2)
        columns = slice(part * HIDDEN // 2, (part + 1) * HIDDEN // 2)
        expected = {
            "mlp.dense_h_to_4h.weight": state["2.mlp.dense_h_to_4h.weight"][rows],
            "mlp.dense_4h_to_h.weight": state["2.mlp.dense_4h_to_h.weight"][:, rows],
            "attention.dense.weight": state["2.attention.dense.weight"][:, columns],
            "input_layernorm.weight": state["2.input_layernorm.weight"],
            "attention.rotary_emb.inv_freq": state["2.attention.rotary_emb.inv_freq"],
        }
        assert_same({key: held[key] for key in expected}, expected)
    embedding = torch.load(file_of(tmp_path, 0, 1), weights_only=True)
    assert_same(
        embedding, {"word_embeddings.weight": state["0.word_embeddings.weight"][VOCAB // 2 :]}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_is_summed_lies_in_the_first_and_changes_in_no_sum(dtype, tmp_path):
    state = model(dtype)
    write("neox", tmp_path, state, partitions=4)
    name = "mlp.dense_4h_to_h.bias"
    parts = [torch.load(file_of(tmp_path, 3, n), weights_only=True)[name] for n in range(4)]
    assert torch.equal(bits(parts[0]), bits(state[f"3.{name}"]))
    for part in parts[1:]:
        assert torch.equal(bits(part), bits(torch.full_like(part, -0.0)))
        assert part.signbit().all() and not part.any()
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.read(f"3.{name}")
        assert not [r for file in checkpoint.files for r in file.remarks]


def test_a_gated_layer_is_divided_in_both_halves(tmp_path):
    state = model() | {
        "2.mlp.linear1.weight": values((2 * FFN, HIDDEN), torch.float32, 1),
        "2.mlp.linear2.weight": values((HIDDEN, FFN), torch.float32, 2),
    }
    write("neox", tmp_path, state, partitions=2)
    second = torch.load(file_of(tmp_path, 2, 1), weights_only=True)["mlp.linear1.weight"]
    gate, up = state["2.mlp.linear1.weight"].chunk(2)
    expected = torch.cat([gate[FFN // 2 :], up[FFN // 2 :]])
    assert torch.equal(bits(second), bits(expected))
    assert_same(read(tmp_path)[1], state)


def test_the_files_of_gpt_neox_are_divided_again_as_they_were(tmp_path, fixtures_dir):
    theirs = fixtures_dir / "gpt_neox"
    _, state = read(theirs)
    write("neox", tmp_path, state, partitions=2)
    compared = 0
    for path in sorted((theirs / "global_step10").glob("layer_*")):
        one = torch.load(path, weights_only=True)
        other = torch.load(tmp_path / STEP / path.name, weights_only=True)
        summed = [n for n in one if n.endswith(("attention.dense.bias", "dense_4h_to_h.bias"))]
        assert set(one) == set(other)
        for name in set(one) - set(summed):
            assert torch.equal(bits(one[name]), bits(other[name])), (path.name, name)
            compared += 1
    assert compared > 40
    assert_same(read(tmp_path)[1], state)


@pytest.mark.parametrize("partitions", [1, 2])
def test_slabs_of_any_size_make_the_same_files(partitions, tmp_path, monkeypatch):
    state = model()
    write("neox", tmp_path / "whole", state, partitions=partitions)
    monkeypatch.setattr(layers, "SLAB_BYTES", 256)
    monkeypatch.setattr(_filling, "worker_count", lambda: 5)
    source = write("neox", tmp_path / "slabs", state, partitions=partitions)
    assert source.largest <= 256
    assert sum(r.bytes for r in source.requests) == sum(t.nbytes for t in state.values())
    for path in (tmp_path / "whole").rglob("*model_states.pt"):
        other = tmp_path / "slabs" / STEP / path.name
        one, other = (torch.load(p, weights_only=True) for p in (path, other))
        assert_same(one, other)


@pytest.mark.parametrize(
    ("key", "shape", "partitions", "said"),
    [
        ("0.word_embeddings.weight", (50, 16), 4, r"dim 0 has 50.* no multiple of 4.*1, 2, 5"),
        ("2.attention.dense.weight", (16, 15), 2, r"dim 1 has 15.* no multiple of 2"),
        ("2.mlp.dense_h_to_4h.bias", (7,), 2, r"\[7\] over 2"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_numbers(key, shape, partitions, said, tmp_path):
    state = {key: torch.zeros(shape), "2.mlp.dense_4h_to_h.weight": torch.zeros(4, 7)}
    with pytest.raises(ConfigError, match=said):
        write("neox", tmp_path, state, partitions=partitions)
    assert os.listdir(tmp_path) == [Journal.NAME]


def test_half_of_a_gated_layer_has_to_be_divisible_too(tmp_path):
    state = {
        "2.mlp.linear1.weight": torch.zeros(12, 4),
        "2.mlp.linear2.weight": torch.zeros(4, 6),
    }
    with pytest.raises(ConfigError, match=r"12, which is no multiple of 4 in each of 2 parts"):
        write("neox", tmp_path, state, partitions=4)


def test_what_nobody_knows_how_to_divide_is_written_in_one_partition_only(tmp_path):
    state = {"2.something.odd": torch.arange(8.0), "2.mlp.lora.weight": torch.ones(4, 4)}
    write("neox", tmp_path / "one", state)
    assert_same(read(tmp_path / "one")[1], state)
    with pytest.raises(ConfigError, match=r"nobody knows how .*'2\.something\.odd'.* 2 part"):
        write("neox", tmp_path / "two", state, partitions=2)


def test_a_shape_that_the_reader_would_take_for_another_is_refused(tmp_path):
    """Whole it is wider than the model, and known by that; half of it is square."""
    state = {"2.input_layernorm.weight": torch.ones(8), "2.odd.weight": torch.ones(8, 16)}
    with pytest.raises(ConfigError, match=r"nobody knows how .*'2\.odd\.weight'"):
        write("neox", tmp_path, state, partitions=2)


@pytest.mark.parametrize("key", ["weight", "x.weight", "2", "2.", "-1.weight"])
def test_a_name_without_a_layer_is_refused(key, tmp_path):
    with pytest.raises(ConfigError, match=r"number of the layer"):
        write("neox", tmp_path, {key: torch.ones(2)})


def test_no_partitions_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write 0 partitions"):
        write("neox", tmp_path, model(), partitions=0)


def test_a_killed_writer_is_gone_on_with_and_finished_layers_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(_filling, "worker_count", lambda: 1)
    state = model()
    with pytest.raises(Killed):
        write("neox", tmp_path, Source(state, breaks_at=25), partitions=2)
    assert not (tmp_path / "latest").exists()
    before = [file_of(tmp_path, 2, part).stat().st_mtime_ns for part in (0, 1)]
    source = write("neox", tmp_path, state, partitions=2)
    assert {key.split(".")[0] for key in source.keys()} == {"3", "5", "6"}
    assert before == [file_of(tmp_path, 2, part).stat().st_mtime_ns for part in (0, 1)]
    assert_same(read(tmp_path)[1], state)


def test_a_noted_layer_of_which_a_file_is_gone_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(_filling, "worker_count", lambda: 1)
    with pytest.raises(Killed):
        write("neox", tmp_path, Source(model(), breaks_at=25), partitions=2)
    file_of(tmp_path, 0, 1).unlink()
    source = write("neox", tmp_path, model(), partitions=2)
    assert "0.word_embeddings.weight" in source.keys()
    assert_same(read(tmp_path)[1], model())


def test_a_layer_is_on_the_disk_before_it_is_noted(tmp_path, monkeypatch):
    events = []
    real, note = os.fsync, Journal.note

    def fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        real(descriptor)

    def noted(self, key, value):
        events.append(f"note {key}")
        note(self, key, value)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Journal, "note", noted)
    write("neox", tmp_path, {"2.input_layernorm.weight": torch.ones(3)}, partitions=2)
    at = events.index("note layer_02")
    assert {file_of(tmp_path, 2, part).name for part in (0, 1)} <= set(events[:at])


def test_a_full_disk_is_noticed_before_a_layer_is_asked_for(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        assert size > 200 * 200 * 4
        raise OSError(errno.ENOSPC, "")

    source = Source({"2.attention.dense.weight": torch.zeros(200, 200)})
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"cannot write .*layer_02.*no space left"):
        write("neox", tmp_path, source)
    assert not source.requests


def test_a_file_that_may_not_get_so_large_is_a_storage_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(StorageError, match=r"cannot write .*layer_02.*file too large"):
            write("neox", tmp_path, {"2.attention.dense.weight": torch.zeros(200, 200)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_laying_a_layer_out_takes_no_memory_of_its_size(tmp_path):
    """A file of a gigabyte, of which nothing is written yet, takes next to nothing to make."""
    shape = (2**14, 2**14)
    outgoing = layers.Outgoing(
        "2.attention.dense.weight", shape, torch.float32, lambda first, memory: None
    )
    (shares,) = layers._shared([outgoing], 2).values()
    unit = layers._Layer(tmp_path, 2, shares)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    real, layers.allocate = layers.allocate, lambda descriptor, size: None
    try:
        assert unit.begin()
    finally:
        layers.allocate = real
        unit.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert unit.paths[0].stat().st_blocks * 512 < 2**20 < unit.paths[0].stat().st_size
