"""GPT-NeoX's YAML files, in ``configs/`` or beside the weights."""

from pathlib import Path

import pytest

from bioinit.contexts import load_context
from bioinit.contexts.neox import CONTEXT
from bioinit.contexts.protocol import Context
from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.storage import Folder

MODEL = """# a tiny model
{
  "pipe-parallel-size": 1,   # comment
  "model-parallel-size": 2,
  "num-layers": 4,
  "hidden-size": 32,
  "no-weight-tying": true,
  "rotary_pct": 0.25,
  "optimizer": {"type": "Adam", "params": {"lr": 0.97e-4, "max-steps": 1e8}},
}
"""
SETUP = 'vocab-file: ./20B_checkpoints/20B_tokenizer.json\n"num-layers": 4\n'


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.yml").write_text(text)
    return folder


def read(folder: Path) -> Context:
    context = CONTEXT.read(Folder.at(folder))
    assert context is not None
    return context


@pytest.mark.parametrize("inner", ["configs", ""])
def test_all_files_count_and_keys_have_underscores(tmp_path: Path, inner: str) -> None:
    write(tmp_path / inner, model=MODEL)
    if inner:
        write(tmp_path / inner, setup=SETUP)
    context = read(tmp_path)
    assert context.dialect == "neox" and context.model is None
    assert context.data["num_layers"] == 4 and context.data["model_parallel_size"] == 2
    assert context.data["rotary_pct"] == 0.25 and context.data["no_weight_tying"] is True
    assert context.data["optimizer"]["params"] == {"lr": 0.97e-4, "max-steps": 1e8}
    assert context.where == str(tmp_path / inner / "model.yml")
    assert load_context(tmp_path, "model.config.hidden_size") == 32


@pytest.mark.parametrize("name", ["20B_tokenizer.json", "tokenizer.json", "my_tokenizer_v2.json"])
def test_the_tokenizer_beside_the_weights_is_carried(tmp_path: Path, name: str) -> None:
    write(tmp_path / "configs", model=MODEL, setup=SETUP)
    (tmp_path / name).write_text("{}")
    (tmp_path / "other.json").write_text("{}")
    carried = read(tmp_path).carried
    assert {out: file.name for out, file in carried.items()} == {"tokenizer.json": name}


def test_a_vocabulary_elsewhere_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "configs", model=MODEL, setup="vocab-file: /etc/passwd\n")
    context = read(tmp_path)
    assert context.carried == {} and context.data["vocab_file"] == "/etc/passwd"


@pytest.mark.parametrize("other", ['"num-layers": 5', "num_layers: 5"])
def test_two_files_that_contradict_each_other_are_both_named(tmp_path: Path, other: str) -> None:
    write(tmp_path / "configs", model=MODEL, setup=other)
    with pytest.raises(
        CorruptCheckpoint, match=r"model\.yml says that num_layers is 4.*setup\.yml"
    ):
        read(tmp_path)


def test_one_file_that_contradicts_itself_is_corrupt(tmp_path: Path) -> None:
    write(tmp_path, model=MODEL.replace("}\n", ', "num_layers": 7}\n').replace(",\n, ", ",\n"))
    with pytest.raises(CorruptCheckpoint, match="num_layers"):
        read(tmp_path)


def test_a_contradiction_of_large_values_costs_no_more_than_they_are(tmp_path: Path) -> None:
    large = "x" * 60_000
    many = f"a: &a '{large}'\ndata: [" + ",".join(["*a"] * 50_000) + "]\n"
    write(tmp_path / "configs", model=MODEL, one=many, two="data: []\n")
    with pytest.raises(CorruptCheckpoint, match="data is a list") as raised:
        read(tmp_path)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "num_layers: 2\nhidden_size: 4\n",
        "num_layers: 2\nhidden_size: 4\ntensor_model_parallel_size: 1\n",
        "slices: [{model: a}]\nmerge_method: slerp\n",
        "a: !!python/object:b.C {}",
        "{{ template }}",
    ],
)
def test_the_yaml_of_others_is_left_alone(tmp_path: Path, text: str) -> None:
    write(tmp_path, some=text)
    write(tmp_path / "configs", some=text)
    assert CONTEXT.read(Folder.at(tmp_path)) is None


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (MODEL + "\nbroken: [", CorruptCheckpoint),
        (MODEL.replace("true", "!!python/name:os.system"), RefusedCheckpoint),
        ("- num-layers: 1\n- hidden-size: 2\n- pos-emb: rotary\n", CorruptCheckpoint),
    ],
)
def test_a_damaged_or_hostile_file_is_turned_down_by_name(
    tmp_path: Path, text: str, error: type[Exception]
) -> None:
    write(tmp_path / "configs", model=text)
    with pytest.raises(error, match=r"configs/model\.yml"):
        read(tmp_path)
