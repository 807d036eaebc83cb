"""Connectors: found for a class, run once, whole or not at all.

The values of the tables are those of nemo-toolkit 2.2.1, on Python 3.11.
"""

import copy
import dataclasses
import functools
import importlib
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from bioinit.compat.nemo import io
from bioinit.compat.nemo.io import _kept
from bioinit.compat.nemo.io._rules import rules_of
from bioinit.compat.nemo.io.connector import Connector, ConnectorMixin, ModelConnector
from bioinit.errors import BioinitError


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.setenv("NEMO_HOME", str(tmp_path / "nemo"))
    monkeypatch.setenv("BIOINIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("NEMO_MODELS_CACHE", raising=False)


class Model(io.IOMixin, ConnectorMixin):
    def __init__(self, width=2):
        self.width = width


class Child(Model):
    pass


@io.model_importer(Model, "hf")
class Importer(io.ModelConnector["Source", Model]):
    times = 0

    def init(self):
        return Model(3)

    @property
    def tokenizer(self):
        return f"tokenizer of {self}"

    def apply(self, output_path, **kwargs):
        type(self).times += 1
        assert not output_path.exists()
        output_path.mkdir(parents=True)
        source = Path(str(self))
        text = (source / "w").read_text() if source.exists() else str(self)
        (output_path / "w").write_text(text + "".join(sorted(kwargs)))
        return output_path


@pytest.fixture(autouse=True)
def nothing_made():
    Importer.times = 0


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source" / "my-model"
    folder.mkdir(parents=True)
    (folder / "w").write_text("one")
    return folder


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("mistralai/Mistral-7B", "mistralai/Mistral-7B"),
        ("HF//x", "HF/x"),
        ("/data/my-model", "my-model"),
        ("/data/my-model/", "my-model"),
        ("/data/dir/model.pth", "dir"),
        ("/data/dir/model.pt", "dir"),
        ("/data/dir/model.bin", "model.bin"),
        ("a", "a"),
        ("./a/b", "a/b"),
        ("dir/model.pth", "dir/model.pth"),
        ("../secret", "secret"),  # there: models/../secret
    ],
)
def test_where_what_is_imported_is_kept(tmp_path, given, kept):
    assert ModelConnector(given).local_path() == tmp_path / "nemo/models" / kept
    assert ModelConnector(given).local_path(base_path="/b") == Path("/b") / kept


@pytest.mark.parametrize("given", ["/", ".", "..", "a/.."])
def test_a_source_without_a_name_has_no_place(given):
    with pytest.raises(ValueError, match="ends in no name"):  # there: the whole cache
        ModelConnector(given)(overwrite=True)


def test_a_plain_connector_keeps_below_the_home_and_never_in_its_source(tmp_path):
    assert Connector("a/b").local_path() == tmp_path / "nemo/a/b"
    assert Connector("/a/b").local_path() == tmp_path / "nemo/b"  # there: /a/b


def test_a_connector_is_a_path_whose_text_is_the_source():
    connector = Importer("/data/model.pt")
    assert isinstance(connector, pathlib.PosixPath) and str(connector) == "/data/model.pt"
    assert (connector.name, connector.suffix, connector.parent.name) == ("model.pt", ".pt", "data")
    for unwritten in (Connector("a").init, lambda: Connector("a").apply(Path("b"))):
        with pytest.raises(NotImplementedError, match="write it"):
            unwritten()


def test_a_connector_may_take_more_than_its_path():
    class Configured(io.ModelConnector):
        def __new__(cls, path, settings=None):
            made = super().__new__(cls, path)
            made.settings = settings
            return made

    assert Configured("a/b", {"x": 1}).settings == {"x": 1}
    io.model_importer(Model, "configured")(Configured)
    found = Model._get_connector("configured://a/b", settings=5)
    assert (str(found), found.settings, str(found / "c")) == ("a/b", 5, "a/b/c")


def test_an_importer_is_found_by_its_word():
    found = Model.importer("hf://org/name")
    assert type(found) is Importer and str(found) == "org/name"
    assert str(Model.importer("hf:///a/model")) == "/a/model"


def test_a_source_may_be_an_address(tmp_path):
    found = Model.importer("hf://s3://bucket/m")  # there: ValueError
    assert str(found) == os.fspath(found) == "s3://bucket/m"
    assert found.local_path() == tmp_path / "nemo/models/s3/bucket/m"
    assert found.name == "m"


def test_an_exporter_is_found_beside_it():
    @io.model_exporter(Model, "hf")
    class Exporter(io.ModelConnector):
        pass

    found = Model.exporter("hf", "/a/ckpt")
    assert type(found) is Exporter and str(found) == "/a/ckpt"
    assert type(Model.importer("hf://x")) is Importer


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: Model.importer("gguf://x"), "No connector found for extension 'gguf' for <class"),
        (lambda: Model.importer("/a/path"), "No connector found for extension '/a/path'"),
        (lambda: Model.exporter("gguf", "x"), "No connector found for extension 'gguf'"),
        (lambda: Model.importer("hf://"), "No default path specified for extension 'hf'"),
        (lambda: Model.importer("hf"), "No default path specified"),  # there: a source "None"
        (lambda: io.import_ckpt(object(), "hf://x"), "Model must be an instance of ConnectorMixin"),
    ],
)
def test_what_cannot_be_found_is_a_value_error_that_says_so(ask, said):
    with pytest.raises(ValueError, match=said) as caught:
        ask()
    assert isinstance(caught.value, BioinitError)


def test_what_is_written_well_is_not_told_how_to_write_it():
    said = []
    for path in ("gguf://x", "/a/path"):
        with pytest.raises(ValueError) as caught:
            Model.importer(path)
        said.append("Write the source like" in str(caught.value))
    assert said == [False, True]


def test_a_default_path_is_what_a_bare_word_means():
    class Other(io.IOMixin, ConnectorMixin):
        pass

    @io.model_importer(Other, "hf", default_path="org/default")
    class OtherImporter(Importer):
        def init(self):
            return Other()

    for word in ("hf", "hf://"):
        assert str(Other.importer(word)) == "org/default"
    assert str(OtherImporter()) == "org/default"
    assert (Other.import_from("hf").ckpt_path / "w").read_text() == "org/default"


def test_a_subclass_finds_its_parents_connector_but_is_not_made_by_it(source):
    assert type(Child.importer("hf://x")) is Importer  # there: ValueError
    assert Child().import_ckpt(f"hf://{source}").name == "my-model"
    with pytest.raises(ValueError, match="makes a Model, and Child was asked for"):
        Child.import_from(f"hf://{source}")

    @io.model_importer(Child, "hf")
    class ChildImporter(Importer):
        def init(self):
            return Child(4)

    assert type(Child.importer("hf://x")) is ChildImporter
    assert type(Model.importer("hf://x")) is Importer
    assert Child.import_from(f"hf://{source}").width == 4
    del Child._IMPORTERS[Child, "hf"]


def test_only_classes_that_take_part_have_connectors():
    with pytest.raises(TypeError, match="derived from ConnectorMixin"):
        io.model_importer(dict, "hf")


def test_an_import_converts_once_and_gives_the_tokenizer(tmp_path, source):
    model = Model.import_from(f"hf://{source}")
    assert (model.width, model.ckpt_path) == (3, tmp_path / "nemo/models/my-model")
    assert (model.ckpt_path / "w").read_text() == "one"
    assert model.tokenizer == f"tokenizer of {source}"
    other = Model()
    assert io.import_ckpt(other, f"hf://{source}") == model.ckpt_path
    assert Importer.times == 1 and other.tokenizer == model.tokenizer
    assert Importer(str(source)).is_in_cache() and not Importer("org/other").is_in_cache()


def test_a_place_and_arguments_can_be_chosen(tmp_path, source):
    place = io.import_ckpt(Model(), f"hf://{source}", output_path=tmp_path / "out", fast=True)
    assert place == tmp_path / "out" and (place / "w").read_text() == "onefast"
    based = Model().import_ckpt(f"hf://{source}", base_path=tmp_path / "base")
    assert based == tmp_path / "base/my-model"


def test_an_import_again_is_an_import_again(source):
    path = Model().import_ckpt(f"hf://{source}")
    assert Model().import_ckpt(f"hf://{source}", overwrite=True) == path and Importer.times == 2
    assert Model().import_ckpt(f"hf://{source}") == path and Importer.times == 2


def test_a_lock_that_somebody_left_changes_nothing(tmp_path, source):
    path = Model().import_ckpt(f"hf://{source}")
    for left in ("my-model.lock", ".my-model.lock", ".my-model.turn"):
        (path.parent / left).write_text("")
    Model().import_ckpt(f"hf://{source}", overwrite=True)
    assert Importer.times == 2  # there: 1


def test_a_source_that_changed_is_converted_again(tmp_path, source):
    path = Model().import_ckpt(f"hf://{source}")
    place = io.import_ckpt(Model(), f"hf://{source}", output_path=tmp_path / "mine")
    (source / "w").write_text("two")
    assert (Model().import_ckpt(f"hf://{source}") / "w").read_text() == "two"
    with pytest.raises(FileExistsError, match="content changed"):
        io.import_ckpt(Model(), f"hf://{source}", output_path=place)
    assert (place / "w").read_text() == "one"
    io.import_ckpt(Model(), f"hf://{source}", output_path=place, overwrite=True)
    assert (place / "w").read_text() == "two" and path.exists()


THEIRS = """
from bioinit.compat.nemo import io
from .table import TABLE, unused

times = 0

def helper(x):
    return x

@io.state_transform(source_key="a", target_key="b")
def transform(x):
    return helper(x)

def nobody(x):
    return 1

class Theirs(io.ModelConnector):
    def apply(self, output_path):
        global times
        times += 1
        output_path.mkdir()
        (output_path / "w").write_text(str(times))
        self.used = TABLE, transform
"""


@pytest.mark.parametrize(
    ("old", "new", "is_again"),
    [
        ("write_text(str(", "write_text(repr(", True),
        ("return helper(x)", "return helper(x + 1)", True),  # beside the class, as NeMo does it
        ("def helper(x):\n    return x", "def helper(x):\n    return 2 * x", True),
        ('source_key="a"', 'source_key="c"', True),
        ("TABLE = 1", "TABLE = 2", True),  # in a module that was imported
        ("return 1", "return 2", False),
        ("unused = 1", "unused = 2", False),
        ("times = 0", "times = 0  # counted", True),
    ],
)
def test_a_connector_converts_again_when_something_that_it_uses_has_changed(
    tmp_path, monkeypatch, source, old, new, is_again
):
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("")

    def times(change=lambda text: text):
        for name in ("theirs", "theirs.main", "theirs.table"):
            sys.modules.pop(name, None)
        shutil.rmtree(package / "__pycache__", ignore_errors=True)
        (package / "table.py").write_text(change("TABLE = 1\nunused = 1\n"))
        (package / "main.py").write_text(change(THEIRS))
        importlib.invalidate_caches()
        module = importlib.import_module("theirs.main")
        for _ in range(2):
            module.Theirs(str(source))()
        return module.times

    assert times() == 1, "what counts there is no other connector"
    assert times(lambda text: text.replace(old, new)) == is_again


@pytest.mark.parametrize(
    ("old", "new", "is_again"),
    [
        ("helper(x)\n\ndef", "helper(x) + 1\n\ndef", True),
        ("return x", "return -x", True),
        ('"a": 1', '"a": 2', True),
        ("return 1", "return 2", False),
    ],
)
def test_a_connector_that_was_typed_in_is_known_too(source, old, new, is_again):
    typed = THEIRS.replace("from .table import TABLE, unused", 'TABLE = {"a": 1}')
    for text in (typed, typed.replace(old, new)):
        shared = {"__name__": "no_module"}
        exec(compile(text, "<typed>", "exec"), shared)
        for _ in range(2):
            shared["Theirs"](str(source))()
    assert shared["times"] == is_again


class Said:
    def __init__(self, value):
        self.value = value


@dataclasses.dataclass(slots=True)
class Slotted:
    value: torch.Tensor


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.float16, torch.bfloat16),
        ([1, {"a": 2}], [1, {"a": 3}]),
        ((1,), [1]),
        (1, True),
        (torch.zeros(2), torch.ones(2)),
        (Said([1]), Said([2])),
        (deque([torch.tensor(1.00001)]), deque([torch.tensor(1.00002)])),
        (Slotted(torch.zeros(1)), Slotted(torch.ones(1))),
        (np.arange(5000), np.arange(5000)[::-1]),
        (functools.partial(max, 1), functools.partial(max, 2)),
        ({"a", "b"}, {"a", "c"}),
        (lambda x: x, lambda x: x + 1),
        (object(), object()),  # nobody can know
    ],
)
def test_other_arguments_are_another_result(one, other):
    def said(value):
        return rules_of(Connector("a"), {"said": value})["arguments"]

    assert said(one) != said(other)
    if type(one) is not object:
        assert said(one) == said(copy.deepcopy(one))


def test_arguments_of_apply_and_of_the_constructor_count(tmp_path, source):
    class Scaled(Importer):
        def __new__(cls, path, scale=None):
            return super().__new__(cls, path)

        def __init__(self, path, scale=None):
            self.scale = scale

    place = tmp_path / "out"
    for _ in range(2):
        Importer(str(source))(place, said=[torch.float16])
        Scaled(str(source), [1])()
    assert (Importer.times, Scaled.times) == (1, 2)
    with pytest.raises(FileExistsError, match="arguments changed"):  # there: the old one
        Importer(str(source))(place, said=[torch.bfloat16])
    Scaled(str(source), [2])()
    assert Scaled.times == 3


def test_what_somebody_else_left_at_the_place_is_taken_as_it_is(tmp_path, source):
    place = tmp_path / "nemo/models/my-model"
    place.mkdir(parents=True)
    assert Model().import_ckpt(f"hf://{source}") == place and Importer.times == 1, "it was empty"
    other = tmp_path / "nemo/models/org/theirs"
    (other / "weights").mkdir(parents=True)
    assert Model().import_ckpt("hf://org/theirs") == other and Importer.times == 1
    (other.parent / "theirs-unfinished").touch()
    assert not Importer("org/theirs").is_in_cache()
    with pytest.raises(ValueError, match="was never finished"):
        Model().import_ckpt("hf://org/theirs")
    Model().import_ckpt("hf://org/theirs", overwrite=True)
    assert Importer("org/theirs").is_in_cache() and Importer.times == 2


class Failing(Importer):
    def apply(self, output_path):
        super().apply(output_path)
        raise self.error


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), OSError("org/x is no model on the hub"), KeyboardInterrupt()]
)
def test_an_import_that_fails_leaves_nothing_and_says_its_own_error(tmp_path, error):
    connector = Failing("org/x")
    connector.error = error
    with pytest.raises(type(error)) as caught:
        connector()
    assert caught.value is error
    assert not connector.local_path().exists() and not connector.is_in_cache()
    assert not list(connector.local_path().parent.iterdir())
    Importer("org/x")()
    assert connector.is_in_cache()


def test_a_failed_import_again_leaves_the_old_one(source):
    path = Model().import_ckpt(f"hf://{source}")
    failing = Failing(str(source))
    failing.error = RuntimeError("no")
    with pytest.raises(RuntimeError):
        failing(path, overwrite=True)
    assert (path / "w").read_text() == "one"
    (source / "w").write_text("two")
    assert (Model().import_ckpt(f"hf://{source}") / "w").read_text() == "two", "it has its note"


def test_what_apply_sets_of_itself_is_no_argument(tmp_path, source):
    class Exporter(Importer):
        pad = None

        def apply(self, output_path):
            self.pad = 3  # as NeMo's exporter of T5 does
            return super().apply(output_path)

    exporter = Exporter(str(source))
    exporter.scale = 1
    assert exporter(tmp_path / "out") == exporter(tmp_path / "out") and Exporter.times == 1
    exporter.scale = 2
    with pytest.raises(FileExistsError, match="arguments changed"):
        exporter(tmp_path / "out")


def test_two_sources_of_one_name_are_kept_beside_each_other(tmp_path, source):
    other, moved = tmp_path / "b/my-model", tmp_path / "c/my-model"
    for folder, text in ((other, "other"), (moved, "one")):
        folder.mkdir(parents=True)
        (folder / "w").write_text(text)
    assert not Importer(str(other)).is_in_cache()
    paths = [Model().import_ckpt(f"hf://{folder}") for folder in (source, other, moved, other)]
    assert paths[0] == paths[2] != paths[1] == paths[3] and Importer.times == 2
    assert [(path / "w").read_text() for path in paths[:2]] == ["one", "other"]
    assert all(Importer(str(folder)).is_in_cache() for folder in (source, other, moved))


def test_a_link_to_a_folder_belongs_to_the_source(tmp_path, source):
    aside = tmp_path / "aside"
    aside.mkdir()
    (source / "link").symlink_to(aside)
    (aside / "back").symlink_to(source)
    Model().import_ckpt(f"hf://{source}")
    (aside / "table").write_text("1")
    for _ in range(2):
        Model().import_ckpt(f"hf://{source}")
    assert Importer.times == 2


def test_a_source_that_changes_meanwhile_is_not_kept(source):
    class Slow(Importer):
        def apply(self, output_path):
            result = super().apply(output_path)
            (source / "w").write_text("changed")
            return result

    with pytest.raises(BioinitError, match="changed while it was being read"):
        Slow(str(source))()
    assert not Slow(str(source)).is_in_cache()


def test_a_connector_that_makes_nothing_is_an_error(tmp_path):
    class Idle(io.ModelConnector):
        def apply(self, output_path):
            return output_path

    with pytest.raises(RuntimeError, match="made nothing"):
        Idle("org/x")()


def test_what_is_returned_is_where_it_lies(tmp_path):
    class Deep(io.ModelConnector):
        def apply(self, output_path):
            (output_path / "inner").mkdir(parents=True)
            return output_path / "inner"

    class File(io.ModelConnector):
        def apply(self, output_path):
            output_path.write_text("all")

    class Elsewhere(io.ModelConnector):
        def apply(self, output_path):
            return tmp_path

    assert Deep("a")() == tmp_path / "nemo/models/a/inner"
    assert File("b")().read_text() == "all" and File("b")() == tmp_path / "nemo/models/b"
    assert Elsewhere("c")() == tmp_path
    assert sorted(p.name for p in (tmp_path / "nemo/models").iterdir()) == ["a", "b"]


def test_of_several_threads_one_converts(source):
    places = []
    slow = type("Slow", (Importer,), {"apply": slowly})
    threads = [
        threading.Thread(target=lambda: places.append(slow(str(source))())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(places) == 4 and len(set(places)) == 1 and Importer.times + slow.times == 1


def slowly(self, output_path):
    time.sleep(0.1)
    return Importer.apply(self, output_path)


def test_a_wait_has_an_end(source):
    has_begun, may_end = threading.Event(), threading.Event()

    class Slow(Importer):
        def apply(self, output_path):
            has_begun.set()
            may_end.wait(60)
            return super().apply(output_path)

    thread = threading.Thread(target=Slow(str(source)))
    thread.start()
    has_begun.wait(60)
    hasty = Slow(str(source))
    hasty.LOCK_TIMEOUT = 0.01
    with pytest.raises(TimeoutError, match="another process is at it"):
        hasty()
    may_end.set()
    thread.join()
    assert hasty.is_in_cache()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_killed_import_leaves_nothing_that_looks_finished(tmp_path, source):
    read, write = os.pipe()
    child = os.fork()
    if not child:

        class Endless(Importer):
            def apply(self, output_path):
                super().apply(output_path)
                os.write(write, b"x")
                time.sleep(60)

        Endless(str(source))()
        os._exit(0)
    os.read(read, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not Importer(str(source)).is_in_cache()
    assert Importer(str(source))() == tmp_path / "nemo/models/my-model"
    left = [p.name for p in (tmp_path / "nemo/models").iterdir()]
    assert left == ["my-model"]


def test_a_new_commit_on_the_hub_is_converted_again(tmp_path, monkeypatch):
    def lies(commit):
        monkeypatch.setattr(_kept, "in_cache", lambda name, **how: commit and tmp_path / commit)

    class Fetching(Importer):
        def apply(self, output_path):
            lies("two")
            return super().apply(output_path)

    lies(None)
    Importer("org/name")()
    lies("one")
    Importer("org/name")()
    assert Importer.times == 1, "of what was made before it was known, nobody can say"
    Importer("org/name")(overwrite=True)
    lies(None)
    Fetching("org/other")()
    Fetching("org/other")()
    lies("three")
    Importer("org/name")()
    Fetching("org/other")()
    assert (Importer.times, Fetching.times) == (3, 2 + 2)
