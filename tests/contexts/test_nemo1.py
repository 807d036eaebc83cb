"""``model_config.yaml`` of a ``.nemo`` archive: its fields, its references, its interpolations."""

import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from bioinit.contexts import load_context
from bioinit.contexts.nemo1 import CONTEXT
from bioinit.contexts.protocol import Context
from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.storage import Folder

CHECKSUM = "586f3f51a9cf43bc9369bd53fa08868c"


def write(folder: Path, text: str) -> Path:
    (folder / "model_config.yaml").write_text(text)
    return folder


def read(folder: Path) -> Context:
    context = CONTEXT.read(Folder.at(folder))
    assert context is not None
    return context


def test_its_fields_are_the_model_s_and_its_target_the_class(tmp_path: Path) -> None:
    write(tmp_path, "num_layers: 2\nprecision: bf16\ntarget: nemo.a.Model\nlr: 1e-4\n")
    context = read(tmp_path)
    assert context.dialect == "nemo1" and context.model == "nemo.a.Model"
    assert context.data["num_layers"] == 2 and context.data["lr"] == 1e-4
    assert context.tree == {"model": context.data}
    assert load_context(tmp_path, "model.config.precision") == "bf16"


@pytest.mark.parametrize("target", ["null", "[1]", "3"])
def test_a_target_that_is_no_name_is_no_class(tmp_path: Path, target: str) -> None:
    assert read(write(tmp_path, f"target: {target}\n")).model is None


def test_files_that_were_saved_along_are_carried_without_their_checksum(tmp_path: Path) -> None:
    names = ("my_sp.model", "vocab.json", "gpt2.txt", "other.bin")
    for name in names:
        (tmp_path / f"{CHECKSUM}_{name}").write_bytes(name.encode())
    write(
        tmp_path,
        f"tokenizer:\n  library: sentencepiece\n  model: nemo:{CHECKSUM}_my_sp.model\n"
        f"  vocab_file: nemo:{CHECKSUM}_vocab.json\n  merge_file: nemo:{CHECKSUM}_gpt2.txt\n"
        f"  gone: nemo:{CHECKSUM}_gone.model\nmore: [nemo:{CHECKSUM}_other.bin]\n",
    )
    context = read(tmp_path)
    assert set(context.carried) == {"tokenizer.model", "vocab.json", "merges.txt"}
    file = context.carried["tokenizer.model"]
    assert file.read(0, file.size) == b"my_sp.model"
    assert context.data["tokenizer"]["model"] == f"{CHECKSUM}_my_sp.model"
    assert context.data["tokenizer"]["gone"] == f"nemo:{CHECKSUM}_gone.model"


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "..", "a\\0b"])
def test_a_reference_that_leads_out_is_refused_by_its_place(tmp_path: Path, name: str) -> None:
    write(tmp_path, f'tokenizer:\n  model: "nemo:{name}"\n')
    with pytest.raises(RefusedCheckpoint, match=r"model_config\.yaml: tokenizer\.model"):
        read(tmp_path)


INTERPOLATED = """
encoder_seq_length: 512
hidden: ${.encoder_seq_length}
model_of: ${model.encoder_seq_length}
tokenizer:
  type: bert
  model: ${.type}-x
  up: ${..hidden}
  size: ${encoder_seq_length}
  both: "${.type}_${..hidden}"
items: [1, "${items[0]}", "${data.0.name}"]
data:
- name: first
home: ${oc.env:HOME}
gone: ${not.there}
far: ${......x}
config: ${tokenizer}
escaped: \\${hidden}
half: ${hidden
"""


def test_an_interpolation_is_the_value_it_means_and_no_resolver_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/secret")
    data = read(write(tmp_path, INTERPOLATED)).data
    assert data["hidden"] == 512 and data["model_of"] == 512
    assert data["tokenizer"] == {
        "type": "bert", "model": "bert-x", "up": 512, "size": 512, "both": "bert_512",
    }  # fmt: skip
    assert data["items"] == [1, 1, "first"]
    for name, text in (
        ("home", "${oc.env:HOME}"),
        ("gone", "${not.there}"),
        ("far", "${......x}"),
        ("config", "${tokenizer}"),
        ("escaped", "\\${hidden}"),
        ("half", "${hidden"),
    ):
        assert data[name] == text


HOSTILE: dict[str, tuple[str, type[Exception], str]] = {
    "itself": ("a: ${a}", CorruptCheckpoint, "means itself"),
    "a circle": ("a: ${b}x\nb: ${a}y", CorruptCheckpoint, "a -> b -> a"),
    "a circle in a list": ("a: ['${a.0}']", CorruptCheckpoint, "means itself"),
    "a bomb of text": (
        "a0: xxxxxxxxxx\n" + "".join(f"a{i + 1}: {f'${{a{i}}}' * 10}\n" for i in range(12)),
        CorruptCheckpoint,
        "letters",
    ),
    "a bomb of nothing": (
        "a0: ''\n" + "".join(f"a{i + 1}: {f'${{a{i}}}' * 150}\n" for i in range(12)),
        CorruptCheckpoint,
        "letters",
    ),
    "more of them than any config has": (
        "a: 1\nb: [" + ",".join(["'${a}'"] * 70_000) + "]",
        CorruptCheckpoint,
        "letters",
    ),
    "a tag": ("a: !!python/object/apply:os.system [x]", RefusedCheckpoint, "os.system"),
    "a list": ("[1]", CorruptCheckpoint, "not a mapping"),
    "a number as a field": ("1: 2", CorruptCheckpoint, "no name"),
    "nothing": ("", CorruptCheckpoint, "nothing"),
}


@pytest.mark.parametrize(("text", "error", "says"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_config_is_turned_down_by_its_file(
    tmp_path: Path, text: str, error: type[Exception], says: str
) -> None:
    began = time.perf_counter()
    with pytest.raises(error, match=says) as raised:
        read(write(tmp_path, text))
    assert time.perf_counter() - began < 5
    assert "model_config.yaml" in str(raised.value)


@pytest.mark.parametrize("item", ["*s", "*n", "'${s}'"])
def test_a_long_text_that_is_shared_costs_what_it_takes_once(tmp_path: Path, item: str) -> None:
    long = "${x" * 20_000
    count = 2_000
    text = f"s: &s '{long}'\nn: &n 'nemo:{long}'\na: [{','.join([item] * count)}]\n"
    began = time.perf_counter()
    assert (
        read(write(tmp_path, text)).data["a"] == [f"nemo:{long}" if item == "*n" else long] * count
    )
    assert time.perf_counter() - began < 5


def test_nemo_2_s_files_are_left_to_nemo_2(tmp_path: Path) -> None:
    assert CONTEXT.read(Folder.at(write(tmp_path, "_target_: a.B\nconfig: {}\n"))) is None
    (tmp_path / "context").mkdir()
    assert CONTEXT.read(Folder.at(write(tmp_path / "context", "num_layers: 2\n"))) is None


@pytest.mark.parametrize("name", ["bert_legacy_model_weights_ckpt", "bert_torch_dist"])
def test_a_real_config_gives_the_exact_values(
    fixtures_dir: Path, tmp_path: Path, name: str
) -> None:
    with tarfile.open(fixtures_dir / "nemo1" / f"{name}.nemo") as archive:
        archive.extract("./model_config.yaml", tmp_path, filter="data")
    context = read(tmp_path)
    expected: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "bert_binary_head": False,
        "precision": 32, "nemo_version": "2.2.1",
    }  # fmt: skip
    assert {key: context.data[key] for key in expected} == expected
    assert context.data["tokenizer"]["model"] is None and context.carried == {}
    assert context.model is not None and context.model.endswith(".MegatronBertModel")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "modeling.py", "generation"])
def test_an_artifact_cannot_stand_for_weights_or_a_config(tmp_path, name):
    (tmp_path / "model_config.yaml").write_text(f"target: x\nstolen: nemo:{name}\n")
    (tmp_path / name).write_text("evil")
    assert name not in read(tmp_path).carried
