"""What NeMo 1 writes: archives, plain or packed with gzip, and the same trees unpacked."""

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bioinit import contexts, formats, load_weights
from bioinit.errors import AmbiguousFormat, CorruptCheckpoint, RefusedCheckpoint, UnknownFormat
from bioinit.storage import Folder

CONFIG = "num_layers: 2\nnemo_version: 1.23.0\ntokenizer:\n  model: nemo:0123_tokenizer.model\n"
STATE = {
    "model.a": torch.arange(24, dtype=torch.bfloat16).view(4, 6),
    "model.layers.0.b": torch.arange(7.0),
}
READS_WHOLE = ("write_tiny_gzip",)  # gzip has no index: opening decompresses the file once


def saved(state):
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def tree(state):
    return {"model_config.yaml": CONFIG.encode(), "model_weights.ckpt": saved(state)}


def pack(path, content, mode="w:"):
    """As NeMo does it: the folder `./` first, then everything below it."""
    with tarfile.open(path, mode) as archive:
        root = tarfile.TarInfo("./")
        root.type = tarfile.DIRTYPE
        archive.addfile(root)
        for name, data in content.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pack_folder(path, folder, mode="w:"):
    with tarfile.open(path, mode) as archive:
        archive.add(folder, arcname="./")
    return path


def unpack(folder, content):
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tiny(folder: Path, state: dict[str, torch.Tensor]) -> None:
    pack(folder / "tiny.nemo", tree(state))


def write_tiny_gzip(folder: Path, state: dict[str, torch.Tensor]) -> None:
    pack(folder / "tiny.nemo", tree(state), "w:gz")


def write_tiny_under_another_name(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """The archive alone, called `.nemo` by nobody, would be found by its first member."""
    pack(folder / "tiny.tar.nemo", tree(state))


def equal_tensors(one, other):
    assert set(one.tensors) == set(other.tensors)
    for name in one.tensors:
        found, wanted = one.read(name), other.read(name)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert found.view(-1).view(torch.uint8).equal(wanted.view(-1).view(torch.uint8))


def three_ways(tmp_path, content, suffix=""):
    """A tree as a directory, as an archive and as an archive packed with gzip."""
    return (
        unpack(tmp_path / f"unpacked{suffix}", content),
        pack(tmp_path / f"plain{suffix}.nemo", content),
        pack(tmp_path / f"packed{suffix}.nemo", content, "w:gz"),
    )


# The real ones


BIONEMO_NAMES = (  # how BioNeMo 1 calls what Megatron-Core calls otherwise
    (r"^model\.(language_model\.)?", ""),
    (r"post_attention_layernorm", "pre_mlp_layernorm"),
    (r"self_attention\.query_key_value", "self_attention.linear_qkv"),
    (r"self_attention\.dense", "self_attention.linear_proj"),
    (r"mlp\.dense_h_to_4h", "mlp.linear_fc1"),
    (r"mlp\.dense_4h_to_h", "mlp.linear_fc2"),
    (r"lm_head\.layernorm", "lm_head.layer_norm"),
    (r"^lm_head\.bias", "output_layer.bias"),
)


def per_layer(checkpoint):
    """Tensors by Megatron-Core's names, stacked layers apart."""
    found = {}
    for name, stored in checkpoint.tensors.items():
        for old, new in BIONEMO_NAMES:
            name = re.sub(old, new, name)
        tensor = checkpoint.read(next(k for k, s in checkpoint.tensors.items() if s is stored))
        if "encoder.layers." in name and not re.search(r"layers\.\d", name):
            for layer, part in enumerate(tensor):
                found[name.replace("layers.", f"layers.{layer}.")] = part
        else:
            found[name] = tensor
    spelled = {
        "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
        "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    }
    for long, short in spelled.items():
        found = {name.replace(long, short): tensor for name, tensor in found.items()}
    return found


@pytest.mark.parametrize("how", ["plain", "gzip", "unpacked"])
@pytest.mark.parametrize("name", ["bert_legacy_model_weights_ckpt", "bert_torch_dist"])
def test_real_archives_give_every_tensor(fixtures_dir, tmp_path, name, how):
    path = fixtures_dir / "nemo1" / f"{name}.nemo"
    if how == "gzip":
        (tmp_path / "x.nemo").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "x.nemo"
    elif how == "unpacked":
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path, filter="data")
        path = tmp_path
    expected = json.loads((fixtures_dir / "nemo1" / "expected.json").read_text())["tensors"]
    with contexts.open_checkpoint(path) as checkpoint:
        found = per_layer(checkpoint)
        assert set(expected) <= set(found)
        for key, said in expected.items():
            tensor = found[key].float().contiguous()
            assert list(tensor.shape) == said["shape"]
            assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == said["sha256_f32"], key


def test_says_who_wrote_it(fixtures_dir):
    path = fixtures_dir / "nemo1" / "bert_legacy_model_weights_ckpt.nemo"
    with contexts.open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "nemo" and checkpoint.metadata["inside"] == "torch_zip"
        assert checkpoint.metadata["writer"] == "NeMo 1 (.nemo archive), nemo_version 2.2.1"


# Every layout, three ways


def test_the_same_tree_gives_the_same_three_ways(tmp_path):
    paths = three_ways(tmp_path, tree(STATE))
    for path in paths:
        with contexts.open_checkpoint(path) as checkpoint:
            assert checkpoint.format == "nemo"
            assert set(checkpoint.tensors) == set(STATE)
            for name, tensor in STATE.items():
                assert checkpoint.read(name).equal(tensor)


def test_regions_of_a_packed_archive_are_those_of_the_whole(tmp_path):
    whole = torch.arange(300_000, dtype=torch.int32).view(600, 500)
    _, _, path = three_ways(tmp_path, tree({"w": whole}))
    with contexts.open_checkpoint(path) as checkpoint:
        for offsets, sizes in [((590, 3), (5, 7)), ((0, 0), (2, 500)), ((300, 250), (300, 1))]:
            region = tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))
            assert checkpoint.read("w", (offsets, sizes)).equal(whole[region])


@pytest.mark.parametrize("name", ["bert_fp32_tp1_mcore0.12.3", "gpt_fp32_tp1_mcore0.15.3"])
def test_zarr_inside_is_read_like_zarr_outside(fixtures_dir, tmp_path, name):
    if "zarr" not in formats.names():
        pytest.skip("there is no reader of zarr yet")
    source = fixtures_dir / "zarr" / name / "weights"
    shutil.copytree(source, tmp_path / "tree" / "model_weights")
    (tmp_path / "tree" / "model_config.yaml").write_text(CONFIG)
    for directory, folders, _ in os.walk(tmp_path / "tree"):
        for inner in folders:
            (Path(directory) / inner).chmod(0o755)
    pack_folder(tmp_path / "plain.nemo", tmp_path / "tree")
    pack_folder(tmp_path / "packed.nemo", tmp_path / "tree", "w:gz")
    with contexts.open_checkpoint(source) as outside:
        for path in (tmp_path / "tree", tmp_path / "plain.nemo", tmp_path / "packed.nemo"):
            with contexts.open_checkpoint(path) as inside:
                equal_tensors(inside, outside)


@pytest.mark.parametrize("rank", ["mp_rank_{:02d}", "tp_rank_{:02d}_pp_rank_000"])
def test_ranks_inside_are_read_like_ranks_outside(tmp_path, rank):
    if "megatron_ranks" not in formats.names():
        pytest.skip("there is no reader of Megatron's ranks yet")
    name = "model.language_model.encoder.layers.0.mlp.dense_4h_to_h.weight"
    norm = "model.language_model.encoder.layers.0.input_layernorm.weight"
    whole = torch.arange(6 * 24.0).view(6, 24)
    content = {"model_config.yaml": CONFIG.encode()} | {
        f"{rank.format(number)}/model_weights.ckpt": saved(
            {name: part.clone(), norm: torch.ones(6)}
        )
        for number, part in enumerate(whole.chunk(2, dim=1))
    }
    outside, *archives = three_ways(tmp_path, content)
    with contexts.open_checkpoint(outside) as wanted:
        assert wanted.read(name).equal(whole)
        for path in archives:
            with contexts.open_checkpoint(path) as found:
                equal_tensors(found, wanted)


@pytest.mark.parametrize(
    "name",
    [
        "0123_tokenizer.model",
        "0123_vocab.txt",
        "0123_something.pt",
        "0123_something.bin",
        "something.ckpt",
        "pytorch_model.bin",
        "modeling.py",
        "config.json5",
    ],
)
def test_what_else_lies_in_the_root_does_not_disturb(tmp_path, name):
    content = {name: b"import os; os.abort()", **tree(STATE)}
    for path in three_ways(tmp_path, content):
        with contexts.open_checkpoint(path) as checkpoint:
            assert set(checkpoint.tensors) == set(STATE)


def test_a_directory_with_one_archive_stands_for_it(tmp_path):
    write_tiny(tmp_path, STATE)
    (tmp_path / "README.md").write_text("a model")
    with contexts.open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(STATE)


def test_two_archives_side_by_side_are_ambiguous(tmp_path):
    for name in ("a.nemo", "b.nemo"):
        pack(tmp_path / name, tree(STATE))
    with pytest.raises(AmbiguousFormat, match=r"a\.nemo, b\.nemo"):
        contexts.open_checkpoint(tmp_path)


def test_two_sets_of_weights_in_one_archive_are_ambiguous(tmp_path):
    path = pack(tmp_path / "x.nemo", {**tree(STATE), "model_weights/common.pt": b""})
    with pytest.raises(AmbiguousFormat, match=r"model_weights\.ckpt"):
        contexts.open_checkpoint(path)


@pytest.mark.parametrize("name", ["model.tar", "model", "model.ckpt"])
def test_an_archive_of_another_name_is_known_by_its_first_member(tmp_path, name):
    with contexts.open_checkpoint(pack(tmp_path / name, tree(STATE))) as checkpoint:
        assert checkpoint.format == "nemo"


@pytest.mark.parametrize("name", ["model.tar.gz", "model.tgz"])
def test_a_packed_archive_of_another_name_is_known_by_its_suffix(tmp_path, name):
    with contexts.open_checkpoint(pack(tmp_path / name, tree(STATE), "w:gz")) as checkpoint:
        assert checkpoint.format == "nemo"


def test_a_directory_with_one_archive_unpacks_like_the_archive(tmp_path):
    write_tiny(tmp_path, STATE)
    alone = formats.load("nemo").unpack(Folder.at(tmp_path / "tiny.nemo"))
    around = formats.load("nemo").unpack(Folder.at(tmp_path))
    assert alone.names() == around.names() == ("model_config.yaml", "model_weights.ckpt")


def test_an_archive_beside_its_own_weights_is_ambiguous(tmp_path):
    unpack(tmp_path, tree(STATE))
    write_tiny(tmp_path, STATE)
    with pytest.raises(AmbiguousFormat, match=r"tiny\.nemo, model_weights\.ckpt"):
        contexts.open_checkpoint(tmp_path)


def test_what_is_packed_with_gzip_and_is_no_archive_is_corrupt(tmp_path):
    (tmp_path / "x.nemo").write_bytes(gzip.compress(saved(STATE)))
    with pytest.raises(CorruptCheckpoint, match=r"x\.nemo.*does not begin like a tar archive"):
        contexts.open_checkpoint(tmp_path / "x.nemo")


def test_loading_from_a_packed_archive_gives_the_same_model(tmp_path):
    state = {"up.weight": torch.randn(64, 300), "up.bias": torch.randn(64)}
    module = torch.nn.Module()
    module.up = torch.nn.Linear(300, 64)
    path = pack(tmp_path / "x.nemo", tree(state), "w:gz")
    load_weights(module, path)
    assert all(module.state_dict()[name].equal(tensor) for name, tensor in state.items())


def test_the_saved_config_is_looked_for_in_the_archive(tmp_path):
    path = pack(tmp_path / "x.nemo", tree(STATE))
    for homes in (formats.open_weights(Folder.at(path))[1].homes, formats.homes(Folder.at(path))):
        holding = [home for home in homes if home.has("model_config.yaml")]
        assert holding and holding[0].read_text("model_config.yaml") == CONFIG


def test_nothing_is_written_and_nothing_unpacked(tmp_path, monkeypatch):
    path = pack(tmp_path / "x.nemo", tree(STATE), "w:gz")
    monkeypatch.setattr(tarfile, "open", None)
    before = sorted(tmp_path.rglob("*"))
    with contexts.open_checkpoint(path) as checkpoint:
        checkpoint.read("model.a")
    assert sorted(tmp_path.rglob("*")) == before


# Bad ones


def test_an_archive_without_weights_says_what_it_holds(tmp_path):
    path = pack(tmp_path / "x.nemo", {"model_config.yaml": b"a: 1"})
    with pytest.raises(UnknownFormat, match=r"x\.nemo, which holds model_config\.yaml"):
        contexts.open_checkpoint(path)


def test_archives_in_archives_are_not_followed(tmp_path):
    data = pack(tmp_path / "0.nemo", tree(STATE)).read_bytes()
    for number in range(1, 4):
        data = pack(tmp_path / f"{number}.nemo", {"inner.nemo": data}).read_bytes()
    with pytest.raises(UnknownFormat, match=r"inner\.nemo"):
        contexts.open_checkpoint(tmp_path / "3.nemo")


def test_the_tar_of_torch_0_1_is_left_to_its_reader(tmp_path):
    with tarfile.open(tmp_path / "x.nemo", "w:") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    with pytest.raises(RefusedCheckpoint, match=r"torch 0\.1"):
        contexts.open_checkpoint(tmp_path / "x.nemo")


def test_a_link_to_the_weights_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.nemo", "w:") as archive:
        link = tarfile.TarInfo("./model_weights.ckpt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(RefusedCheckpoint, match="symbolic link"):
        contexts.open_checkpoint(tmp_path / "x.nemo")


def test_a_packed_archive_cut_anywhere_is_corrupt(tmp_path):
    path = pack(tmp_path / "x.nemo", tree(STATE), "w:gz")
    whole = path.read_bytes()
    for size in range(2, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptCheckpoint, match=r"x\.nemo"):
            contexts.open_checkpoint(path)


def test_thirty_thousand_members_open_in_seconds(tmp_path):
    """As many as the chunks of a large model, all in the folders of one."""
    path = tmp_path / "x.nemo"
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(30_000):
            name = f"./model_weights/model.layers.{number % 1000}/{number}.0"
            archive.addfile(tarfile.TarInfo(name))
    began = time.monotonic()
    with pytest.raises((UnknownFormat, CorruptCheckpoint)):
        contexts.open_checkpoint(path)
    assert time.monotonic() - began < 5
