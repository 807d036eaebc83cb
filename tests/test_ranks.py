"""Many ranks, most of them threads over one store: agreement, union, and one failing for all."""

import itertools
import operator
import threading
import time
from contextlib import nullcontext

import pytest
from torch.distributed import FileStore, HashStore, PrefixStore

from bioinit import ranks
from bioinit.errors import (
    BioinitError,
    ConfigError,
    CorruptCheckpoint,
    PlanError,
    Problem,
    StorageError,
)
from bioinit.ranks import ALONE, World, joined, together
from bioinit.ranks.meeting import require_server
from bioinit.ranks.watch import Pace

QUICK = Pace(tick=0.1, settle=0.1, lost=2.0, join=5.0, heard=2.0, interrupt=60, grace=60)
HASTY = QUICK._replace(tick=0.02, settle=0.01)


def threads(size, function, pace=QUICK, absent=()):
    """What ``function(world)`` gave or raised in each of ``size`` threads, and the store."""
    store = HashStore()
    found = [None] * size

    def run(rank):
        try:
            with joined(store, rank, size, "test", pace) as world:
                found[rank] = function(world)
        except BaseException as error:
            found[rank] = error

    running = [threading.Thread(target=run, args=(r,)) for r in range(size) if r not in absent]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert not any(thread.is_alive() for thread in running)
    return found


def test_one_process_is_alone_and_needs_no_store():
    with together() as world:
        assert world is ALONE
        world.agree({"a": "b"})
        world.check()
        assert world.gathered(7) == [7]
        assert world.united({"a": 1}, operator.or_) == {"a": 1}
        assert len(world.hosts) == 1


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_what_all_know_is_united_in_the_order_of_ranks(size):
    def all_ranks(world):
        first = world.united([world.rank], operator.add)
        return first, world.gathered({"rank": world.rank, "sees": len(first)})

    expected = [*range(size)], [{"rank": r, "sees": size} for r in range(size)]
    assert threads(size, all_ranks) == [expected] * size


class Counting:
    """A store that counts what it is asked, questions of a wait aside."""

    def __init__(self, store):
        self._store = store
        self.operations = 0

    def __getattr__(self, name):
        self.operations += name != "check"
        return getattr(self._store, name)


def test_uniting_costs_a_rank_as_many_operations_as_the_tree_is_high():
    def all_ranks(world):
        world.united({str(world.rank): 1}, operator.or_)
        store = world._line._store = Counting(world._line._store)
        united = world.united({str(world.rank): 1}, operator.or_)
        assert len(united) == 64
        return store.operations

    costs = threads(64, all_ranks)
    assert max(costs) <= 5 * 6 + 6
    assert sorted(costs)[32] <= 6


def test_what_is_longer_than_the_store_takes_travels_in_parts(monkeypatch):
    monkeypatch.setattr("bioinit.ranks.line.PART_BYTES", 100)
    numbers = [str(n * n) for n in range(2000)]
    assert threads(3, lambda world: world.gathered(numbers)) == [[numbers] * 3] * 3


def test_the_store_is_left_as_it_was():
    store = HashStore()

    def run(rank):
        with joined(store, rank, 3, "left", QUICK) as world:
            world.agree({"a": "b"})
            world.gathered([rank])

    running = [threading.Thread(target=run, args=(r,)) for r in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert store.num_keys() == 0


def test_ranks_that_agree_go_on():
    assert threads(4, lambda world: world.agree({"recipe": "same", "b": "c"})) == [None] * 4


def test_every_rank_is_told_who_differs_and_in_what():
    def all_ranks(world):
        world.agree({"files": "f", "labels": "3" if world.rank == 2 else "2"})

    for error in threads(4, all_ranks):
        assert type(error) is ConfigError
        assert "rank 2 differs from rank 0 in labels" in str(error)
        assert "labels: '2' on rank 0, '3' on rank 2" in str(error)
        assert "files" not in str(error).split("Start all")[0]


def test_most_ranks_are_the_measure_even_against_rank_0():
    def all_ranks(world):
        world.agree({"a": "odd"} if world.rank == 0 else {"a": "even", "b": "1"})

    for error in threads(12, all_ranks):
        assert "rank 0 differs from rank 1 in a, b" in str(error)
        assert "b: '1' on rank 1, nothing on rank 0" in str(error)


def test_many_that_differ_are_counted():
    def all_ranks(world):
        world.agree({"a": "x" if world.rank < 20 else "y"})

    said = str(threads(32, all_ranks)[31])
    assert "ranks 20, 21, 22, 23, 24, 25, 26, 27 and 4 more differ from rank 0 in a" in said


STEPS = {
    "agree": lambda world: world.agree({}),
    "united": lambda world: world.united({}, operator.or_),
    "gathered": lambda world: world.gathered(1),
    "hosts": lambda world: world.hosts,
    "the end": lambda world: None,
}


@pytest.mark.parametrize("odd", [0, 3])
@pytest.mark.parametrize(("one", "others"), [*itertools.combinations(STEPS, 2)])
def test_ranks_that_come_to_different_steps_do_not_wait_for_each_other(odd, one, others):
    def all_ranks(world):
        STEPS["gathered"](world)
        STEPS[one if world.rank == odd else others](world)

    started = time.monotonic()
    for error in threads(4, all_ranks, HASTY):
        assert type(error) is ConfigError
        assert f"came to {one!r} when" in str(error) or f"came to {one!r}: turn 2" in str(error)
        assert f"came to {others!r}" in str(error) and "if rank == 0" in str(error)
    assert time.monotonic() - started < 4


def test_those_who_have_met_are_waited_for_much_shorter_than_those_who_are_being_started(
    monkeypatch,
):
    held = []

    class Line:
        def __init__(self, store, rank, size, pace):
            held.append(pace.join)

        def open(self):
            return nullcontext()

    monkeypatch.setattr(ranks, "Line", Line)
    monkeypatch.setattr(ranks, "meet", lambda device: (HashStore(), 0, 2))
    monkeypatch.setattr(ranks, "_meetings", itertools.count(1))
    for _ in range(3):
        with together():
            pass
    assert held == [600, 120, 120]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("wait", ["agree", "end"])
def test_the_error_of_one_rank_is_the_error_of_all(rank, wait):
    def all_ranks(world):
        if world.rank == rank:
            raise CorruptCheckpoint("model.safetensors ends early")
        if wait == "agree":
            world.agree({})

    started = time.monotonic()
    for each, error in enumerate(threads(4, all_ranks)):
        assert type(error) is CorruptCheckpoint
        said = "model.safetensors ends early"
        assert str(error) == (said if each == rank else f"rank {rank}: {said}")
        assert error.exit_code == 4
    assert time.monotonic() - started < 4


def test_a_rank_at_work_hears_of_the_failure_at_its_next_check():
    def all_ranks(world):
        if world.rank == 1:
            raise StorageError("no space left")
        while True:
            time.sleep(0.01)
            world.check()

    found = threads(3, all_ranks)
    assert [str(error) for error in found] == ["rank 1: no space left", "no space left",
                                               "rank 1: no space left"]  # fmt: skip


def test_problems_of_a_plan_travel_with_it():
    problem = Problem("unclaimed", "a.b", "it lacks a.b.", "Add it.")

    def all_ranks(world):
        if world.rank == 0:
            raise PlanError("the plan has 1 problem", [problem])

    error = threads(2, all_ranks)[1]
    assert type(error) is PlanError and error.problems == (problem,) and error.exit_code == 3


def test_an_error_that_nobody_foresaw_says_where_it_came_from():
    def all_ranks(world):
        if world.rank == 1:
            {}["lost"]

    first, second = threads(2, all_ranks)
    assert type(second) is KeyError
    assert type(first) is BioinitError and str(first) == "rank 1: KeyError: 'lost'"
    assert "test_ranks.py" in first.__notes__[0]


def test_of_several_that_fail_the_lowest_rank_is_named_and_each_keeps_its_own():
    def all_ranks(world):
        if world.rank in (2, 3):
            raise ConfigError(f"from {world.rank}")
        world.agree({})

    assert [str(e) for e in threads(5, all_ranks)] == [
        "rank 2: from 2", "rank 2: from 2", "from 2", "from 3", "rank 2: from 2"
    ]  # fmt: skip


def test_a_broken_connection_gives_way_to_the_error_that_broke_it():
    def all_ranks(world):
        if world.rank == 0:
            raise RuntimeError("[gloo] Connection closed by peer")
        time.sleep(0.5)
        raise ConfigError("the cause")

    first, second = threads(2, all_ranks)
    assert type(first) is ConfigError and str(first) == "rank 1: the cause"
    assert "closed by peer" in str(first.__cause__)
    assert str(second) == "the cause"


def test_a_rank_that_is_slow_but_alive_is_waited_for():
    def all_ranks(world):
        time.sleep(3.5 if world.rank == 1 else 0)
        return world.gathered(world.rank)

    assert threads(3, all_ranks) == [[0, 1, 2]] * 3


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_never_comes_is_named(rank):
    found = threads(3, lambda world: world.gathered(1), QUICK._replace(join=1.0), absent=[rank])
    for each, error in enumerate(found):
        if each != rank:
            assert type(error) is ConfigError and f"rank {rank} did not come" in str(error)
            assert "(`if rank == 0:`)" in str(error)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_a_sign_of_life_is_missed(rank):
    def all_ranks(world):
        world.gathered(0)
        if world.rank == rank:
            world._line._watch._ended.set()  # its threads end, as those of a killed process do
            time.sleep(3.5)
            raise KeyError("it would be dead by now")
        world.agree({})

    found = threads(3, all_ranks, QUICK._replace(lost=1.0))
    for each, error in enumerate(found):
        if each != rank:
            assert type(error) is BioinitError
            assert str(error).startswith(f"rank {rank}: gave no sign of life for 1 s.")


def test_inside_of_a_meeting_the_world_is_the_same():
    def all_ranks(world):
        with together() as inner:
            return inner is world

    assert threads(2, all_ranks) == [True, True]


def test_hosts_are_known_by_rank():
    assert len(set(threads(3, lambda world: world.hosts))) == 1


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "lacks RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
            "RANK is 2, but WORLD_SIZE is 2",
        ),
    ],
)
def test_launchers_that_say_too_little_are_told_what_is_missing(monkeypatch, variables, said):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said), together():
        pass


def test_imagined_others_agree_with_everything():
    world = World(3, 8)
    world.agree({"a": "b"})
    assert world.gathered(1) == [1] and world.hosts == (world.hosts[0],) * 8


def test_ranks_that_met_in_a_file_are_told_to_meet_elsewhere(tmp_path):
    with pytest.raises(ConfigError, match="env://"):
        require_server(PrefixStore("default_pg", FileStore(str(tmp_path / "store"), 1)))
    require_server(PrefixStore("default_pg", HashStore()))
