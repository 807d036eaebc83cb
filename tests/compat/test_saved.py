"""io.json: written as NeMo 2.2.1 writes it, read back from classes that are known only."""

import enum
import functools
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import fiddle as fdl
import pytest
import torch
import yaml
from fiddle.experimental import serialization

from bioinit.compat._saved import UnknownClass, names
from bioinit.compat.nemo import io
from bioinit.compat.nemo.io.artifact import (
    Artifact,
    DirArtifact,
    DirOrStringArtifact,
    FileArtifact,
    PathArtifact,
)
from bioinit.contexts import find
from bioinit.errors import ConfigError, CorruptCheckpoint, RefusedCheckpoint, StorageError
from bioinit.storage import Folder


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Shade(enum.Enum):
    DARK = 1


@dataclass
class Inner:
    u: int = 1
    v: list = field(default_factory=list)


@dataclass
class Settings(io.IOMixin):
    width: int = 3
    names: list = field(default_factory=lambda: ["n"])
    act: object = torch.nn.functional.gelu
    dtype: torch.dtype = torch.float32
    inner: Inner | None = None
    shade: Shade = Shade.DARK


class Model(io.IOMixin):
    def __init__(self, config, tokenizer=None, **more):
        self.config = config
        self.tokenizer = tokenizer
        self.more = more


class Pair(io.IOMixin):
    def __init__(self, p, q=None):
        self.p = p
        self.q = q


class Trainer:
    def __init__(self, *callbacks, steps=1):
        self.callbacks = callbacks
        self.steps = steps


class Tokenizer:
    def __init__(self, vocab_file, name="x"):
        self.vocab_file = vocab_file
        self.name = name


class Files(io.IOMixin):
    def __init__(self, folder=None, path=None, either=None):
        self.folder = folder
        self.path = path
        self.either = either

    @classmethod
    def io_artifacts(cls):
        return [
            DirArtifact("folder", required=False),
            PathArtifact("path", required=False),
            DirOrStringArtifact("either", required=False),
        ]


io.track_io(Trainer)
io.track_io(Tokenizer, [FileArtifact("vocab_file"), FileArtifact("name", required=False)])


@pytest.fixture(autouse=True)
def names_of_one_test(monkeypatch):
    """What a test makes known is forgotten after it."""
    for table in ("_HELD", "_SIGNED"):
        monkeypatch.setattr(names, table, dict(getattr(names, table)))


class Maker:
    @classmethod
    def make(cls):
        return cls.__name__

    def method(self):
        pass


class HeirOfMaker(Maker):
    pass


def add(a, b, c=5):
    return a + b + c


def again(value, folder, **how):
    value.io_dump(folder, yaml_attrs=[])
    return io.load(folder, **how)


HOLDS_ITSELF = [[1]]
HOLDS_ITSELF[0].append(HOLDS_ITSELF)
VALUES = {
    "numbers and text": (1, 2.5, True, None, "text \n ü"),
    "containers": {"a": (1, 2), ("k", 2): [{3}], 4: frozenset([5]), None: {}},
    "bytes": b"x\xff\x00",
    "enum": {"c": Color.RED, Color.BLUE: Color.BLUE},
    "classes": [Inner, Pair, int, torch.nn.ReLU],
    "functions": [add, torch.nn.functional.silu, torch.nn.functional.gelu, torch.nn.init.normal_],
    "class methods": [Maker.make, HeirOfMaker.make],
    "dtypes": [torch.bfloat16, torch.float8_e4m3fn, torch.int64],
    "path": [Path("/x/y"), Path("z")],
    "dataclass": [Inner(4, [Inner(5)])],
    "infinite": [math.inf, -math.inf],
    "big": [2**80, -(2**80), 1e-300],
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_come_back_as_they_were(value, tmp_path):
    assert again(Pair({"in": value}, value), tmp_path).p == {"in": value}
    assert io.load(tmp_path).q == value
    assert type(io.load(tmp_path).q) is type(value)


def test_a_nan_comes_back(tmp_path):
    assert math.isnan(again(Pair(math.nan), tmp_path).p)


def test_an_object_comes_back_with_what_it_was_given_and_no_more(tmp_path):
    made = Model(Settings(7, dtype=torch.bfloat16, inner=Inner(2)), Trainer(1, 2, steps=3), z=[4])
    loaded = again(made, tmp_path)
    assert loaded.config == made.config
    assert loaded.more == {"z": [4]}
    assert loaded.tokenizer.callbacks == (1, 2) and loaded.tokenizer.steps == 3
    assert loaded.__io__ == made.__io__
    assert set(loaded.config.__io__.__arguments__) == {"width", "dtype", "inner"}


def test_objects_in_containers_are_written_as_what_they_were_made_from(tmp_path):
    made = Pair([Settings(9), 1], {"k": Trainer(4)})
    for _ in range(2):
        made = again(made, tmp_path)
    assert made.p[0] == Settings(9) and made.q["k"].callbacks == (4,)


def test_shared_objects_are_shared_again(tmp_path):
    child, listed = Settings(1), [Settings(2)]
    loaded = again(Pair({"a": child, "l": listed}, {"b": child, "l": listed}), tmp_path)
    assert loaded.p["a"] is loaded.q["b"]
    assert loaded.p["l"][0] is loaded.q["l"][0]


def test_changed_hyper_parameters_are_what_is_written(tmp_path):
    child = Settings(1)
    parent = Pair(child)
    child.__io__.width = 9
    child.__io__.inner = Inner(5)  # a live object, where the original failed to write
    assert again(parent, tmp_path).p == Settings(9, inner=Inner(5))


def test_a_partial_is_a_partial_again(tmp_path):
    made = Pair({"f": functools.partial(add, 10, c=15)}, functools.partial(Inner, v=[1]))
    config = again(made, tmp_path, build=False)
    assert config.p["f"] == fdl.Partial(add, 10, c=15)
    loaded = io.load(tmp_path)
    assert loaded.p["f"](b=2) == 27 and loaded.q(u=3) == Inner(3, [1])
    loaded = again(Pair(functools.partial(int, base=2), functools.partial(dict, k=3)), tmp_path)
    assert loaded.p("11") == 3 and loaded.q() == {"k": 3}


def test_without_build_a_config_comes_back(tmp_path):
    config = again(Pair(Settings(3), Inner(4)), tmp_path, build=False)
    assert config == fdl.Config(Pair, fdl.Config(Settings, width=3), fdl.Config(Inner, u=4, v=[]))
    assert config.p.act is torch.nn.functional.gelu


@pytest.mark.parametrize(
    "subpath, wanted",
    [
        ("config", Settings(7)),
        ("tokenizer", Settings(8)),
        ("many['a']", Settings(9)),
        ('many["b.c"][1]', Settings(10)),
        ("many.a", Settings(9)),
        ("config.inner", None),
    ],
)
def test_a_part_is_loaded_alone(subpath, wanted, tmp_path):
    many = {"a": Settings(9), "b.c": [0, Settings(10)]}
    Model(Settings(7), Settings(8), many=many).io_dump(tmp_path)
    if wanted is None:
        with pytest.raises(ConfigError, match=r"at config there is no 'inner'.*There is: width\."):
            io.load(tmp_path, subpath=subpath)
    else:
        assert io.load(tmp_path, subpath=subpath) == wanted


@pytest.mark.parametrize("subpath", ["nope", "config.nope", "config..width", "[", "config.width"])
def test_a_part_that_is_not_there_is_an_error(subpath, tmp_path):
    Model(Settings(7)).io_dump(tmp_path)
    with pytest.raises((ConfigError, CorruptCheckpoint)) as raised:
        io.load(tmp_path, subpath=subpath)
    assert subpath in str(raised.value)


def test_a_part_is_loaded_where_the_rest_is_not_known(tmp_path):
    Model(Settings(7), Trainer()).io_dump(tmp_path)
    text = (tmp_path / "io.json").read_text()
    (tmp_path / "io.json").write_text(text.replace('"Trainer"', '"Vanished"'))
    with pytest.raises(UnknownClass, match="Vanished") as raised:
        io.load(tmp_path)
    assert raised.value.unknown == (f"{__name__}.Vanished",)
    assert "track_io" in str(raised.value)
    assert io.load(tmp_path, subpath="config") == Settings(7)


def test_the_file_is_what_fiddle_reads(tmp_path):
    made = Pair([Settings(9, act=torch.nn.functional.silu)], {"t": (1, None), "c": Color.RED})
    made.io_dump(tmp_path)
    config = serialization.load_json((tmp_path / "io.json").read_text())
    assert config == io.load(tmp_path, build=False)
    document = json.loads((tmp_path / "io.json").read_text())
    assert list(document) == ["root", "objects", "refcounts", "version"]
    assert document["root"] == {"type": "ref", "key": "pair_1"}
    assert document["objects"]["settings_1"]["paths"] == ["<root>.p[0]"]


def test_yaml_states_every_field_with_its_default(tmp_path):
    model = Model(Settings(7, inner=Inner(2)), Tokenizer, f=functools.partial(add, 1), p=Path("x"))
    Pair(model).io_dump(tmp_path, yaml_attrs=["p"])
    assert yaml.safe_load((tmp_path / "p.yaml").read_text()) == {
        "_target_": f"{__name__}.Model",
        "config": {
            "_target_": f"{__name__}.Settings",
            "width": 7,
            "names": ["n"],
            "act": {"_target_": "torch.nn.functional.gelu", "_call_": False},
            "dtype": {"_target_": "torch.float32", "_call_": False},
            "inner": {"_target_": f"{__name__}.Inner", "u": 2, "v": []},
            "shade": {
                "_target_": f"{__name__}.Shade",
                "_call_": True,
                "_args_": [1],
                "_name_": "DARK",
            },
        },
        "tokenizer": {"_target_": f"{__name__}.Tokenizer", "_call_": False},
        "f": {"_target_": f"{__name__}.add", "_partial_": True, "a": 1, "c": 5},
        "p": {"_target_": "pathlib.Path", "_args_": ["x"]},
    }


def test_yaml_of_what_is_no_argument_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(ConfigError, match="'pp', which is no argument of Pair"):
        Pair(1).io_dump(tmp_path / "out", yaml_attrs=["pp"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "value, what",
    [
        (torch.zeros(2), r"<root>\.p is a torch\.Tensor.*track_io\(Tensor\)"),
        ([{"k": object()}], r"<root>\.p\[0\]\['k'\] is a builtins\.object"),
        (lambda: 1, r"<root>\.p is <function"),
        (functools.partial(lambda: 1), r"<root>\.p is <function"),
        (functools.partial(torch.nn.functional.gelu, approximate="tanh"), "a function of your own"),
        (Maker().method, r"<root>\.p is <bound method .*a method of an object"),
        (HOLDS_ITSELF, r"<root>\.p\[0\]\[1\] is a builtins\.list that holds itself"),
        ({Inner: 1, (1, Path("x")): 2}, r"<root>\.p has the key"),
    ],
    ids=[
        "tensor",
        "object",
        "lambda",
        "partial of a lambda",
        "partial in C",
        "method",
        "cycle",
        "key",
    ],
)
def test_what_cannot_be_written_is_an_error_and_leaves_the_earlier_file(value, what, tmp_path):
    Pair(5).io_dump(tmp_path)
    with pytest.raises(serialization.UnserializableValueError, match=what) as raised:
        Pair(value).io_dump(tmp_path, yaml_attrs=["q"])
    assert isinstance(raised.value, ConfigError)
    assert io.load(tmp_path).p == 5
    assert os.listdir(tmp_path) == ["io.json"]
    with pytest.raises(ConfigError):
        Pair(value).io_dump(tmp_path / "new" / "folder")
    assert not (tmp_path / "new" / "folder").exists()


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    Pair(5).io_dump(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match="no space left"):
        Pair(6).io_dump(tmp_path)
    monkeypatch.undo()
    assert io.load(tmp_path).p == 5 and os.listdir(tmp_path) == ["io.json"]


def test_files_go_along_and_are_found_where_they_lie_now(tmp_path):
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("hello")
    Pair(Tokenizer(str(vocab), "plain")).io_dump(tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["io.json", "vocab.txt"]
    (tmp_path / "out").rename(tmp_path / "moved")
    loaded = io.load(tmp_path / "moved").p
    assert (loaded.vocab_file, loaded.name) == (str(tmp_path / "moved/vocab.txt"), "plain")
    assert loaded.__io__.vocab_file.startswith(str(tmp_path / "moved"))
    assert io.load(tmp_path / "moved", build=False).p.vocab_file == loaded.vocab_file


def test_a_file_that_was_lost_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    for name in ("vocab.txt", "plain"):
        (tmp_path / name).write_text("x")
    Pair(Tokenizer(tmp_path / "vocab.txt", "text")).io_dump(tmp_path / "out")
    (tmp_path / "out/vocab.txt").unlink()
    (tmp_path / "out/text").write_text("a file of that name")
    monkeypatch.chdir(tmp_path)
    loaded = io.load(tmp_path / "out").p
    assert loaded.vocab_file == str(tmp_path / "out/vocab.txt")
    assert (loaded.name, type(loaded.name)) == ("text", str)


def test_files_of_one_name_do_not_replace_each_other(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text(name)
    made = Pair(
        Tokenizer(tmp_path / "a/vocab.txt", None), Tokenizer(tmp_path / "b/vocab.txt", None)
    )
    loaded = again(again(made, tmp_path / "out"), tmp_path / "other")
    assert Path(loaded.p.vocab_file).read_text() == "a"
    assert Path(loaded.q.vocab_file).read_text() == "b"


def test_folders_and_paths_go_along(tmp_path):
    (tmp_path / "dir/deep").mkdir(parents=True)
    (tmp_path / "dir/deep/f.txt").write_text("deep")
    (tmp_path / "file.bin").write_text("file")
    made = Files(str(tmp_path / "dir"), tmp_path / "file.bin", "org/name")
    loaded = again(made, tmp_path / "out")
    assert Path(loaded.folder, "deep/f.txt").read_text() == "deep"
    assert loaded.folder == str(tmp_path / "out/dir")
    assert Path(loaded.path).read_text() == "file"
    assert loaded.either == "org/name"
    either = again(Files(either=str(tmp_path / "dir")), tmp_path / "third").either
    assert Path(either, "deep/f.txt").read_text() == "deep"
    assert again(Files(), tmp_path / "none").either is None


def test_a_file_that_must_go_along_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_file is required.*not provided"):
        Pair(Tokenizer(None)).io_dump(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_artifacts_of_peoples_own(tmp_path):
    class Upper(Artifact[str]):
        def dump(self, instance, value, absolute_dir, relative_dir):
            (Path(absolute_dir) / relative_dir / "upper.txt").write_text(value.upper())
            return "upper.txt"

        def load(self, path):
            return path

    assert repr(Upper("a")) == "Upper(skip= False, attr= a, required= True)"
    with pytest.raises(TypeError):
        Artifact("a")

    class Says(io.IOMixin):
        def __init__(self, a):
            self.a = a

    io.track_io(Says, [Upper("a")])
    assert Path(again(Says("text"), tmp_path).a).read_text() == "TEXT"


@pytest.mark.parametrize("path", ["../vocab.txt", "/etc/passwd"])
def test_a_file_outside_is_refused(path, tmp_path):
    (tmp_path / "vocab.txt").write_text("x")
    Pair(Tokenizer(tmp_path / "vocab.txt", None)).io_dump(tmp_path / "out")
    file = tmp_path / "out/io.json"
    file.write_text(file.read_text().replace('"vocab.txt"', json.dumps(path)))
    with pytest.raises(RefusedCheckpoint, match="leads out of the checkpoint"):
        io.load(tmp_path / "out")
    file.write_text(file.read_text().replace("Attr(name='vocab_file')", "Index(index=0)"))
    with pytest.raises(RefusedCheckpoint, match="leads out of the checkpoint"):
        io.load(tmp_path / "out")


def test_a_link_out_of_the_checkpoint_is_refused(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "dir").mkdir()
    for name in ("vocab.txt", "secret", "blobs/b", "dir/f"):
        (tmp_path / name).write_text(name)
    out = tmp_path / "snapshots/1/context"
    Pair(Tokenizer(tmp_path / "vocab.txt", None), Files(str(tmp_path / "dir"))).io_dump(out)
    for link in (out / "vocab.txt", out / "dir/f"):
        link.unlink()
        link.symlink_to(tmp_path / "secret")
        with pytest.raises(RefusedCheckpoint, match=rf"{link} is a link to .*secret"):
            io.load(out)
        link.unlink()
        link.symlink_to(tmp_path / "blobs/b")
        assert Path(io.load_context(out.parent).p.vocab_file).exists()
    out.rename(tmp_path / "elsewhere")
    out.symlink_to(tmp_path / "elsewhere")
    assert Path(io.load_context(out.parent).p.vocab_file).exists()


def test_text_that_names_a_file_elsewhere_is_refused(tmp_path):
    there = tmp_path / "there.txt"
    Pair(Tokenizer(str(there), "plain")).io_dump(tmp_path / "out")
    assert io.load(tmp_path / "out").p.vocab_file == str(there)  # which names no file, as then
    there.write_text("a file by now")
    with pytest.raises(RefusedCheckpoint, match="leads out of the checkpoint"):
        io.load(tmp_path / "out")


def test_names_beyond_all_length_are_names_of_no_file(tmp_path):
    (tmp_path / "vocab.txt").write_text("x")
    Pair(Tokenizer(tmp_path / "vocab.txt", "plain")).io_dump(tmp_path)
    file = tmp_path / "io.json"
    file.write_text(file.read_text().replace('"vocab.txt"', json.dumps("a" * 5000)))
    assert io.load(tmp_path).p.vocab_file == str(tmp_path / ("a" * 5000))
    with pytest.raises(FileNotFoundError, match="No such file"):
        io.load("a" * 5000)


def test_arguments_that_a_class_has_lost_are_dropped(tmp_path, caplog):
    Pair([Settings(3)]).io_dump(tmp_path)
    document = json.loads((tmp_path / "io.json").read_text())
    leaf = ["Attr(name='old')", {"type": "leaf", "value": 1}]
    document["objects"]["settings_1"]["items"].append(leaf)
    (tmp_path / "io.json").write_text(json.dumps(document))
    with caplog.at_level(logging.WARNING):
        assert io.load(tmp_path).p == [Settings(3)]
    assert "Deprecated parameters to drop from <root>.p[0]: ['old']" in caplog.text


def test_dropping_says_whether_anything_was_dropped():
    class Old:
        def __init__(self, x, y, deprecated):
            pass

    class New:
        def __init__(self, x, y):
            pass

    config = fdl.Config(Pair, p={"k": [fdl.Config(Old, x=1, y=2, deprecated=3)]}, q=4)
    assert not io.drop_unexpected_params(config)
    config.p["k"][0].__dict__["__fn_or_cls__"] = New
    assert io.drop_unexpected_params(config)
    assert (config.q, config.p["k"][0].x, config.p["k"][0].y) == (4, 1, 2)
    assert not hasattr(config.p["k"][0], "deprecated")
    assert not io.drop_unexpected_params(config)


def test_a_context_is_found_from_the_checkpoint_and_from_its_folder(tmp_path):
    made = io.TrainerContext(
        Model(Settings(7)), Trainer(2), extra={"d": functools.partial(add, 10, c=15)}
    )
    made.io_dump(tmp_path / "ckpt" / "context", yaml_attrs=["model"])
    for path in ("ckpt", "ckpt/context", "ckpt/context/io.json", "ckpt/context/context"):
        loaded = io.load_context(tmp_path / path)
        assert isinstance(loaded, io.TrainerContext)
        assert loaded.model.config == Settings(7) and loaded.extra["d"](b=2) == 27
    assert io.load_context(str(tmp_path / "ckpt"), subpath="model.config") == Settings(7)
    config = io.load_context(tmp_path / "ckpt", build=False)
    assert isinstance(config, fdl.Config) and config.model.config.width == 7
    assert config.extra["d"] == fdl.Partial(add, 10, c=15)


def test_our_own_reading_of_contexts_knows_what_was_written(tmp_path):
    io.TrainerContext(Model(Settings(7)), Trainer()).io_dump(tmp_path / "context", ["model"])
    context = find([Folder.at(tmp_path)])
    assert context.dialect == "nemo2" and context.model == f"{__name__}.Settings"
    assert context.data["width"] == 7 and context.data["names"] == ["n"]
    assert context.tree["_target_"] == "nemo.lightning.io.pl.TrainerContext"


def test_a_context_of_a_trainer():
    trainer = Trainer(steps=2)
    with pytest.raises(ValueError, match="Trainer must be an instance of"):
        io.TrainerContext.from_trainer(object())
    trainer.lightning_module = object()
    with pytest.raises(ValueError, match="LightningModule must extend IOMixin"):
        io.TrainerContext.from_trainer(trainer)
    trainer.lightning_module = Pair(1)
    assert io.TrainerContext.from_trainer(trainer).extra == {}
    trainer.datamodule = Pair(2)
    made = io.TrainerContext.from_trainer(trainer)
    assert (made.trainer, made.model) == (trainer, trainer.lightning_module)
    assert made.extra == {"datamodule": trainer.datamodule.__io__}


@pytest.mark.parametrize("load, named", [(io.load, "out"), (io.load_context, "out/context")])
def test_what_is_not_there_is_a_file_not_found_error(load, named, tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file") as raised:
        load(tmp_path / "out")
    assert str(tmp_path / named) in str(raised.value)
    assert isinstance(raised.value, StorageError)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"objects": {}}', '{"objects": {}, "version": "0.0.1", "root": 3}'],
)
def test_a_damaged_file_is_an_error_of_ours(text, tmp_path):
    (tmp_path / "io.json").write_text(text)
    for subpath in (None, "model"):
        with pytest.raises((CorruptCheckpoint, RefusedCheckpoint, ConfigError)):
            io.load(tmp_path, subpath=subpath)


def at_p(tmp_path, node):
    """The file of a pair that has ``node`` as its ``p``."""
    Pair(1).io_dump(tmp_path)
    document = json.loads((tmp_path / "io.json").read_text())
    document["objects"]["pair_1"]["items"][0][1] = node
    (tmp_path / "io.json").write_text(json.dumps(document))


def pyref(kind):
    module, _, name = kind.rpartition(".")
    return {"type": "pyref", "module": module, "name": name}


@pytest.mark.parametrize(
    "items, kind, error, what",
    [
        ([["x", []]], "builtins.set", CorruptCheckpoint, "a list stands where a value should"),
        (
            [["SetElement()", {"type": pyref("builtins.list"), "items": [], "metadata": None}]],
            "builtins.set",
            CorruptCheckpoint,
            "a set holds what cannot be in one",
        ),
        ([], "collections.OrderedDict", UnknownClass, r"collections\.OrderedDict"),
        ([["Attr(name='a')", 1]], f"{__name__}.Pair", UnknownClass, r"\.Pair"),
    ],
)
def test_objects_of_no_use_are_errors_of_ours(items, kind, error, what, tmp_path):
    at_p(tmp_path, {"type": pyref(kind), "items": items, "metadata": None})
    with pytest.raises(error, match=what):
        io.load(tmp_path)


def test_a_set_as_a_key_is_damage(tmp_path):
    def made(kind, items, metadata=None):
        return {"type": pyref(f"builtins.{kind}"), "items": items, "metadata": metadata}

    keys = made("tuple", [["Index(index=0)", made("set", [])]])
    at_p(tmp_path, made("dict", [["Key(key='a')", {"type": "leaf", "value": 1}]], keys))
    with pytest.raises(CorruptCheckpoint, match="what cannot be a key is one"):
        io.load(tmp_path)


@pytest.mark.parametrize("place", ["Index(index=7)", "Index(index=-1)", "Somewhere()"])
def test_an_argument_at_no_place_is_damage(place, tmp_path):
    Pair(1).io_dump(tmp_path)
    file = tmp_path / "io.json"
    file.write_text(file.read_text().replace("Attr(name='p')", place))
    with pytest.raises(CorruptCheckpoint, match="is no place of an argument"):
        io.load(tmp_path)


class Places(io.IOMixin):
    def __init__(self, a, /, b, *rest):
        self.given = (a, b, *rest)


@pytest.mark.parametrize(
    "places, given",
    [
        ([0, 1, 2], (0, 1, 2)),
        ([0, "b", 2, 3], (0, "b", 2, 3)),
        ([2, 1, 0], (0, 1, 2)),
        ([0, 1, 3], None),
        ([0, 2], None),
        ([1, 2, "lost"], None),
        ([0, 1, "b"], None),
    ],
)
def test_arguments_by_position_have_each_its_place(places, given, tmp_path):
    Places(0, 1).io_dump(tmp_path)
    document = json.loads((tmp_path / "io.json").read_text())
    document["objects"]["places_1"]["items"] = [
        [
            f"Attr(name='{p}')" if isinstance(p, str) else f"Index(index={p})",
            {"type": "leaf", "value": p},
        ]
        for p in places
    ]
    (tmp_path / "io.json").write_text(json.dumps(document))
    if given is None:
        with pytest.raises(CorruptCheckpoint, match=r"no (such )?place"):
            io.load(tmp_path)
    else:
        assert io.load(tmp_path).given == given


def test_a_file_beyond_all_measure_is_not_read(tmp_path):
    (tmp_path / "io.json").write_bytes(b" " * (5 << 20))
    with pytest.raises(CorruptCheckpoint, match="has 5242880 bytes"):
        io.load(tmp_path)


HOSTILE = {
    "a function of the system": ("os", "system"),
    "a builtin": ("builtins", "eval"),
    "a module that is not imported": ("bioinit_no_such_module", "Thing"),
    "a class that is imported": ("subprocess", "Popen"),
    "an attribute of a known class": (__name__, "Pair.io_dump"),
}


@pytest.mark.parametrize("module, name", HOSTILE.values(), ids=HOSTILE)
def test_nothing_is_called_or_imported_because_a_file_names_it(module, name, tmp_path):
    Pair(Settings(3)).io_dump(tmp_path)
    whole = json.loads((tmp_path / "io.json").read_text())
    named = pyref(f"{module}.{name}")
    for place in ("value", "callable"):
        document = json.loads(json.dumps(whole))
        if place == "value":
            document["objects"]["settings_1"]["items"][0][1] = named
        else:
            text = json.dumps(pyref(f"{__name__}.Settings"))
            document = json.loads(json.dumps(document).replace(text, json.dumps(named)))
        (tmp_path / "io.json").write_text(json.dumps(document))
        with pytest.raises(UnknownClass, match="does not know"):
            io.load(tmp_path)
        assert module not in sys.modules or not module.startswith("bioinit_no")


@dataclass
class Unsaid:
    u: int = 1


class Plan(io.IOMixin):
    def __init__(self, kind=Unsaid, function=add, more: "of no type" = None):  # noqa: F722
        pass


class Signed:
    def __init__(self, u: Unsaid):
        pass


ONLY_NAMED = {
    "a function": (add, lambda: Pair(add)),
    "a class": (Maker, lambda: Pair([Maker])),
    "a class method": (HeirOfMaker.make, lambda: Pair({"k": HeirOfMaker.make})),
    "a dataclass": (Unsaid, lambda: Pair(Unsaid)),
    "an enum": (Color, lambda: Pair(Color.RED)),
    "what a partial calls": (add, lambda: Pair(functools.partial(add, 1))),
    "what a config of a function calls": (add, lambda: Pair(fdl.Config(add, 1, b=2))),
    "a default": (Unsaid, lambda: Pair(Plan)),
    "what the signature of a value names": (Unsaid, lambda: Pair(Signed)),
}


@pytest.mark.parametrize("target, honest", ONLY_NAMED.values(), ids=ONLY_NAMED)
def test_what_was_written_as_a_value_is_not_called_by_another_file(target, honest, tmp_path):
    honest().io_dump(tmp_path)
    Pair(Settings(3)).io_dump(tmp_path / "foreign")
    file = tmp_path / "foreign/io.json"
    said, named = json.dumps(pyref(f"{__name__}.Settings")), json.dumps(pyref(names.dotted(target)))
    file.write_text(file.read_text().replace(said, named))
    with pytest.raises(UnknownClass, match=rf"{target.__name__}.*make_known") as raised:
        io.load(tmp_path / "foreign")
    assert raised.value.unknown == (names.dotted(target),)
    io.make_known(target)
    honest().io_dump(tmp_path)  # takes nothing back
    assert names.may_be_called(names.find(names.dotted(target)))
    io.load(tmp_path)


def test_what_was_written_as_a_value_is_not_in_a_partial_of_another_file(tmp_path):
    Pair(functools.partial(Inner, u=2), Maker.make).io_dump(tmp_path)
    file = tmp_path / "io.json"
    said, named = (
        json.dumps(pyref(f"{__name__}.Inner")),
        json.dumps(pyref(f"{__name__}.Maker.make")),
    )
    file.write_text(file.read_text().replace(said, named))
    with pytest.raises(UnknownClass, match=r"Maker\.make"):
        io.load(tmp_path)
    file.write_text(file.read_text().replace(named, json.dumps(pyref("torch.float32"))))
    with pytest.raises(CorruptCheckpoint, match=r"torch\.float32 takes no arguments"):
        io.load(tmp_path)


def test_the_heir_of_a_tracked_class_is_built_again(tmp_path):
    class Heir(Trainer):
        pass

    assert again(Pair(Heir(7)), tmp_path).p.callbacks == (7,)


def test_a_plain_type_may_be_named_and_is_not_called(tmp_path):
    assert again(Pair(int), tmp_path).p is int
    file = tmp_path / "io.json"
    pair, builtin = json.dumps(pyref(f"{__name__}.Pair")), json.dumps(pyref("builtins.int"))
    file.write_text(file.read_text().replace(pair, builtin))
    with pytest.raises(UnknownClass, match=r"builtins\.int"):
        io.load(tmp_path)


def test_what_was_pickled_is_refused(tmp_path):
    items = [["IdentityElement()", "some-file"]]
    at_p(tmp_path, {"type": pyref(f"{__name__}.Settings"), "items": items, "metadata": None})
    with pytest.raises(RefusedCheckpoint, match="pickled into the file 'some-file'"):
        io.load(tmp_path)


def test_a_class_that_has_moved_takes_its_old_name(tmp_path):
    Pair(Settings(3)).io_dump(tmp_path)
    file = tmp_path / "io.json"
    now, old = pyref(f"{__name__}.Settings"), pyref("an.old.place.OldSettings")
    file.write_text(file.read_text().replace(json.dumps(now), json.dumps(old)))
    with pytest.raises(UnknownClass, match=r"an\.old\.place\.OldSettings"):
        io.load(tmp_path)
    assert not io.is_known("an.old.place.OldSettings")
    io.track_io(Settings, names=["an.old.place.OldSettings"])
    assert io.load(tmp_path).p == Settings(3)


class Mode(enum.Enum):
    SLOW, FAST = 1, 2


@dataclass
class Options:
    n: int = 1
    mode: Mode | None = None


class Loss:
    pass


class Whole(io.IOMixin):
    def __init__(self, options: "Options", loss=Loss, step=None):
        self.options = options
        self.loss = loss
        self.step = step


def test_another_process_knows_what_signatures_say(tmp_path, monkeypatch):
    Whole(Options(2, Mode.FAST), Loss).io_dump(tmp_path / "a")
    Whole(Options(2, Mode.FAST), Loss, add).io_dump(tmp_path / "b")
    monkeypatch.setattr(names, "_HELD", {})
    with pytest.raises(UnknownClass) as raised:
        io.load(tmp_path / "a")
    assert set(raised.value.unknown) == {
        f"{__name__}.{name}" for name in ("Whole", "Options", "Mode.FAST", "Loss")
    }
    names.register(Whole)  # as importing its module would
    loaded = io.load(tmp_path / "a")
    assert loaded.options == Options(2, Mode.FAST) and loaded.loss is Loss
    with pytest.raises(UnknownClass) as raised:
        io.load(tmp_path / "b")
    assert raised.value.unknown == (f"{__name__}.add",)
    assert io.make_known(add) is add
    assert io.load(tmp_path / "b").step is add


REAL = ("esm2_tp1", "esm2_tp2", "llama_tp1")


@pytest.mark.parametrize("name", REAL)
def test_a_real_context_names_its_classes_and_is_built_from_stand_ins(name, fixtures_dir):
    place = fixtures_dir / "nemo2" / name
    with pytest.raises(UnknownClass) as raised:
        io.load_context(place)
    unknown = raised.value.unknown
    assert any(n.endswith(("ESM2Config", "LlamaConfig")) for n in unknown)
    assert all(n in str(raised.value) for n in unknown)

    def stand_in(dotted):
        module, _, name = dotted.rpartition(".")

        class Stand:
            def __init__(self, **given):
                self.__dict__.update(given)

        Stand.__module__, Stand.__qualname__ = module, name
        return io.track_io(Stand)

    for dotted in unknown:
        if not any(dotted.startswith(f"{other}.") for other in unknown):
            stand_in(dotted)
    loaded = io.load_context(place)
    assert isinstance(loaded, io.TrainerContext)
    data = find([Folder.at(place)]).data
    assert loaded.model.config.hidden_size == data["hidden_size"]
    assert loaded.model.config.params_dtype is torch.float32
    assert (loaded.trainer.devices, loaded.trainer.accelerator) == (1, "cpu")
    config = io.load_context(place, subpath="model.config", build=False)
    assert config.num_layers == data["num_layers"]
    assert type(io.load_context(place, subpath="model.config")).__name__ == "Stand"
