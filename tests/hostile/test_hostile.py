"""Every checkpoint of the corpus: one clear error or the right tensors, and nothing else happens.

The checkpoints are written here, and opened by ``driver.py`` in a process of its own in which an
audit hook watches: no file outside of the checkpoint is opened, none is written, nothing is
imported, run or connected to. Each must be done in five seconds of computing, with at most twice
its own size and :data:`ROOM` of Python's memory.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.cases.pickles import CALLS, LIFELESS
from tests.hostile.corpus import ANY, GROUPS, Case, canary, cases, made
from tests.hostile.warm import GOOD

DRIVER = Path(__file__).with_name("driver.py")
SECONDS = 5
# Readers work in blocks of fixed sizes, the largest of which is the 16 MiB that `read` reads at
# once; what a reader allocates because a header says so is a gibibyte or more.
ROOM = 16 << 20
# What the allocators of torch and zlib keep is not seen by tracemalloc, and not given back at once.
ROOM_OF_PROCESS = 96 << 20
TIMES, TIMES_OF_TEXT = 2, 16
ALL_TEXT = {
    "safetensors/many_tensors_at_one_place",
    "safetensors/tensors_of_nothing_and_one_lie",
    "sharded/weight_map_of_a_hundred_thousand_missing_files",
}
"""Files that are all header: each entry of some thirty bytes becomes several Python objects."""

CASES = cases()
# To import torch takes longer than to open a hundred checkpoints.
BATCHES = (
    ("safetensors", "sharded", "torch_zip", "torch_legacy", "paths"),
    ("pickles", "contexts", "yamls"),
    ("torch_dist", "items", "hf_dcp", "zarr", "nemo", "partitions"),
    ("generic",),
)
VIOLATIONS = {  # and what the hook has to say of each
    "os.system": "os.system",
    "eval": "exec",
    "open outside": "outside",
    "write": "for writing",
    "os.open for writing": "for writing",
    "import": "wave",
    "socket": "socket.",
    "connect": "socket.connect",
    "remove": "os.remove",
    "mkdir": "os.mkdir",
    "rename": "os.rename",
    "symlink": "os.symlink",
    "chmod": "os.chmod",
    "truncate": "os.truncate",
    "list outside": "os.listdir",
    "subprocess": "subprocess.Popen",
    "fork": "os.fork",
    "dlopen": "ctypes.dlopen",
    "find_class": "pickle.find_class",
    "temporary file": "tempfile.",
    "read through a link": "outside",
}


def drive(plan: dict[str, Any], folder: Path) -> Path:
    """Run the driver; the file of its results."""
    manifest, results = folder / "manifest.json", folder / "results.json"
    manifest.write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, DRIVER, manifest, results],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    if done.returncode:
        last = results.read_text().splitlines()[-1:] if results.exists() else []
        pytest.fail(f"the driver ended with {done.returncode} after {last}:\n{done.stderr[-4000:]}")
    return results


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Everything below ``folder``, with sizes and times: what a reader must leave as it is."""
    found = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found.append((str(path), status.st_size, status.st_mtime_ns))
    return found


@pytest.fixture(scope="session")
def outcome(tmp_path_factory) -> Any:
    """A function that says what came of a case; the driver runs once for a few groups."""
    known: dict[str, dict[str, Any]] = {}

    def of(case: Case) -> dict[str, Any]:
        if case.id not in known:
            (groups,) = (batch for batch in BATCHES if case.group in batch)
            known.update(driven(groups, tmp_path_factory.mktemp(groups[0])))
        return known[case.id]

    return of


def driven(groups: Sequence[str], root: Path) -> dict[str, dict[str, Any]]:
    """Write the cases of some groups, open them all, and gather what came of each."""
    plans, before = [], {}
    for case in (case for case in CASES if case.group in groups):
        sandbox = root / case.group / case.name
        plans.append(made(case, sandbox))
        before[case.id] = listing(sandbox)
    warm = [made(case, root / "warm" / case.name) for case in GOOD]
    results = drive({"warm": warm, "cases": plans}, root)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    found = {line["id"]: line for line in lines if "begun" not in line}
    for plan in plans:
        sandbox = Path(plan["cwd"])
        result = found[plan["id"]]
        result["expected"] = plan["tensors"]
        result["canary"] = canary(sandbox / "ckpt").exists()
        result["written"] = listing(sandbox) != before[plan["id"]]
        result["size"] = sum(size for _, size, _ in before[plan["id"]])
    return found


def errors_of(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from (result[stage] for stage in ("open", "read", "context") if result[stage])


def parameter(case: Case) -> Any:
    return pytest.param(case, id=case.id)


each_case = pytest.mark.parametrize("case", [parameter(case) for case in CASES])


@each_case
def test_ends_as_it_should(case, outcome):
    result = outcome(case)
    assert not result["violations"], result["violations"]
    assert not result["canary"], "the payload was run"
    assert not result["written"], "the checkpoint or something beside it was changed"
    for error in errors_of(result):
        assert "BioinitError" in error["kinds"], error
        assert "ConfigError" not in error["kinds"], error
    assert result["seconds"] <= SECONDS
    times = TIMES_OF_TEXT if case.id in ALL_TEXT else TIMES
    assert result["peak"] <= times * result["size"] + ROOM
    assert result["rss"] <= 2 * result["size"] + ROOM_OF_PROCESS
    judge(case, result)


def judge(case: Case, result: dict[str, Any]) -> None:
    """Hold what came of a case against what should."""
    error = next(errors_of(result), None)
    if case.kind in ("good", "inert"):
        assert error is None, error
    if case.kind == "good" or (case.kind == "sound" and error is None):
        assert result["expected"] is None or result["tensors"] == result["expected"]
    if case.kind == "bad":
        assert error is not None, f"it was read as if it were good: {sorted(result['tensors'])}"
        if case.context:
            assert result["context"] is not None, "load_context said nothing"
    if error is None:
        return
    allowed = (case.errors if case.kind == "bad" else f"{case.errors}|{ANY}").split("|")
    assert set(error["kinds"]) & set(allowed), error
    if case.kind == "bad":
        for problem in errors_of(result):
            assert case.file in problem["message"], problem
            assert re.search(case.says, problem["message"], re.DOTALL), problem


@pytest.fixture(scope="session")
def violations(tmp_path_factory) -> dict[str, list[str]]:
    """What the hook wrote down while each of them was done on purpose."""
    folder = tmp_path_factory.mktemp("violations")
    results = drive({"violate": VIOLATIONS, "cwd": str(folder)}, folder)
    found: dict[str, list[str]] = json.loads(results.read_text())
    return found


@pytest.mark.parametrize("what", VIOLATIONS)
def test_the_hook_sees(what, violations):
    assert any(VIOLATIONS[what] in line for line in violations[what]), violations


RUN_THEM = """
import contextlib, pathlib, pickle, sys
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.pkl")):
    with contextlib.suppress(Exception):
        pickle.loads(file.read_bytes())
"""


def test_the_payloads_would_do_what_they_say(tmp_path):
    """The standard library's unpickler runs all that can be run: no canary would prove little."""
    live = {name: make for name, make in CALLS.items() if name not in LIFELESS}
    for name, make in live.items():
        (tmp_path / f"{name}.pkl").write_bytes(make(str(tmp_path / name)))
    subprocess.run([sys.executable, "-c", RUN_THEM, tmp_path], cwd=tmp_path, check=True, timeout=60)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not all((tmp_path / name).exists() for name in live):
        time.sleep(0.05)  # what was started in the background takes its time
    assert [name for name in live if not (tmp_path / name).exists()] == []


def test_those_that_are_all_text_are_among_the_cases():
    assert ALL_TEXT <= {case.id for case in CASES}


def test_the_corpus_is_large_and_known_by_its_groups():
    bad = [case for case in CASES if case.kind not in ("good", "inert")]
    good = [case for case in CASES if case.kind in ("good", "inert")]
    assert len(bad) >= 250 and len(good) >= 25
    assert {case.group for case in CASES} == {name for batch in BATCHES for name in batch}
    assert {case.group for case in CASES} == set(GROUPS)
