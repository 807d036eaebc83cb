"""Names of checkpoints and their folders. The values in the tables are nemo-toolkit 2.2.1's."""

import copy
import pickle
from pathlib import Path

import pytest

from bioinit.compat import nemo
from bioinit.compat.nemo import caches
from bioinit.compat.nemo.ckpt_utils import (
    ADAPTER_META_FILENAME,
    CONTEXT_PATH,
    WEIGHTS_PATH,
    ckpt_to_context_subdir,
    ckpt_to_dir,
    ckpt_to_weights_subdir,
    idempotent_path_append,
    is_distributed_ckpt,
    preprocess_common_state_dict_before_consistency_check,
)
from bioinit.compat.nemo.resume import AdapterPath
from bioinit.errors import ConfigError

TABLE = [  # given, ckpt_to_dir, ckpt_to_context_subdir, idempotent_path_append(..., "weights")
    ("a/b", "a/b", "a/b/context", "a/b/weights"),
    ("a/b.ckpt", "a/b", "a/b/context", "a/b.ckpt/weights"),
    ("a/b.c", "a/b.c", "a/b.c/context", "a/b.c/weights"),
    ("a/b.c.ckpt", "a/b.c", "a/b.c/context", "a/b.c.ckpt/weights"),
    (".ckpt", ".ckpt", ".ckpt/context", ".ckpt/weights"),
    ("a/.ckpt", "a/.ckpt", "a/.ckpt/context", "a/.ckpt/weights"),
    ("a/b.ckpt/", "a/b", "a/b/context", "a/b.ckpt/weights"),
    ("/x/l=0.5-last", "/x/l=0.5-last", "/x/l=0.5-last/context", "/x/l=0.5-last/weights"),
    ("a.ckpt.ckpt", "a.ckpt", "a.ckpt/context", "a.ckpt.ckpt/weights"),
    ("x/weights", "x/weights", "x/weights/context", "x/weights"),
    ("x/context", "x/context", "x/context", "x/context/weights"),
    ("a b/c.CKPT", "a b/c.CKPT", "a b/c.CKPT/context", "a b/c.CKPT/weights"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "folder", "context", "weights"), TABLE)
@pytest.mark.parametrize("kind", [str, Path])
def test_names_lead_where_the_reference_leads(kind, given, folder, context, weights):
    assert ckpt_to_dir(kind(given)) == Path(folder)
    assert ckpt_to_context_subdir(kind(given)) == Path(context)
    assert idempotent_path_append(kind(given), "weights") == Path(weights)


@pytest.mark.parametrize("given", ["", ".", "/"])
def test_a_path_without_a_name_is_an_error_there_and_here(given):
    with pytest.raises(ValueError, match="ends in no name") as caught:
        ckpt_to_dir(given)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("given", [Path("test/path"), "test/path", "msc://default/tmp/test/path"])
def test_names_are_joined_without_looking_wherever_they_lead(given):
    assert str(idempotent_path_append(given, "new")).endswith("test/path/new")
    assert str(ckpt_to_dir(given)).endswith("test/path")
    assert str(ckpt_to_context_subdir(given)).endswith("test/path/context")
    assert str(ckpt_to_weights_subdir(given, is_saving=True)).endswith("test/path/weights")


def test_an_address_stays_an_address():
    assert str(ckpt_to_dir("msc://default/tmp/x.ckpt")) == "msc://default/tmp/x"


def test_what_must_be_looked_at_needs_the_library_of_the_address():
    with pytest.raises(ValueError, match="Multi-Storage Client is not installed"):
        ckpt_to_weights_subdir("msc://default/tmp/x", is_saving=False)


def test_weights_are_found_in_new_checkpoints_and_in_old_ones(tmp_path):
    (tmp_path / "new" / "weights").mkdir(parents=True)
    (tmp_path / "old").mkdir()
    assert ckpt_to_weights_subdir(tmp_path / "new", is_saving=False) == tmp_path / "new/weights"
    assert ckpt_to_weights_subdir(tmp_path / "old", is_saving=False) == tmp_path / "old"
    assert ckpt_to_weights_subdir(tmp_path / "old", is_saving=True) == tmp_path / "old/weights"
    assert ckpt_to_weights_subdir("x/weights", is_saving=True) == Path("x/weights")


def test_an_adapter_keeps_its_model_through_every_name(tmp_path):
    (tmp_path / "weights").mkdir()
    adapter = AdapterPath("run/last", base_model_path=tmp_path)
    assert adapter == Path("run/last") and ckpt_to_dir(adapter) is adapter
    assert repr(adapter) == f"AdapterPath('run/last', base_model_path={tmp_path})"
    saved = ckpt_to_weights_subdir(adapter, is_saving=True)
    assert saved == Path("run/last/weights") and saved.base_model_path == tmp_path / "weights"
    context = ckpt_to_context_subdir(adapter)
    assert context == Path("run/last/context") and context.base_model_path == tmp_path / "context"
    assert idempotent_path_append(context, "context") == context
    assert adapter.base_model_path == tmp_path, "what was passed in is not changed"


def test_an_adapter_survives_being_copied_and_sent():
    adapter = AdapterPath("a", base_model_path="b")
    for again in (pickle.loads(pickle.dumps(adapter)), copy.copy(adapter), adapter / ""):
        assert again == adapter and again.base_model_path == Path("b")
    assert AdapterPath("a").base_model_path is None
    with pytest.raises(TypeError):
        adapter / 5
    assert "adapter_path=c" in repr(AdapterPath("a", adapter_path="c"))


def test_a_distributed_checkpoint_is_a_folder_with_its_metadata(tmp_path):
    assert not is_distributed_ckpt(tmp_path)
    (tmp_path / "metadata.json").write_text("{}")
    assert is_distributed_ckpt(tmp_path) and is_distributed_ckpt(str(tmp_path) + ".ckpt")


@pytest.mark.parametrize(
    ("state", "checked"),
    [
        ({"callbacks": {"Timer": 1, "o": 2}, "b": 3}, {"callbacks": {"o": 2}, "b": 3}),
        ({"callbacks": {"o": 2}}, {"callbacks": {"o": 2}}),
        ({"b": {"c": 1}}, {"b": {"c": 1}}),
        ({}, {}),
    ],
)
def test_what_differs_from_rank_to_rank_is_not_compared(state, checked):
    before = copy.deepcopy(state)
    assert preprocess_common_state_dict_before_consistency_check(state) == checked
    assert state == before


def test_the_words_are_those_of_the_reference():
    assert (WEIGHTS_PATH, CONTEXT_PATH) == ("weights", "context")
    assert ADAPTER_META_FILENAME == "adapter_metadata.json"
    assert nemo.ckpt_to_dir is ckpt_to_dir and nemo.AdapterPath is AdapterPath


def test_where_nemo_keeps_models_is_asked_anew_each_time(monkeypatch):
    for variable in ("NEMO_HOME", "NEMO_MODELS_CACHE", "NEMO_DATASETS_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    assert Path.home() / ".cache/nemo/models" == caches.NEMO_MODELS_CACHE
    monkeypatch.setenv("NEMO_HOME", "/n")
    assert (caches.NEMO_CACHE_HOME, caches.NEMO_MODELS_CACHE) == (Path("/n"), Path("/n/models"))
    assert Path("/n/datasets") == caches.NEMO_DATASETS_CACHE
    monkeypatch.setenv("NEMO_MODELS_CACHE", "/m")
    assert caches.models_cache() == Path("/m")
    with pytest.raises(AttributeError, match="NEMO_OTHER"):
        _ = caches.NEMO_OTHER
