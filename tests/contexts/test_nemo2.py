"""NeMo 2's ``context/``: fiddle's JSON and ``model.yaml`` as plain data, and what is refused."""

import dataclasses
import enum
import functools
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest
import torch
from fiddle.experimental import serialization

from bioinit.contexts import load_context
from bioinit.contexts._aliases import canonical
from bioinit.contexts._fiddle import parse_fiddle
from bioinit.contexts.nemo2 import CONTEXT
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError, CorruptCheckpoint, RefusedCheckpoint
from bioinit.storage import Folder

HERE = __name__


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    num_layers: int = 12
    hidden_size: int = 768
    color: Color = Color.RED
    act: Any = None
    extra: Any = None


@dataclasses.dataclass
class Module:
    config: Any = None
    tokenizer: Any = None


@dataclasses.dataclass
class TrainerContext:
    model: Any
    trainer: Any = None
    extra: Any = None


@dataclasses.dataclass
class FileArtifact:
    attr: Any
    skip: bool = False


class SentencePieceTokenizer:
    def __init__(self, model_path: Any, vocab_file: Any = None) -> None: ...


def write(folder: Path, root: Any) -> Path:
    """A checkpoint with ``context/io.json`` as fiddle itself writes it."""
    (folder / "context").mkdir(parents=True, exist_ok=True)
    (folder / "context" / "io.json").write_text(serialization.dump_json(root))
    return folder


def write_yaml(folder: Path, text: str, name: str = "model.yaml") -> Path:
    (folder / "context").mkdir(parents=True, exist_ok=True)
    (folder / "context" / name).write_text(text)
    return folder


def read(folder: Path) -> Context:
    context = CONTEXT.read(Folder.at(folder))
    assert context is not None
    return context


def a_run(**fields: Any) -> fdl.Config:
    config = fdl.Config(Config, **fields)
    return fdl.Config(TrainerContext, model=fdl.Config(Module, config=config))


def config_value(value: Any) -> Any:
    """``value`` after fiddle wrote it and we read it."""
    document = json.loads(serialization.dump_json(fdl.Config(Config, extra=value)))
    return parse_fiddle(document, "io.json")["extra"]


# ---- values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (7, 7),
        (1e-5, 1e-5),
        (float("inf"), float("inf")),
        ("text with 'quotes' and ß", "text with 'quotes' and ß"),
        ([1, [2, ()]], [1, [2, []]]),
        ((1, "a"), [1, "a"]),
        ({"a": {"b": 1}}, {"a": {"b": 1}}),
        ({1: "one", None: 2, (1, "x"): 3, 2.5: 4}, {1: "one", None: 2, (1, "x"): 3, 2.5: 4}),
        ({"it's": 1, "a.b": 2}, {"it's": 1, "a.b": 2}),
        ({3}, [3]),
        (b"\x00\xff", "00ff"),
        (Color.RED, f"{HERE}.Color.RED"),
        (Config, f"{HERE}.Config"),
        (Path, f"{Path.__module__}.Path"),
        (write, f"{HERE}.write"),
        (torch.nn.functional.silu, "torch.nn.functional.silu"),
        (fdl.Config(Config, num_layers=3), {"_target_": f"{HERE}.Config", "num_layers": 3}),
        (
            fdl.Partial(Config, num_layers=3),
            {"_target_": f"{HERE}.Config", "_partial_": True, "num_layers": 3},
        ),
        (slice(1, 2), {"_target_": "builtins.slice", "start": 1, "stop": 2, "step": None}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_value_that_fiddle_wrote_is_read_as_plain_data(value: Any, expected: Any) -> None:
    assert config_value(value) == expected


def test_what_is_not_a_number_stays_so() -> None:
    found = config_value(float("nan"))
    assert isinstance(found, float) and found != found


def test_what_several_places_share_is_one_object() -> None:
    shared = fdl.Config(Config, num_layers=5)
    first, second = config_value([shared, shared])
    assert first is second and first["num_layers"] == 5


def test_nothing_that_a_file_names_is_imported(tmp_path: Path) -> None:
    (tmp_path / "context").mkdir()
    text = serialization.dump_json(a_run(act=functools.wraps))
    assert '"functools"' in text
    text = text.replace('"functools"', '"antigravity"').replace(f'"{HERE}"', '"no.such.module"')
    (tmp_path / "context" / "io.json").write_text(text)
    context = read(tmp_path)
    assert context.data["act"] == "antigravity.wraps" and context.model == "no.such.module.Config"
    assert "antigravity" not in sys.modules


# ---- which file says what


YAML = f"""
_target_: {HERE}.Module
config:
  _target_: {HERE}.Config
  act:
    _call_: false
    _target_: torch._C._nn.gelu
  color:
    _call_: true
    _target_: {HERE}.Color
  hidden_size: 1024
  num_layers: 2
  prefixes:
    _call_: true
    _target_: dataclasses._HAS_DEFAULT_FACTORY_CLASS
  params_dtype:
    _call_: false
    _target_: torch.bfloat16
tokenizer: null
"""


def test_fields_that_were_passed_come_from_io_json_and_the_rest_from_model_yaml(
    tmp_path: Path,
) -> None:
    write_yaml(write(tmp_path, a_run(num_layers=3, color=Color.RED)), YAML)
    context = read(tmp_path)
    assert dict(context.data) == {
        "num_layers": 3,
        "color": f"{HERE}.Color.RED",
        "act": "torch._C._nn.gelu",
        "hidden_size": 1024,
        "params_dtype": "torch.bfloat16",
    }
    assert set(context.raw["literal"]) == {"num_layers", "color"}
    assert context.raw["default"]["hidden_size"] == str(tmp_path / "context" / "model.yaml")
    assert context.where == str(tmp_path / "context" / "io.json")
    assert context.dialect == "nemo2" and context.model == f"{HERE}.Config"


def test_without_model_yaml_there_are_the_fields_that_were_passed(tmp_path: Path) -> None:
    assert dict(read(write(tmp_path, a_run(num_layers=3))).data) == {"num_layers": 3}


@pytest.mark.parametrize("name", ["model.yaml", "model_config.yaml"])
def test_without_io_json_the_yaml_speaks(tmp_path: Path, name: str) -> None:
    context = read(write_yaml(tmp_path, YAML, name))
    assert context.data["hidden_size"] == 1024 and context.model == f"{HERE}.Config"
    assert context.where.endswith(name)


def test_a_yaml_of_another_class_fills_nothing(tmp_path: Path) -> None:
    write_yaml(write(tmp_path, a_run(num_layers=3)), YAML.replace("Config", "Other"))
    assert dict(read(tmp_path).data) == {"num_layers": 3}


def test_a_preset_is_the_class_that_it_presets(tmp_path: Path) -> None:
    at = "nemo.collections.llm.gpt.model.llama"
    text = YAML.replace(f"{HERE}.Config", f"{at}.Llama3Config8B")
    context = read(write_yaml(tmp_path, text))
    assert context.model == f"{at}.Llama3Config8B"
    assert context.raw["canonical"] == f"{at}.LlamaConfig"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bionemo.esm2.api.ESM2Config", "bionemo.esm2.model.model.ESM2Config"),
        ("bionemo.esm2.model.model.ESM2Config", "bionemo.esm2.model.model.ESM2Config"),
        (
            "nemo.collections.llm.gpt.model.llama.Llama2Config7B",
            "nemo.collections.llm.gpt.model.llama.LlamaConfig",
        ),
        (
            "nemo.collections.llm.gpt.model.mixtral.MixtralConfig8x7B",
            "nemo.collections.llm.gpt.model.mixtral.MixtralConfig",
        ),
        ("torch._C._nn.gelu", "torch.nn.functional.gelu"),
        ("nemo.collections.llm.gpt.model.llama.LlamaModel",) * 2,
        ("llama.Llama2Config7B",) * 2,
    ],
)
def test_moved_and_renamed_names_lead_to_one(name: str, expected: str) -> None:
    assert canonical(name) == expected
    assert canonical(expected) == expected


@pytest.mark.parametrize("where", ["", "context"])
def test_the_context_folder_itself_and_the_old_place_say_the_same(
    tmp_path: Path, where: str
) -> None:
    write_yaml(write(tmp_path / "new", a_run(num_layers=3)), YAML)
    old = tmp_path / "old" / where
    old.mkdir(parents=True)
    for file in (tmp_path / "new" / "context").iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    assert read(tmp_path / "new" / "context").tree == read(tmp_path / "new").tree
    assert read(tmp_path / "old").tree == read(tmp_path / "new").tree


@pytest.mark.parametrize(
    "root", [fdl.Config(Config, num_layers=3), fdl.Config(Module, fdl.Config(Config, num_layers=3))]
)
def test_a_bare_config_is_the_model_s(tmp_path: Path, root: fdl.Config) -> None:
    write(tmp_path, root)
    assert dict(read(tmp_path).data) == {"num_layers": 3}
    assert load_context(tmp_path, "model.config.num_layers") == 3


def test_a_model_without_a_config_has_its_own_fields(tmp_path: Path) -> None:
    root = fdl.Config(TrainerContext, model=fdl.Config(Config, num_layers=3))
    context = read(write(tmp_path, root))
    assert dict(context.data) == {"num_layers": 3} and context.model == f"{HERE}.Config"


def test_our_own_context_is_not_taken_for_nemo_s(tmp_path: Path) -> None:
    write_yaml(tmp_path, "hidden_size: 4\n")
    (tmp_path / "context" / "record.json").write_text("{}")
    assert CONTEXT.read(Folder.at(tmp_path)) is None
    assert CONTEXT.read(Folder.at(tmp_path / "context")) is None


# ---- artifacts


def a_tokenizer(**fields: Any) -> fdl.Config:
    tokenizer = fdl.Config(SentencePieceTokenizer, **fields)
    return fdl.Config(TrainerContext, model=fdl.Config(Module, fdl.Config(Config), tokenizer))


def test_a_file_that_was_saved_along_is_relative_to_the_checkpoint_and_carried(
    tmp_path: Path,
) -> None:
    write(tmp_path, a_tokenizer(model_path="my_sp.model", vocab_file="sub/vocab.json"))
    (tmp_path / "context" / "my_sp.model").write_bytes(b"spm")
    (tmp_path / "context" / "sub").mkdir()
    (tmp_path / "context" / "sub" / "vocab.json").write_bytes(b"{}")
    for folder in (tmp_path, tmp_path / "context"):
        context = read(folder)
        tokenizer = context.tree["model"]["tokenizer"]
        assert tokenizer["model_path"] == "context/my_sp.model"
        assert tokenizer["vocab_file"] == "context/sub/vocab.json"
        assert set(context.carried) == {"tokenizer.model", "vocab.json"}
        assert context.carried["tokenizer.model"].read(0, 3) == b"spm"


def test_the_tokenizer_files_of_a_folder_are_carried_by_their_names(tmp_path: Path) -> None:
    write(tmp_path, a_tokenizer(model_path="nemo_tokenizer"))
    inner = tmp_path / "context" / "nemo_tokenizer"
    inner.mkdir()
    for name in ("tokenizer.json", "special_tokens_map.json", "notes.txt"):
        (inner / name).write_text("{}")
    context = read(tmp_path)
    assert set(context.carried) == {"tokenizer.json", "special_tokens_map.json"}
    assert context.tree["model"]["tokenizer"]["model_path"] == "context/nemo_tokenizer"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"attr": "org/name", "skip": True}, "org/name"),
        ({"attr": "my_sp.model"}, "context/my_sp.model"),
        ({"attr": None}, None),
    ],
)
def test_an_artifact_in_io_json_is_its_path_or_the_text_it_was(
    tmp_path: Path, fields: dict[str, Any], expected: str | None
) -> None:
    write(tmp_path, a_tokenizer(model_path=fdl.Config(FileArtifact, **fields)))
    file = tmp_path / "context" / "io.json"
    there = '"module": "nemo.lightning.io.artifact.file", "name": "FileArtifact"'
    changed = file.read_text().replace(f'"module": "{HERE}", "name": "FileArtifact"', there)
    assert there in changed
    file.write_text(changed)
    (tmp_path / "context" / "my_sp.model").write_bytes(b"spm")
    assert load_context(tmp_path, "model.tokenizer.model_path") == expected


def test_a_name_on_the_hub_is_a_text_and_no_file(tmp_path: Path) -> None:
    text = YAML + (
        "optim:\n  tokenizer:\n    _target_: nemo.x.AutoTokenizer\n    pretrained_model_name:\n"
        "      _target_: nemo.lightning.io.artifact.file.DirOrStringArtifact\n"
        "      attr: /home/org/name\n      skip: true\n"
    )
    context = read(write_yaml(tmp_path, text))
    assert context.tree["model"]["optim"]["tokenizer"]["pretrained_model_name"] == "/home/org/name"
    assert context.carried == {}


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "a/../../x", "..", "a\0b"])
@pytest.mark.parametrize("kind", ["text", "artifact"])
def test_an_artifact_that_leads_out_is_refused_by_its_place(
    tmp_path: Path, path: str, kind: str
) -> None:
    if kind == "text":
        write(tmp_path, a_tokenizer(model_path=path))
    else:
        shown = json.dumps(path)
        write_yaml(
            tmp_path,
            YAML.replace("tokenizer: null", "tokenizer:\n  _target_: a.b.Any\n  model_path:")
            + "    _target_: nemo.lightning.io.artifact.file.FileArtifact\n"
            + f"    attr: {shown}\n",
        )
    with pytest.raises(RefusedCheckpoint, match=r"model\.tokenizer\.model_path"):
        read(tmp_path)


@pytest.mark.parametrize("path", ["not there", "x" * 5000, ".", "", "\ud800"])
def test_an_artifact_that_is_not_there_stays_a_text(tmp_path: Path, path: str) -> None:
    write(tmp_path, a_tokenizer(model_path=path))
    context = read(tmp_path)
    assert context.tree["model"]["tokenizer"]["model_path"] == path and context.carried == {}


# ---- real files


REAL = [
    ("model.config.num_layers", 2, 2),
    ("model.config.hidden_size", 64, 32),
    ("model.config.params_dtype", "torch.float32", "torch.float32"),
    ("model.config.activation_func", "torch.nn.functional.silu", "torch._C._nn.gelu"),
    ("model.config.layernorm_epsilon", 1e-6, 1e-5),
    ("model.config.position_embedding_type", "rope", "rope"),
    ("model.config.num_query_groups", 2, None),
    ("trainer.strategy.save_ckpt_format", "torch_dist", "torch_dist"),
    ("extra", {}, {}),
]


@pytest.mark.parametrize(("subpath", "llama", "esm2"), REAL)
def test_real_contexts_give_the_exact_values(
    fixtures_dir: Path, subpath: str, llama: Any, esm2: Any
) -> None:
    assert load_context(fixtures_dir / "nemo2" / "llama_tp1", subpath) == llama
    for name in ("esm2_tp1", "esm2_tp2"):
        for inner in ("", "context"):
            assert load_context(fixtures_dir / "nemo2" / name / inner, subpath) == esm2


def test_a_real_context_says_its_classes(fixtures_dir: Path) -> None:
    llama = read(fixtures_dir / "nemo2" / "llama_tp1")
    assert llama.model == "nemo.collections.llm.gpt.model.llama.LlamaConfig"
    assert len(llama.raw["literal"]) == 20 and len(llama.data) == 207
    esm2 = read(fixtures_dir / "nemo2" / "esm2_tp2")
    assert esm2.data["tensor_model_parallel_size"] == 2
    option = "bionemo.llm.model.biobert.transformer_specs.BiobertSpecOption"
    assert esm2.data["biobert_spec_option"] == f"{option}.esm2_bert_layer_local_spec"
    assert "override_parent_fields" not in esm2.data  # its value is not in the file
    assert json.loads(json.dumps(esm2.tree)) == esm2.tree


def test_a_missing_field_is_said_with_what_there_is(fixtures_dir: Path) -> None:
    with pytest.raises(ConfigError, match="'hidden_size'"):
        load_context(fixtures_dir / "nemo2" / "llama_tp1", "model.config.hiden_size")


# ---- damaged and hostile files


def damaged(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    document = json.loads(serialization.dump_json(a_run(num_layers=3, extra=[1, {"a": 2}])))
    change(document)
    return document


def chain(count: int, width: int) -> dict[str, Any]:
    """A table in which each list holds the next one ``width`` times."""
    kind = {"type": "pyref", "module": "builtins", "name": "list"}
    lists = {
        f"l{i}": {
            "type": kind,
            "items": [["Index(index=0)", {"type": "ref", "key": f"l{i + 1}"}]] * width,
            "metadata": None,
        }
        for i in range(count)
    }
    lists[f"l{count}"] = {"type": kind, "items": [], "metadata": None}
    return {"root": {"type": "ref", "key": "l0"}, "objects": lists, "version": "0.0.1"}


def list_entry(document: dict[str, Any]) -> dict[str, Any]:
    return document["objects"]["list_1"]


DAMAGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no objects": lambda d: d.pop("objects"),
    "objects are a list": lambda d: d.update(objects=[]),
    "no root": lambda d: d.pop("root"),
    "a root that is not there": lambda d: d.update(root={"type": "ref", "key": "x"}),
    "a root that is a list": lambda d: d.update(root=[]),
    "a root that is a number": lambda d: d.update(root=5),
    "a root that is a text": lambda d: d.update(root={"type": "leaf", "value": "x"}),
    "an unknown type": lambda d: d.update(root={"type": "call"}),
    "a missing object": lambda d: d["objects"].pop("list_1"),
    "a key that is a list": lambda d: d.update(root={"type": "ref", "key": ["x"]}),
    "a circle": lambda d: list_entry(d)["items"].append(
        ["Index(index=9)", {"type": "ref", "key": "list_1"}]
    ),
    "items that are a number": lambda d: list_entry(d).update(items=3),
    "an item that is no pair": lambda d: list_entry(d).update(items=[["Index(index=0)"]]),
    "an item whose place is a number": lambda d: list_entry(d).update(items=[[0, 1]]),
    "an item that is a list": lambda d: list_entry(d).update(items=[["Index(index=0)", []]]),
    "a leaf that is a mapping": lambda d: list_entry(d)["items"].append(
        ["Index(index=1)", {"type": "leaf", "value": {}}]
    ),
    "a type without a name": lambda d: list_entry(d).update(type={"type": "pyref", "module": "a"}),
    "a name that is a number": lambda d: list_entry(d)["type"].update(name=3),
    "more keys than values": lambda d: d["objects"]["dict_1"].update(items=[]),
    "a key twice": lambda d: [
        d["objects"]["dict_1"]["items"].append(d["objects"]["dict_1"]["items"][0]),
        d["objects"]["tuple_1"]["items"].append(["Index(index=1)", "a"]),
    ],
    "a field twice": lambda d: d["objects"]["config_1"]["items"].append(
        ["Attr(name='num_layers')", {"type": "leaf", "value": 4}]
    ),
    "no description": lambda d: d["objects"].pop("buildable_traverser_metadata_1"),
    "a description of nothing": lambda d: d["objects"]["buildable_traverser_metadata_1"].update(
        items=[]
    ),
    "no model": lambda d: d["objects"]["trainer_context_1"].update(items=[]),
    "a model that is a number": lambda d: d["objects"]["trainer_context_1"]["items"].append(
        d["objects"]["trainer_context_1"].update(items=[]) or ["Attr(name='model')", 5]
    ),
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_io_json_is_corrupt_and_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "io.json").write_text(json.dumps(damaged(change)))
    with pytest.raises(CorruptCheckpoint, match=r"context/io\.json"):
        read(tmp_path)


@pytest.mark.parametrize("version", ["0.0.2", None, 1])
def test_an_unknown_version_is_refused(tmp_path: Path, version: Any) -> None:
    document = damaged(lambda d: d.update(version=version))
    with pytest.raises(RefusedCheckpoint, match="version"):
        parse_fiddle(document, "io.json")


@pytest.mark.parametrize(("count", "width"), [(40, 2), (6, 20), (5000, 1), (2, 3000)])
def test_references_that_unfold_without_end_are_corrupt_at_once(count: int, width: int) -> None:
    began = time.perf_counter()
    with pytest.raises(CorruptCheckpoint, match=r"unfold to more|levels down"):
        parse_fiddle(chain(count, width), "io.json")
    assert time.perf_counter() - began < 5


def test_references_that_unfold_to_little_are_followed() -> None:
    assert parse_fiddle(chain(10, 2), "io.json")


def test_a_key_of_a_thousand_names_costs_its_names_once() -> None:
    def change(document: dict[str, Any]) -> None:
        keys = document["objects"]["tuple_1"]["items"] = [["Index(index=0)", "k" * 1000]] * 2000
        document["objects"]["dict_1"]["items"] = [["Key(key='a')", 1]] * len(keys)

    with pytest.raises(CorruptCheckpoint, match="stands twice"):
        parse_fiddle(damaged(change), "io.json")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'{"a": NaN}']
)
def test_bytes_that_are_no_json_are_corrupt(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "io.json").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"context/io\.json"):
        read(tmp_path)


HOSTILE_YAML = {
    "a call": ("config: !!python/object/apply:os.system [touch x]", RefusedCheckpoint, "os.system"),
    "an object": ("config: !!python/object:os.Path {}", RefusedCheckpoint, "line 1"),
    "a name": ("config: !!python/name:os.system", RefusedCheckpoint, "python/name"),
    "a tag of its own": ("a: 1\nb: !mine 3", RefusedCheckpoint, "line 2.*!mine"),
    "a key twice": ("config:\n  a: 1\n  a: 2", CorruptCheckpoint, "line 3.*'a' stands twice"),
    "a circle": ("config: &a\n  b: *a", CorruptCheckpoint, r"line 2.*\*a"),
    "no anchor": ("config: *a", CorruptCheckpoint, r"\*a has no anchor"),
    "a bomb": (
        "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 10)}]\n" for i in range(30)),
        CorruptCheckpoint,
        "unfold to more",
    ),
    "a bomb of merges": (
        "a0: &a0 {x0: 1}\n"
        + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(60)),
        CorruptCheckpoint,
        "unfold to more",
    ),
    "depth": ("config: " + "[" * 100_000, CorruptCheckpoint, "nested deeper"),
    "a list": ("- 1\n- 2", CorruptCheckpoint, "not a mapping"),
    "nothing": ("", CorruptCheckpoint, "holds nothing"),
    "half of it": ("config: {a: [1", CorruptCheckpoint, "model.yaml"),
    "a NUL": ("config: \0", CorruptCheckpoint, "model.yaml"),
    "two documents": ("config: {a: 1}\n---\nconfig: {a: 2}", CorruptCheckpoint, "second document"),
    "a number without end": ("config: {a: " + "9" * 5000 + "}", CorruptCheckpoint, "5000 digits"),
    "a list as a key": ("config:\n  ? [1]\n  : 2", CorruptCheckpoint, "no scalar"),
    "a field without a name": ("config: {1: 2}", CorruptCheckpoint, "no name"),
    "an artifact as a model": (
        "_target_: nemo.lightning.io.artifact.file.FileArtifact\nattr: x\n_call_: false",
        CorruptCheckpoint,
        "no config",
    ),
}


@pytest.mark.parametrize(("text", "error", "says"), HOSTILE_YAML.values(), ids=HOSTILE_YAML)
def test_a_hostile_yaml_is_turned_down_by_file_and_line(
    tmp_path: Path, text: str, error: type[Exception], says: str
) -> None:
    write_yaml(tmp_path, text)
    began = time.perf_counter()
    with pytest.raises(error, match=says) as raised:
        read(tmp_path)
    assert time.perf_counter() - began < 5
    assert "model.yaml" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["context"]


SHARED = {
    "a member of an enum": "{_target_: *s, _name_: a, _args_: []}",
    "a path": "{_target_: a.Tokenizer, model_path: *s}",
    "a class": "{_target_: *s, m: 1}",
    "a text": "*s",
}


@pytest.mark.parametrize("item", SHARED.values(), ids=SHARED)
def test_a_long_text_that_is_shared_costs_what_it_takes_once(tmp_path: Path, item: str) -> None:
    long = "nemo.collections.llm." * 3000
    write_yaml(tmp_path, f"s: &s {long}\nconfig: {{a: [{','.join([item] * 2_000)}]}}\n")
    began = time.perf_counter()
    tracemalloc.start()
    try:
        assert len(read(tmp_path).data["a"]) == 2_000
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 5


def test_a_name_without_end_is_corrupt() -> None:
    def change(document: dict[str, Any]) -> None:
        list_entry(document)["type"].update(module="m" * 2000)

    with pytest.raises(CorruptCheckpoint, match="a name has 2004 letters"):
        parse_fiddle(damaged(change), "io.json")


def test_bytes_that_are_shared_count_every_time() -> None:
    def change(document: dict[str, Any]) -> None:
        kind = {"type": "pyref", "module": "builtins", "name": "bytes"}
        content = [["IdentityElement()", {"type": "ref", "key": "s"}]]
        document["objects"]["s"] = {"type": "leaf", "value": "x" * 1_000_000}
        list_entry(document)["items"] = [
            ["Index(index=0)", {"type": kind, "items": content, "metadata": None}]
        ] * 1000

    with pytest.raises(CorruptCheckpoint, match="unfold to more"):
        parse_fiddle(damaged(change), "io.json")


def test_a_yaml_that_is_too_large_is_corrupt_before_it_is_read(tmp_path: Path) -> None:
    write_yaml(tmp_path, "config: {}\n#" + "x" * (1 << 20))
    with pytest.raises(CorruptCheckpoint, match="bytes"):
        read(tmp_path)


def test_yaml_aliases_merges_and_numbers_mean_what_they_say(tmp_path: Path) -> None:
    text = (
        "config:\n  base: &b {lr: 1e-5, n: 0x10, on_off: yes, s: '1'}\n"
        "  more: {<<: *b, n: 3}\n  again: *b\n  t: !!python/tuple [1, 2]\n  d: 2001-01-01\n"
    )
    data = read(write_yaml(tmp_path, text)).data
    assert data["base"] == {"lr": 1e-5, "n": 16, "on_off": True, "s": "1"}
    assert data["more"] == {**data["base"], "n": 3} and data["again"] == data["base"]
    assert data["t"] == [1, 2] and data["d"] == "2001-01-01"
