"""A short fuzz run, the same inputs every time; `make fuzz` is the long one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fuzz import cases, targets, watch

SEEDS = sorted((Path(__file__).parent / "seeds").glob("*.json"))
RUNS = 80


def _spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "outer" / "checkpoint"


@pytest.fixture(scope="module", autouse=True)
def everything_is_imported(tmp_path_factory):
    targets.warm_up(tmp_path_factory.mktemp("warm") / "outer" / "checkpoint")


@pytest.mark.parametrize("target", cases.CASES)
def test_what_the_fuzzer_starts_from_opens(target, folder):
    for case in cases.valid(target):
        watch.open_valid(case, folder)


@pytest.mark.parametrize("target", targets.NAMES)
def test_hostile_input_is_read_or_called_bad_and_nothing_else_happens(target, folder):
    for number in range(RUNS):
        case = targets.case_of(target, targets.decisions(target, number))
        try:
            targets.check(target, case, folder)
        except watch.Defect as defect:
            found = targets.to_json(target, str(defect), case)
            pytest.fail(f"input {number}: {defect}. Mend it, and keep this in seeds/:\n{found}")


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: path.stem)
def test_what_the_fuzzer_found_once_stays_mended(path, folder):
    target, case = targets.from_json(path.read_text())
    targets.check(target, case, folder)


def test_most_inputs_are_changed_and_some_still_open(folder):
    changed = opened = 0
    for number in range(60):
        case = targets.case_of("hub", targets.decisions("hub", number))
        changed += case not in cases.valid("hub")
        watch.lay_out(case, folder)
        try:
            watch.open_valid(case, folder)
        except Exception:  # whatever it is, it did not open; other tests judge which error it was
            continue
        opened += 1
    assert changed > 40
    assert opened > 5


@pytest.mark.parametrize(
    "harm",
    [
        lambda home: 1 / 0,
        lambda home: open("/etc/hostname").close(),
        lambda home: (home / "x").write_text("x"),
        lambda home: exec("1"),
        lambda home: bytearray(b"x" * (200 << 20)),
        lambda home: _spin(watch.CPU_SECONDS + 0.1),
    ],
    ids=["raises", "opens outside", "writes", "executes", "takes memory", "takes time"],
)
def test_the_watch_sees_what_it_is_for(harm, tmp_path):
    with pytest.raises(watch.Defect), watch.watched(tmp_path, 10):
        harm(tmp_path)
