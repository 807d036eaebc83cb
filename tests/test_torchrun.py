"""The command line under torchrun: as one process would, said once, and failing as one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bioinit import cli
from bioinit.recipe import sources

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[1]
SLURM = ROOT / "recipes" / "launch" / "slurm.sh"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    folder = tmp_path_factory.mktemp("checkpoint") / "epoch=0, last"
    config = transformers.EsmConfig(
        vocab_size=33,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        position_embedding_type="rotary",
        pad_token_id=1,
        mask_token_id=32,
        emb_layer_norm_before=False,
    )
    torch.manual_seed(0)
    transformers.EsmForMaskedLM(config).save_pretrained(folder)
    return folder


def words(checkpoint: Path, *more: str) -> list[str]:
    return [
        "recipe=esm2/token_classification",
        f"model.initial_ckpt_path={checkpoint}",
        "model.num_labels=3",
        *more,
    ]


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory) -> Path:
    """What one process makes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert cli.main(["init", *words(checkpoint, f"output_dir={out}")]) == 0
    return out


def started(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command that starts processes, with the programs of this environment at hand."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **variables,
    }
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=environment,
    )


def torchrun(*rest: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return started("torchrun", "--standalone", "--nproc-per-node", "2", *rest, cwd=cwd)


def assert_same(made: Path, alone: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (made, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    said = [json.loads((folder / "receipt.json").read_text()) for folder in (made, alone)]
    assert said[0]["skip_prefixes"] == said[1]["skip_prefixes"] and not said[0]["problems"]
    assert cli.main(["verify", str(made)]) == 0


def test_two_processes_make_what_one_makes_whole_or_divided(checkpoint, alone, tmp_path):
    out = tmp_path / "out"
    overrides = words(checkpoint, f"output_dir={out}", "placement.strategy=ddp,fsdp2")
    done = torchrun("-m", "bioinit", "init", "--multirun", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for job in ("0", "1"):
        assert_same(out / job, alone)
    assert sorted(path.name for path in out.iterdir()) == ["0", "1"]
    written = [line for line in done.stdout.splitlines() if line.startswith("written")]
    assert len(written) == 2
    assert done.stderr.count("job 0:") == done.stderr.count("job 1:") == 1


def test_the_script_for_slurm_runs_torchrun_with_what_slurm_says(checkpoint, alone, tmp_path):
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "scontrol").write_text('#!/bin/sh\necho "$@" > scontrol.said; echo 127.0.0.1\n')
    (fake / "srun").write_text(
        '#!/bin/sh\nwhile [ "$1" != torchrun ]; do echo "$1" >> srun.said; shift; done\nexec "$@"\n'
    )
    for program in fake.iterdir():
        program.chmod(0o755)
    out = tmp_path / "out"
    done = started(
        shutil.which("bash") or "bash",
        SLURM,
        *words(checkpoint, f"output_dir={out}", "placement.mesh={dp: 2}"),
        "--json",
        cwd=tmp_path,
        PATH=os.pathsep.join([str(fake), str(BIN), os.environ["PATH"]]),
        SLURM_JOB_NODELIST="node[1-1]",
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_NNODES="1",
        SLURM_GPUS_ON_NODE="2",
    )
    assert done.returncode == 0, done.stderr
    assert_same(out, alone)
    assert json.loads(done.stdout) == json.loads((out / "receipt.json").read_text())
    assert (tmp_path / "scontrol.said").read_text() == "show hostnames node[1-1]\n"
    asked = (tmp_path / "srun.said").read_text().split()
    assert {"--nodes=1", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(asked)


def test_the_script_for_slurm_is_no_recipe_and_asks_slurm_for_one_task_on_each_node():
    assert subprocess.run(["bash", "-n", SLURM]).returncode == 0
    assert "#SBATCH --ntasks-per-node=1\n" in SLURM.read_text()
    assert not [name for name in sources.names() if name.startswith("launch")]


APART = """
import os, pathlib, runpy, sys
from bioinit import cli
rank, checkpoint = os.environ["RANK"], sys.argv[1]
common = ["init", "recipe=esm2/token_classification", f"model.initial_ckpt_path={checkpoint}"]
common += ["output_dir=out", "model.num_labels=3"]
apart = [
    [] if rank == "0" else ["model.hiden_dropout=0.1"],
    [f"init.seed={rank}"],
    ["placement.mesh={dp: 3}"],
]
codes = []
for number, more in enumerate(apart):
    print(f"-- {number}", file=sys.stderr, flush=True)
    sys.argv = ["bioinit", *common, *more]
    if number < 2:
        codes.append(cli.main())
pathlib.Path(f"codes.{rank}").write_text(str(codes))
runpy.run_module("bioinit", run_name="__main__")
"""


def test_ranks_that_differ_and_meshes_that_cannot_be_end_all_with_one_message(checkpoint, tmp_path):
    (tmp_path / "apart.py").write_text(APART)
    done = torchrun("apart.py", checkpoint, cwd=tmp_path)
    said = done.stderr
    codes = [(tmp_path / f"codes.{rank}").read_text() for rank in (0, 1)]
    assert codes == ["[2, 2]"] * 2, said
    assert not done.stdout and not (tmp_path / "out").exists()
    # The rank that failed says it, and rank 0 for whoever reads only that.
    assert said.count("bioinit: rank 1: ") == 2 and "hiden_dropout" in said
    assert said.count("rank 1 differs from rank 0 in init.seed") == 1
    # torchrun's own report has the message too.
    [mesh] = [
        line for line in said.splitlines() if line.startswith("bioinit: ") and "dp: 3" in line
    ]
    assert "exitcode  : 2" in said
    assert f"traceback : {mesh.removeprefix('bioinit: ')}" in said
