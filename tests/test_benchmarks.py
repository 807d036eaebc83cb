"""The benchmark's harness, on tiny checkpoints: no times are judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "load.py"
PEERS = "safetensors_copy,from_pretrained,torch_copy,dcp"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    pytest.importorskip("transformers")
    work = tmp_path_factory.mktemp("bench")
    document = work / "all.json"
    done = subprocess.run(
        [
            *(sys.executable, str(BENCHMARK), "--quick", "--work", str(work)),
            *("--json", str(document), "--only", "whole,shards,float32,many,half,help"),
            *("--ways", f"load_weights,initialize,limit,{PEERS}"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(document.read_text())["tables"], done.stdout


@pytest.mark.parametrize("table", ["whole", "shards", "float32", "many", "half"])
def test_every_way_ends_with_the_stored_values(measured, table):
    rows = measured[0][table]
    assert {row["way"] for row in rows} & {"load_weights"}
    assert {row["label"]: row["error"] for row in rows if row["error"]} == {}
    assert all(row["checked"]["differing"] == [] for row in rows)


def test_the_limit_runs_in_a_process_of_its_own(measured):
    (row,) = [row for row in measured[0]["whole"] if row["way"] == "limit"]
    assert row["checked"]["anonymous_before"] > 0 and "anonymous_peak" in row["checked"]


def test_the_tables_name_every_way(measured):
    for rows in (measured[0]["whole"], measured[0]["many"]):
        assert all(f"| {row['label']} |" in measured[1] for row in rows)


def test_skipping_half_reads_about_half(measured):
    rows = {row["way"]: row["checked"] for row in measured[0]["half"]}
    whole = next(row for row in measured[0]["whole"] if row["way"] == "load_weights")["checked"]
    mine = rows["load_weights"]
    assert mine["needed_bytes"] < 0.6 * whole["parameter_bytes"]
    assert mine["bytes_by_calls"] < 0.75 * whole["bytes_by_calls"]


def test_a_gpu_that_is_not_there_is_said(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick", "--device", "cuda", "--work", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "no CUDA device" in done.stdout


def test_converting_is_held_against_plain_torch(tmp_path):
    pytest.importorskip("transformers")
    document = tmp_path / "all.json"
    done = subprocess.run(
        [
            *(sys.executable, str(BENCHMARK.with_name("convert.py")), "--quick"),
            *("--work", str(tmp_path), "--json", str(document)),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(document.read_text())
    assert list(found) == ["hf to nemo2", "nemo2 to hf"]
    for direction, ways in found.items():
        for name, runs in ways.items():
            assert f"| {direction} | {name} |" in done.stdout
            assert all(run["seconds"] > 0 for run in runs)
