"""Jobs that travel: the same recipe under fiddle alone, and under NeMo-Run's local executor."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
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
ROOT = Path(__file__).parents[2]
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
def test_a_recipe_is_a_factory_of_nemo_run():
    import nemo_run as run
    from nemo_run.cli.api import resolve_factory

    from bioinit.integrations.nemo_run import commands

    job = integration.recipe(RECIPE)(["model.num_labels=3"])
    assert isinstance(job, run.Partial) and fdl.get_callable(job) is commands.init
    assert (job.recipe, job.overrides) == (RECIPE, ["model.num_labels=3"])
    assert (
        resolve_factory(commands.init, "esm2_token_classification")()
        == integration.recipe(RECIPE)()
    )
    with pytest.raises(ConfigError, match="there is no recipe"):
        integration.recipe("esm2/nothing")


@needs_nemo_run
def test_nemo_runs_own_command_line_finds_verb_recipes_and_executor(tmp_path):
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    [(name, module)] = entry["nemo_run.cli"].items()
    installed = tmp_path / "some-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: some\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(f"[nemo_run.cli]\n{name} = {module}\n")
    words = "bioinit init --dryrun -y --factory esm2_token_classification".split()
    words += ["overrides=['model.num_labels=3']"]
    words += ["run.executor=torchrun", "run.executor.ntasks_per_node=2"]
    done = subprocess.run(
        [sys.executable, "-c", "from nemo_run.__main__ import app; app()", *words],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
            "NEMORUN_HOME": str(tmp_path),
            "COLUMNS": "200",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    assert f"'{RECIPE}'" in said and "['model.num_labels=3']" in said
    assert "launcher='torchrun'" in said and "ntasks_per_node=2" in said


@needs_nemo_run
@pytest.mark.dist
def test_nemo_runs_local_executor_starts_two_processes(checkpoint, tmp_path, monkeypatch):
    # NeMo-Run starts the `torchrun` it finds on PATH, as in an activated environment.
    here = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([here, os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    import nemo_run as run
    from nemo_run.config import set_nemorun_home

    set_nemorun_home(str(tmp_path / "home"))
    out = tmp_path / "epoch=0, out"
    job = integration.partial(
        RECIPE, [*overrides(checkpoint, out), "placement.strategy=fsdp2", "placement.mesh={dp: 2}"]
    )
    executor = integration.local_executor(2)
    run.run(job, executor=executor, name="bioinit", detach=False, tail_logs=False)
    receipt = json.loads((out / "receipt.json").read_text())
    assert receipt["skip_prefixes"] == {"classifier": 2} and not receipt["problems"]


FOR_SLURM = """
import sys
import nemo_run as run
from bioinit.integrations import nemo_run
executor = nemo_run.slurm_executor(
    "lab", "gpu", nodes=2, gpus_per_node=4, time="01:00:00",
    tunnel=run.LocalTunnel(job_dir=sys.argv[1]),
)
with run.Experiment("bioinit", executor=executor) as experiment:
    experiment.add(nemo_run.partial("esm2/token_classification"), name="start")
    experiment.dryrun(delete_exp_dir=False)
"""


@needs_nemo_run
def test_the_script_for_slurm_starts_torchrun_once_on_each_node(tmp_path):
    # In a process of its own: NeMo-Run leaves others behind for the garbage collector.
    command = [sys.executable, "-c", FOR_SLURM, str(tmp_path / "jobs")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NEMORUN_HOME": str(tmp_path / "home")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    [path] = (tmp_path / "home").rglob("*_sbatch.sh")
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    script = path.read_text()
    asked = set(re.findall(r"^#SBATCH --(\S+)$", script, re.MULTILINE))
    assert asked >= {
        "account=lab",
        "partition=gpu",
        "nodes=2",
        "ntasks-per-node=1",
        "gpus-per-node=4",
        "time=01:00:00",
        "exclusive",
        "mem=0",
    }
    [command] = re.findall(r"^srun .* torchrun (.*)$", script, re.MULTILINE)
    for words in ("--nnodes 2", "--nproc-per-node 4", "--rdzv-backend c10d"):
        assert words in command
    assert "--rdzv-endpoint $head_node_ip:29500" in command
    assert "head_node_ip=$(srun --nodes=1 --ntasks=1 -w" in script


@needs_nemo_run
def test_executors_take_any_field_of_nemo_runs_own():
    executor = integration.slurm_executor(
        "lab", gpus_per_node=None, ntasks_per_node=6, exclusive=None, qos="long"
    )
    assert (executor.nproc_per_node(), executor.exclusive, executor.qos) == (6, None, "long")
    assert integration.local_executor(3, env_vars={"A": "1"}).env_vars == {"A": "1"}


def test_without_nemo_run_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    for make in (
        lambda: integration.partial(RECIPE),
        lambda: integration.recipe(RECIPE),
        integration.local_executor,
        lambda: integration.slurm_executor("lab"),
    ):
        with pytest.raises(ConfigError, match=r"pip install 'bioinit\[nemo-run\]'"):
            make()
