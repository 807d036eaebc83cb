"""Processes that share one model: they differ, fail, are killed, and nobody hangs."""

import os
import signal
import time

import pytest
import torch

from bioinit import ranks
from bioinit.errors import BioinitError, ConfigError, CorruptCheckpoint
from bioinit.ranks.watch import Pace
from tests.processes import outcomes_of, together

pytestmark = pytest.mark.dist

QUICK = Pace(tick=0.3, lost=4.0, join=60.0, interrupt=1.0, grace=6.0)


def raised(function):
    """What one rank heard, and how long it took."""
    started = time.monotonic()
    try:
        with ranks.together() as world:
            said = function(world)
    except BioinitError as error:
        said = type(error).__name__, str(error)
    return said, time.monotonic() - started


def differ(world):
    world.agree({"files": "same", "labels": "3" if world.rank == 2 else "2"})


def fail_early(world):
    if world.rank == 1:
        raise CorruptCheckpoint("it ends early")
    world.agree({})


def fail_late(world):
    world.agree({})
    if world.rank == 0:
        raise CorruptCheckpoint("it ends early")
    # Busy and deaf: only an interrupt gets it out, also where a shell had SIGINT ignored.
    if world.rank == 2:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        time.sleep(0.05)


def tidy(world):
    world.agree({})
    if world.rank == 0:
        raise CorruptCheckpoint("it ends early")
    try:
        while True:
            time.sleep(0.05)
            # Both ways to hear of it: an error at a check, and an interrupt.
            if world.rank == 1:
                world.check()
    finally:
        time.sleep(3)


def cells():
    ranks.PACE = QUICK
    each = [raised(lambda world: world.gathered(world.rank)) for _ in range(2)]
    hosts = raised(lambda world: len(world.hosts))
    failed = [raised(each) for each in (differ, fail_early, fail_late)]
    ranks.PACE = QUICK._replace(interrupt=0.3, grace=0.6)
    return [*each, hosts, *failed, raised(tidy)]


def test_processes_agree_differ_and_fail_as_one():
    found = together(3, cells, timeout=120)
    for rank, (first, second, hosts, *failed) in enumerate(found):
        assert first[0] == second[0] == [0, 1, 2] and hosts[0] == 3
        (differing, _), (early, early_seconds), (late, late_seconds), (tidied, _) = failed
        assert differing[0] == ConfigError.__name__
        assert "labels: '2' on rank 0, '3' on rank 2" in differing[1]
        said = "it ends early"
        assert early == ("CorruptCheckpoint", said if rank == 1 else f"rank 1: {said}")
        assert late == ("CorruptCheckpoint", said if rank == 0 else f"rank 0: {said}")
        assert tidied == late
        assert early_seconds < 5 and late_seconds < 8


def one_is_killed(victim):
    ranks.PACE = QUICK
    rank = torch.distributed.get_rank()

    def work(world):
        world.agree({})
        if rank == victim:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            world.gathered(1)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            world.check()
            sum(range(10_000))

    error, seconds = raised(work)
    os._exit(0 if is_told(error, victim) and seconds < 15 else 1)


def is_told(error, victim):
    kind, said = error
    lost = f"rank {victim}: gave no sign of life", "the store at which the ranks met"
    return kind == "BioinitError" and said.startswith(lost)


@pytest.mark.parametrize("victim", [2, 0])
def test_a_killed_process_is_missed_by_those_who_wait_and_those_who_work(victim):
    found = outcomes_of(3, one_is_killed, victim, timeout=60)
    assert found[victim] == ("died", -signal.SIGKILL)
    others = [outcome for rank, outcome in enumerate(found) if rank != victim]
    assert others == [("died", 0)] * 2


def stuck_in_a_collective():
    ranks.PACE = QUICK
    rank = torch.distributed.get_rank()

    def work(world):
        torch.distributed.barrier()
        if rank == 1:
            raise ConfigError("the cause")
        torch.distributed.broadcast(torch.ones(3), 1)  # nobody sends

    error, _ = raised(work)
    time.sleep(10)  # the connection stays open, as in a notebook that caught the error
    return error


def test_a_process_that_waits_in_a_collective_ends_with_the_code_of_the_error(capfd):
    started = time.monotonic()
    found = outcomes_of(2, stuck_in_a_collective, timeout=60)
    assert found[0] == ("died", ConfigError.exit_code)
    said = capfd.readouterr().err
    assert "rank 1: the cause" in said and "Rank 0 was still at work" in said
    assert time.monotonic() - started < 60


def late_to_the_meeting():
    ranks.meeting.MEET_SECONDS = 3.0
    torch.distributed.destroy_process_group()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    if os.environ["RANK"] == "1":
        met = "absent"
    else:
        try:
            with ranks.together():
                met = "met"
        except ConfigError as error:
            met = str(error)
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    ranks.meeting.MEET_SECONDS = 60.0
    with ranks.together() as world:
        return met, world.gathered(world.rank)


def test_launched_processes_meet_by_themselves_or_say_who_is_missing():
    (first, gathered), (second, same) = together(2, late_to_the_meeting, timeout=120)
    assert "did not meet the others" in first and "within 3 s" in first
    assert second == "absent" and gathered == same == [0, 1]
