"""Jobs that travel: the same recipe under fiddle alone, and under NeMo-Run's local executor."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import fiddle as fdl
import pytest
import torch

import bioinit
from bioinit.errors import ConfigError
from bioinit.integrations import nemo_run as integration
from bioinit.integrations import run_recipe

# NeMo-Run brings many packages; some of them announce that parts of others will go.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
needs_nemo_run = pytest.mark.skipif(
    importlib.util.find_spec("nemo_run") is None, reason="needs the extra nemo-run"
)
RECIPE = "esm2/token_classification"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = transformers.EsmConfig(
        vocab_size=33,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        position_embedding_type="rotary",
        pad_token_id=1,
        mask_token_id=32,
        emb_layer_norm_before=False,
    )
    transformers.EsmForMaskedLM(config).save_pretrained(folder)
    return folder


def overrides(checkpoint: Path, out: Path) -> list[str]:
    return [
        f"model.initial_ckpt_path={checkpoint}",
        "model.num_labels=3",
        f"output_dir={out}",
    ]


def test_a_partial_carries_text_and_composes_where_it_runs(checkpoint, tmp_path):
    job = bioinit.partial(RECIPE, ["model.initial_ckpt_path=/not/on/this/machine"])
    assert isinstance(job, fdl.Partial) and fdl.get_callable(job) is run_recipe
    job.overrides = tuple(overrides(checkpoint, tmp_path / "out"))
    done = fdl.build(job)()
    assert done.config.num_labels == 3 and (tmp_path / "out" / "receipt.json").is_file()


def test_a_partial_judges_its_recipe_only_when_it_runs():
    job = fdl.build(bioinit.partial("esm2/nothing"))
    with pytest.raises(ConfigError, match="there is no recipe"):
        job()


@needs_nemo_run
def test_nemo_run_gets_a_partial_of_its_own():
    import nemo_run as run

    job = integration.partial(RECIPE, ["model.num_labels=3"])
    assert isinstance(job, run.Partial)
    assert (job.recipe, job.overrides) == (RECIPE, ["model.num_labels=3"])


@needs_nemo_run
def test_nemo_runs_local_executor_runs_it(checkpoint, tmp_path, monkeypatch):
    # NeMo-Run starts the `python` it finds on PATH, as in an activated environment.
    here = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([here, os.environ["PATH"]]))
    import nemo_run as run
    from nemo_run.config import set_nemorun_home

    set_nemorun_home(str(tmp_path / "home"))
    out = tmp_path / "epoch=0, out"
    job = integration.partial(RECIPE, overrides(checkpoint, out))
    run.run(job, executor=run.LocalExecutor(), name="bioinit", detach=False, tail_logs=False)
    receipt = json.loads((out / "receipt.json").read_text())
    assert receipt["skip_prefixes"] == {"classifier": 2} and not receipt["problems"]


def test_without_nemo_run_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    with pytest.raises(ConfigError, match=r"pip install 'bioinit\[nemo-run\]'"):
        integration.partial(RECIPE)
