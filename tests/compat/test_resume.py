"""Which checkpoint a run goes on with. The table is nemo-toolkit 2.2.1's but for marked rows."""

import dataclasses
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bioinit.compat import nemo
from bioinit.compat.nemo import io
from bioinit.compat.nemo.app_state import AppState
from bioinit.compat.nemo.restore import RestoreConfig
from bioinit.compat.nemo.resume import AdapterPath, AutoResume, NotFoundError
from bioinit.errors import BioinitError, CorruptCheckpoint, StorageError

NONE = "There were no checkpoints found"
ENDED = "Found .* indicating that the last training run has already completed"
MANY = "Multiple checkpoints .* that matches \\*end.ckpt"
UNFINISHED = "Last checkpoint is unfinished and cannot be used to resume"
UNFINISHED_END = "End checkpoint is unfinished and cannot be used to resume"
# What lies there, the oldest first; the weights that are found, with a run that has ended allowed
# or not; and whether ignoring that there is none makes it None.
TABLE = {
    "nothing": ([], NONE, NONE),
    "one last": (["a--last/weights/"], "a--last/weights", "a--last/weights"),
    "of one folder": (["a--last/"], "a--last", "a--last"),
    "two lasts": (["b--last/", "a--last/weights/"], "a--last/weights", "a--last/weights"),
    "an end": (["a--end/weights/"], ENDED, "a--end/weights"),  # there: None
    "two ends": (["a--end/", "b--end/"], ENDED, MANY),
    "an end, gone on with": (["a--end/weights/", "a--last/weights/"], ENDED, "a--last/weights"),
    "an end after a last": (["a--last/", "a--end/"], ENDED, "a--end"),  # there: None, both rows
    "unfinished": (["a--last/", "a--last-unfinished"], UNFINISHED, UNFINISHED),
    "one of two unfinished": (["a--last/", "b--last/", "b--last-unfinished"], "a--last", "a--last"),
    "unfinished end": (["a--end/", "a--end-unfinished", "b--last/"], *[UNFINISHED_END] * 2),
    "a link to an unfinished one": (
        ["a/", "a-unfinished", "b--last@a"],
        *[UNFINISHED] * 2,
    ),  # there: b--last
    "files": (["a--last.ckpt", "x-last"], NONE, NONE),
    "other names": (["step=1/weights/"], NONE, NONE),
}


@pytest.fixture(autouse=True)
def nobody_logs():
    state = AppState()
    state.log_dir, state.restore = None, False
    yield
    state.log_dir, state.restore = None, False


def lay(folder, entries):
    folder.mkdir(parents=True, exist_ok=True)
    for when, entry in enumerate(entries):
        path = folder / entry
        if entry.endswith("/"):
            path.mkdir(parents=True)
        elif "@" in entry:
            link, target = entry.split("@")
            (folder / link).symlink_to(target)
            continue
        else:
            path.write_text("")
        top = folder / entry.split("/")[0]
        os.utime(top, (1000 + when, 1000 + when))
    return folder


def trainer(**more):
    return SimpleNamespace(
        ckpt_path=None,
        checkpoint_callback=SimpleNamespace(last_model_path=None),
        strategy=SimpleNamespace(restore_config=None),
        **more,
    )


@pytest.mark.parametrize("word", ["resume_from_directory", "dirpath"])
@pytest.mark.parametrize("is_ignored", [False, True])
@pytest.mark.parametrize("past_end", [False, True])
@pytest.mark.parametrize("name", TABLE)
def test_the_table(tmp_path, name, past_end, is_ignored, word):
    entries, *expected = TABLE[name]
    lay(tmp_path / "c", entries)
    resume = AutoResume(
        resume_if_exists=True,
        resume_past_end=past_end,
        resume_ignore_no_checkpoint=is_ignored,
        **{word: str(tmp_path / "c")},
    )
    find = resume.nemo_path if word == "dirpath" else resume.get_trainer_ckpt_path
    result = expected[past_end]
    if result == NONE and is_ignored:
        assert find() is None
    elif result in (NONE, ENDED, MANY, UNFINISHED, UNFINISHED_END):
        error = NotFoundError if result == NONE else ValueError
        with pytest.raises(error, match=result) as caught:
            find()
        assert isinstance(caught.value, BioinitError)
    elif word == "dirpath":  # the first generation left it to others to look for weights
        assert find() == tmp_path / "c" / result.removesuffix("/weights")
    else:
        assert find() == tmp_path / "c" / result


def test_a_folder_that_is_above_the_checkpoints_is_said(tmp_path):
    lay(tmp_path, ["checkpoints/a--last/"])
    with pytest.raises(NotFoundError, match="did you mean its checkpoints/"):
        AutoResume(resume_if_exists=True, resume_from_directory=tmp_path).setup(trainer())


def test_weights_lie_in_a_folder_of_a_checkpoint():
    assert AutoResume().get_weights_path(Path("t/c")) == Path("t/c/weights")
    assert AutoResume().get_weights_path("t/c") == Path("t/c/weights")
    assert AutoResume.WEIGHTS_PATH == "weights"


def test_without_a_place_to_look_nothing_is_resumed_and_that_is_said(caplog):
    resume = AutoResume()
    assert resume.get_context_path() is None and resume.get_trainer_ckpt_path() is None
    assert not caplog.records
    resume.resume_if_exists = True
    assert resume.get_context_path() is None and resume.get_trainer_ckpt_path() is None
    assert "neither a folder of checkpoints nor a log_dir is known" in caplog.text


def test_the_log_dir_of_the_process_is_where_it_looks(tmp_path):
    lay(tmp_path / "checkpoints", ["m--last/"])
    AppState().log_dir = str(tmp_path)
    found = trainer()
    AutoResume(resume_if_exists=True).setup(found)
    assert found.ckpt_path == tmp_path / "checkpoints/m--last" and AppState().restore
    assert found.checkpoint_callback.last_model_path == found.ckpt_path
    elsewhere = lay(tmp_path / "others", ["n--last/"])
    AutoResume(resume_if_exists=True, resume_from_directory=elsewhere).setup(found)
    assert found.ckpt_path == elsewhere / "n--last"


def test_the_context_is_found_beside_the_weights(tmp_path):
    lay(tmp_path, ["s-last/weights/", "s-last/context/"])
    resume = AutoResume(resume_if_exists=True, resume_from_directory=str(tmp_path))
    assert resume.get_context_path() == tmp_path / "s-last/context"
    assert AutoResume(resume_from_path=str(tmp_path / "s-last")).get_context_path() == (
        tmp_path / "s-last/context"
    )


def test_a_checkpoint_that_is_named_is_taken_before_any_other(tmp_path):
    lay(tmp_path, ["a--last/weights/", "named/weights/", "flat/"])
    resume = AutoResume(resume_if_exists=True, resume_from_directory=str(tmp_path))
    resume.resume_from_path = str(tmp_path / "named")
    assert resume.get_trainer_ckpt_path() == tmp_path / "named/weights"
    resume.resume_from_path = str(tmp_path / "flat")
    assert resume.get_trainer_ckpt_path() == str(tmp_path / "flat"), "as it was given"


def test_a_checkpoint_that_is_not_there_is_an_error_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="it is not there") as caught:
        AutoResume(resume_from_path=str(tmp_path / "no")).setup(trainer())
    assert isinstance(caught.value, StorageError)
    with pytest.raises(NotFoundError, match="it is not there"):
        AutoResume(path=str(tmp_path / "no")).nemo_path()


def test_a_named_checkpoint_that_was_never_finished_is_refused(tmp_path):
    lay(tmp_path, ["a/weights/", "a-unfinished", "link@a"])
    for named in ("a", "a/weights", "link", "a/weights/.."):
        with pytest.raises(ValueError, match="never finished"):
            AutoResume(resume_from_path=str(tmp_path / named)).get_trainer_ckpt_path()
    start = RestoreConfig(path=str(tmp_path / "a"), load_artifacts=False)
    with pytest.raises(ValueError, match="never finished"):
        AutoResume(restore_config=start).setup(trainer())


def test_an_adapter_says_on_which_model_it_was_trained(tmp_path):
    lay(tmp_path, ["base/weights/", "a--last/weights/"])
    notes = tmp_path / "a--last/weights/adapter_metadata.json"
    notes.write_text(json.dumps({"model_ckpt_path": str(tmp_path / "base/weights")}))
    found = AutoResume(
        resume_if_exists=True, resume_from_directory=tmp_path
    ).get_trainer_ckpt_path()
    assert isinstance(found, AdapterPath) and found == tmp_path / "a--last/weights"
    assert found.base_model_path == tmp_path / "base/weights"
    named = AutoResume(resume_from_path=str(tmp_path / "a--last")).get_trainer_ckpt_path()
    assert named == tmp_path / "a--last" and named.base_model_path == found.base_model_path


def test_the_model_of_an_adapter_may_have_moved(tmp_path, caplog):
    lay(tmp_path, ["base/", "a--last/weights/"])
    notes = tmp_path / "a--last/weights/adapter_metadata.json"
    notes.write_text(json.dumps({"model_ckpt_path": "/gone/base"}))
    resume = AutoResume(
        resume_from_path=str(tmp_path / "a--last"),
        restore_config=RestoreConfig(path=str(tmp_path / "base")),
    )
    assert resume.get_trainer_ckpt_path().base_model_path == tmp_path / "base"
    assert "trained on /gone/base" in caplog.text
    resume.restore_config = None
    assert resume.get_trainer_ckpt_path().base_model_path == Path("/gone/base")
    for said in ("{}", '{"model_ckpt_path": ""}', '{"model_ckpt_path": "a\\u0000"}', "[" * 99999):
        notes.write_text(said)
        with pytest.raises(CorruptCheckpoint, match="does not say on which model"):
            resume.get_trainer_ckpt_path()


def test_an_adapter_path_of_ones_own_goes_with_what_is_found(tmp_path):
    lay(tmp_path, ["a--last/weights/"])
    second = AutoResume(
        resume_if_exists=True, resume_from_directory=tmp_path, adapter_path="ad"
    ).get_trainer_ckpt_path()
    assert (second, second.base_model_path) == (Path("ad"), tmp_path / "a--last/weights")
    lay(tmp_path, ["flat/"])
    for named, base in (("a--last", "a--last/weights"), ("flat", "flat")):  # there: forgotten
        third = AutoResume(resume_from_path=tmp_path / named, adapter_path="ad")
        found = third.get_trainer_ckpt_path()
        assert (found, found.base_model_path) == (Path("ad"), tmp_path / base)
    first = AutoResume(resume_if_exists=True, dirpath=tmp_path, adapter_path="ad").nemo_path()
    assert (first, first.adapter_path) == (tmp_path / "a--last", Path("ad"))


class Imports:
    """A model that has an importer, as far as resuming asks."""

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def import_ckpt(self, path):
        self.asked.append(path)
        return self.folder


def test_the_first_generation_imports_and_looks_at_nothing_else(tmp_path, caplog):
    model, found = Imports(tmp_path / "m"), trainer()
    AutoResume(import_path="hf://org/m", resume_if_exists=True).setup(found, model)
    assert found.ckpt_path == tmp_path / "m" and model.asked == ["hf://org/m"]
    assert "nothing else is looked at" in caplog.text
    with_adapter = AutoResume(import_path="hf://org/m", adapter_path="/ad").nemo_path(model)
    assert with_adapter == tmp_path / "m" and with_adapter.adapter_path == Path("/ad")


def test_the_trainer_is_told_by_what_it_is_and_not_by_where_it_stands(tmp_path):
    class Imported(torch.nn.Module):
        def import_ckpt(self, path):
            return tmp_path

    for model in (Imports(tmp_path), Imported()):
        for order in (1, -1):  # (model, trainer) in the first generation, June 2024
            found = trainer()
            AutoResume(import_path="hf://org/m").setup(*(model, found)[::order])
            assert found.ckpt_path == tmp_path
            assert not hasattr(model, "ckpt_path")
    with pytest.raises(TypeError, match="where a trainer was expected"):
        AutoResume(path=str(tmp_path)).setup(Imported())


def test_the_first_generation_starts_from_a_path_where_nothing_was_found(tmp_path, caplog):
    lay(tmp_path, ["given/"])
    caplog.set_level(logging.INFO)
    resume = AutoResume(str(tmp_path / "given"), str(tmp_path / "none"), resume_if_exists=True)
    with pytest.raises(NotFoundError, match="which is no folder"):
        resume.nemo_path()
    resume.resume_ignore_no_checkpoint = True
    assert resume.nemo_path() == tmp_path / "given"
    assert f"Starting from {tmp_path / 'given'}" in caplog.text
    lay(tmp_path / "none", ["x--last/"])
    assert resume.nemo_path() == tmp_path / "none/x--last", "what this run wrote wins"


def test_words_that_mean_the_same_are_not_mixed():
    with pytest.raises(ValueError, match="Only one of path or import_path can be set"):
        AutoResume(path="a", import_path="hf://b")
    with pytest.raises(ValueError, match="path is now resume_from_path"):
        AutoResume(path="a", resume_from_directory="b")
    late = AutoResume(dirpath="a")
    late.resume_from_path = "b"
    with pytest.raises(ValueError, match="dirpath"):
        late.setup(trainer())


def test_the_second_generation_imports_through_the_model(tmp_path):
    (tmp_path / "m").mkdir()
    model, found = Imports(tmp_path / "m"), trainer()
    given = RestoreConfig(path="hf://org/m", adapter_path="ad", load_artifacts=False)
    AutoResume(restore_config=given).setup(found, model)
    assert found.strategy.restore_config == dataclasses.replace(given, path=str(tmp_path / "m"))
    assert given.path == "hf://org/m", "what was passed in is not changed"
    assert found.ckpt_path is None


@pytest.mark.parametrize("model", [None, object()])
def test_a_source_that_nobody_converts_is_an_error_of_every_generation(model):
    for told in ({"import_path": "hf://o/m"}, {"restore_config": RestoreConfig(path="hf://o/m")}):
        for error in (ValueError, AssertionError):
            with pytest.raises(error, match="Only NeMo based paths starting with nemo://"):
                AutoResume(**told).setup(trainer(), model)
    with pytest.raises(ValueError, match="Model is needed to import checkpoint from HF"):
        AutoResume(import_path="hf://o/m").nemo_path()


def test_the_third_generation_finds_models_in_the_cache(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("NEMO_MODELS_CACHE", str(tmp_path))
    (tmp_path / "org/m").mkdir(parents=True)
    found = trainer()
    AutoResume(restore_config=RestoreConfig(path="nemo://org/m")).setup(found, object())
    assert found.strategy.restore_config.path == str(tmp_path / "org/m")
    assert "is not restored" in caplog.text
    with pytest.raises(FileNotFoundError, match="is not there"):
        AutoResume(restore_config=RestoreConfig(path="nemo://org/other")).setup(trainer())


def test_what_this_run_wrote_goes_before_what_it_started_from(tmp_path):
    lay(tmp_path / "c", [])
    start = RestoreConfig(path=str(tmp_path), load_artifacts=False)
    resume = AutoResume(
        restore_config=start, resume_if_exists=True, resume_from_directory=tmp_path / "c"
    )
    found = trainer()
    resume.setup(found)
    assert found.strategy.restore_config.path == str(tmp_path)
    lay(tmp_path / "c", ["x--last/"])
    found = trainer()
    resume.setup(found)
    assert found.ckpt_path == tmp_path / "c/x--last" and found.strategy.restore_config is None


class Tokenizer(io.IOMixin):
    def __init__(self, vocabulary="v"):
        self.vocabulary = vocabulary


class Model(io.IOMixin):
    def __init__(self, tokenizer=None):
        self.tokenizer = tokenizer


class Strategy(io.IOMixin):
    def __init__(self):
        pass


@pytest.mark.parametrize("where", ["started from", "resumed"])
def test_the_tokenizer_that_was_saved_along_becomes_the_models(tmp_path, where):
    home = lay(tmp_path, ["s--last/weights/"]) / "s--last"
    io.TrainerContext(Model(Tokenizer("w")), Strategy()).io_dump(home / "context", ["model"])
    model = Model()
    AutoResume(
        restore_config=RestoreConfig(path=str(home)),
        resume_from_path=str(home) if where == "resumed" else None,
    ).setup(trainer(), model)
    assert model.tokenizer.vocabulary == "w" and model.__io__.tokenizer.vocabulary == "w"
    untouched = Model()
    start = RestoreConfig(path=str(home), load_artifacts=False)
    AutoResume(restore_config=start).setup(trainer(), untouched)
    assert untouched.tokenizer is None


def test_a_subclass_may_look_elsewhere(tmp_path):
    class Elsewhere(AutoResume):
        def _find_trainer_ckpt_path(self):
            return tmp_path

    assert Elsewhere(resume_if_exists=True).get_trainer_ckpt_path() == tmp_path
    assert Elsewhere().get_trainer_ckpt_path() is None


def test_a_trainer_without_a_checkpoint_callback_is_told_the_rest(tmp_path):
    lay(tmp_path, ["a--last/"])
    bare = SimpleNamespace(checkpoint_callback=None)
    AutoResume(resume_if_exists=True, resume_from_directory=tmp_path).setup(bare)
    assert bare.ckpt_path == tmp_path / "a--last"


def test_a_fabric_is_refused():
    fabric = type("Fabric", (), {"__module__": "lightning.fabric.fabric"})()
    with pytest.raises(NotImplementedError, match="Fabric is not supported yet"):
        AutoResume().setup(fabric)


def test_folders_of_single_ranks_stand_for_the_checkpoint_above_them(tmp_path):
    lay(tmp_path / "mp_rank_00", ["a--last/", "b--last/"])
    resume = AutoResume(resume_if_exists=True, resume_from_directory=tmp_path / "mp_rank_00")
    assert resume.get_trainer_ckpt_path() == tmp_path / "a--last"


def test_a_restore_config_is_said_by_name():
    assert RestoreConfig(path="p") == RestoreConfig(
        path="p", adapter_path=None, load_model_state=True, load_optim_state=False,
        load_artifacts=True,
    )  # fmt: skip
    with pytest.raises(TypeError):
        RestoreConfig("p")
    assert nemo.AutoResume is AutoResume and nemo.RestoreConfig is RestoreConfig


def test_the_log_dir_that_nemo_itself_was_told_is_heard(monkeypatch, tmp_path):
    lay(tmp_path / "checkpoints", ["m--last/"])
    theirs = SimpleNamespace(AppState=lambda: SimpleNamespace(log_dir=str(tmp_path)))
    monkeypatch.setitem(__import__("sys").modules, "nemo.utils.app_state", theirs)
    found = AutoResume(resume_if_exists=True).get_trainer_ckpt_path()
    assert found == tmp_path / "checkpoints/m--last"
