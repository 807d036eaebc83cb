"""``init`` and ``plan``: jobs from recipes, carried out by one process or by many together.

Of many processes each composes the recipe for itself, so a mistake on any of them is known before
anything is opened; rank 0 speaks for all.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from bioinit.cli.said import BUG, EXITS, Said, ended, failed, print_json, progress, say

if TYPE_CHECKING:
    import fiddle as fdl

    from bioinit.config import Run
    from bioinit.ranks import World
    from bioinit.recipe.overrides import Job

_OVERRIDES = """\
overrides:
  recipe=NAME                     a name from `bioinit recipes`, or ./mine.yaml
  model.initial_ckpt_path=PATH    the checkpoint to start from
  model.num_labels=3              any other key of the recipe; + is never needed
  model=esm2_3b init=strict       a preset of the groups model, init, placement, output
  output_dir=PATH                 where `init` writes
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What both verbs take."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="see below")
    parser.add_argument("-m", "--multirun", action="store_true", help="run every combination")
    parser.add_argument("-c", "--cfg", choices=["job"], help="print the composed recipe and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.epilog = f"{_OVERRIDES}\n{EXITS}"


def init(given: argparse.Namespace) -> int:
    """Merge, build, load, and write what each job says."""
    return _together(given, _init_one)


def plan(given: argparse.Namespace) -> int:
    """Print what ``init`` would do."""
    return _together(given, _plan_one)


class Outcome(NamedTuple):
    """What one job gave: its document, the same for a person, and its exit code."""

    document: dict[str, Any]
    text: str
    code: int


Work = Callable[["fdl.Config[Run]", bool], Outcome]
"""Carries out one job; told whether this process speaks."""


def _together(given: argparse.Namespace, work: Work) -> int:
    """All jobs, on all ranks; where one fails, every rank ends with its exit code."""
    from bioinit import ranks

    world = ranks.ALONE

    @contextmanager
    def met(device: str | None) -> Iterator[World]:
        nonlocal world
        with ranks.together(device) as world:
            yield world

    try:
        code = _each_job(given, work, met)
    except BrokenPipeError:
        raise
    except BaseException as error:
        if world.size == 1:
            raise
        raise Said(_ended_among(world, error)) from error
    if world.size > 1:
        ranks.part()
    return code


def _ended_among(world: World, error: BaseException) -> int:
    """Let the rank whose error it was and the first one that lives say it, and nobody else."""
    cause = world.ended_by
    if cause is None:
        return ended(error, who=f"rank {world.rank}: ")
    is_own = cause.rank == world.rank
    if not is_own and isinstance(error, KeyboardInterrupt):
        error = cause.error()  # launchers stop the others as soon as one has failed
    first = next(rank for rank in range(world.size) if rank not in cause.gone)
    who = f"rank {world.rank}: " if is_own and world.rank != 0 else ""
    return ended(error, who=who, quietly=not is_own and world.rank != first)


def _each_job(given: argparse.Namespace, work: Work, met: Callable[[str | None], Any]) -> int:
    from bioinit import recipe

    # All are composed before one runs: a misspelt key in the last job stops the first. Who cannot
    # compose says so where all ranks hear it.
    jobs: list[Job] = []
    records: list[fdl.Config[Run]] = []
    mistake: Exception | None = None
    try:
        jobs = list(recipe.jobs(given.overrides, multirun=given.multirun))
        records = [recipe.compose(job.recipe, job.overrides) for job in jobs]
    except Exception as error:
        mistake = error
    devices = [record.placement.device or "" for record in records]
    device = next((name for name in devices if name.startswith("cuda")), None)
    with met(device) as world:
        if mistake is not None:
            raise mistake
        world.agree({"verb": work.__name__, "how many jobs": str(len(jobs))})
    speaks = world.rank == 0
    if given.cfg:
        trees = [recipe.compose_tree(job.recipe, job.overrides).render() for job in jobs]
        print("---\n".join(trees) if speaks else "", end="")
        return 0
    code, documents = 0, []
    for job, record in zip(jobs, records, strict=True):
        if job.number is not None:
            if speaks:
                say(f"job {job.number}: recipe={' '.join([job.recipe, *job.overrides])}")
            if record.output_dir is not None:
                record.output_dir = os.path.join(record.output_dir, str(job.number))
        with _going_on(job.number, speaks) as outcomes, met(device):
            outcomes.append(work(record, speaks))
        [outcome] = outcomes
        documents.append(outcome.document)
        if speaks and not given.json and outcome.text:
            print(outcome.text, flush=True)
        code = code or outcome.code
    if speaks and given.json:
        print_json(documents if given.multirun else documents[0])
    return code


@contextmanager
def _going_on(number: int | None, speaks: bool) -> Iterator[list[Outcome]]:
    """One job of several: an error is its outcome, and the other jobs go on."""
    from bioinit.errors import BioinitError

    outcomes: list[Outcome] = []
    try:
        yield outcomes
    except BioinitError as error:
        if number is None or error.exit_code == BUG:  # the rank of a bug runs no other jobs
            raise
        message = str(error)
        code = failed(f"job {number}: {message}", error.exit_code, quietly=not speaks)
        outcomes[:] = [Outcome({"error": message, "exit_code": code}, "", code)]


def _plan_one(record: fdl.Config[Run], speaks: bool) -> Outcome:
    from bioinit.errors import PlanError
    from bioinit.initialize import plan

    decided = plan(record)
    if decided.problems and speaks:
        say(f"the plan has {len(decided.problems)} problem(s)")
    code = PlanError.exit_code if decided.problems else 0
    return Outcome(decided.to_json(), decided.render(), code)


def _init_one(record: fdl.Config[Run], speaks: bool) -> Outcome:
    from bioinit.initialize import initialize

    with progress(speaks=speaks) as advance:
        done = initialize(record, progress=advance)
    if not speaks:
        return Outcome({}, "", 0)
    text = f"{done.plan.render()}\n{done.report.render()}"
    if done.receipt is None:
        say("output_dir is not set: nothing was written")
        return Outcome(done.report.to_json(), text, 0)
    return Outcome(done.receipt, f"{text}\nwritten      {record.output_dir}", 0)
