"""The command line: verbs in, exit codes out.

Results go to stdout, progress and messages to stderr. Every failure is one message and one exit
code; a traceback is shown only with ``BIOINIT_DEBUG=1``. At import this room knows argparse and
nothing heavier, so ``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from bioinit.version import __version__

if TYPE_CHECKING:
    import fiddle as fdl

    from bioinit.config import Run

INTERRUPTED, TERMINATED = 130, 143
STORAGE = 5
USAGE = 2
BUG = 1
_LEFT = "nothing half done stands under a final name; a conversion goes on when it is run again"

_OVERRIDES = """\
overrides:
  recipe=NAME                     a name from `bioinit recipes`, or ./mine.yaml
  model.initial_ckpt_path=PATH    the checkpoint to start from
  model.num_labels=3              any other key of the recipe; + is never needed
  model=esm2_3b init=strict       a preset of the groups model, init, placement, output
  output_dir=PATH                 where `init` writes
"""
_EXITS = (
    "exit codes: 0 done, 2 usage or configuration, 3 the plan has problems, 4 checkpoint unusable, "
    "5 file system, 130 interrupted, 143 terminated"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}. See {self.prog} --help.", file=sys.stderr)
        raise SystemExit(USAGE)


class Verb(NamedTuple):
    """One word of the command line: what it says of itself, what it takes, what it does."""

    about: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _stoppable():
            return _dispatch(arguments)
    except _Terminated:
        return _failed(f"terminated: {_LEFT}", TERMINATED)
    except KeyboardInterrupt:
        return _failed(f"interrupted: {_LEFT}", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has seen enough, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _failed(*_explained(error))


class _Terminated(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C, what is half done is taken away on the way out."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Inside, SIGTERM is an exception; only a main thread can ask for that."""
    if threading.current_thread() is not threading.main_thread():
        return (yield)
    swallowed: list[type[KeyboardInterrupt]] = []

    def stop(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # one is enough while we clean up
        swallowed.append(_Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        raise swallowed[-1]

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody ignores it
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    try:
        yield
        if swallowed:  # by a library that was just being imported
            raise swallowed[-1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _dispatch(arguments: list[str]) -> int:
    parser = _Parser(
        prog="bioinit",
        description="Start a fine-tune from a checkpoint: every parameter accounted for.",
        epilog="verbs:\n"
        + "\n".join(f"  {name:<9}{verb.about}" for name, verb in VERBS.items())
        + f"\n\n`bioinit VERB --help` says more.\n{_EXITS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bioinit {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of the verbs below")
    verb = parser.parse_args(arguments[:1]).verb
    sub = _Parser(
        prog=f"bioinit {verb}",
        description=VERBS[verb].about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    VERBS[verb].arguments(sub)
    return VERBS[verb].run(sub.parse_intermixed_args(arguments[1:]))


def _explained(error: Exception) -> tuple[str, int]:
    from bioinit.errors import BioinitError

    if isinstance(error, BioinitError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return f"the file system said no: {error}", STORAGE
    return (
        f"internal error, {type(error).__name__}: {error}. This is a bug of bioinit; "
        "BIOINIT_DEBUG=1 shows where. Please report it with that.",
        BUG,
    )


def _failed(message: str, code: int) -> int:
    if os.environ.get("BIOINIT_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    _say(message)
    return code


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="see below")
    parser.add_argument("-m", "--multirun", action="store_true", help="run every combination")
    parser.add_argument("-c", "--cfg", choices=["job"], help="print the composed recipe and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.epilog = f"{_OVERRIDES}\n{_EXITS}"


def _init(arguments: argparse.Namespace) -> int:
    return _each_job(arguments, _init_one)


def _plan(arguments: argparse.Namespace) -> int:
    return _each_job(arguments, _plan_one)


class Outcome(NamedTuple):
    """What one job gave: its document, the same for a person, and its exit code."""

    document: dict[str, Any]
    text: str
    code: int


def _each_job(arguments: argparse.Namespace, run: Callable[[fdl.Config[Run]], Outcome]) -> int:
    from bioinit import recipe

    jobs = recipe.jobs(arguments.overrides, multirun=arguments.multirun)
    if arguments.cfg:
        trees = [recipe.compose_tree(job.recipe, job.overrides).render() for job in jobs]
        print("---\n".join(trees), end="")
        return 0
    # All are composed before one runs: a misspelt key in the last job stops the first.
    records = [recipe.compose(job.recipe, job.overrides) for job in jobs]
    code, documents = 0, []
    for job, record in zip(jobs, records, strict=True):
        if job.number is not None:
            _say(f"job {job.number}: recipe={' '.join([job.recipe, *job.overrides])}")
            if record.output_dir is not None:
                record.output_dir = os.path.join(record.output_dir, str(job.number))
        outcome = run(record) if job.number is None else _guarded(run, record, job.number)
        documents.append(outcome.document)
        if not arguments.json and outcome.text:
            print(outcome.text, flush=True)
        code = code or outcome.code
    if arguments.json:
        _print_json(documents if arguments.multirun else documents[0])
    return code


def _guarded(
    run: Callable[[fdl.Config[Run]], Outcome], record: fdl.Config[Run], number: int
) -> Outcome:
    """One job of several: an error is its outcome, and the other jobs go on."""
    from bioinit.errors import BioinitError

    try:
        return run(record)
    except BioinitError as error:
        message = str(error)
        code = _failed(f"job {number}: {message}", error.exit_code)
        return Outcome({"error": message, "exit_code": code}, "", code)


def _plan_one(record: fdl.Config[Run]) -> Outcome:
    from bioinit.errors import PlanError
    from bioinit.initialize import plan

    decided = plan(record)
    if decided.problems:
        _say(f"the plan has {len(decided.problems)} problem(s)")
    code = PlanError.exit_code if decided.problems else 0
    return Outcome(decided.to_json(), decided.render(), code)


def _init_one(record: fdl.Config[Run]) -> Outcome:
    from bioinit.initialize import initialize

    with _progress() as progress:
        done = initialize(record, progress=progress)
    text = f"{done.plan.render()}\n{done.report.render()}"
    if done.receipt is None:
        _say("output_dir is not set: nothing was written")
        return Outcome(done.report.to_json(), text, 0)
    return Outcome(done.receipt, f"{text}\nwritten      {record.output_dir}", 0)


@contextmanager
def _progress(doing: str = "loading") -> Iterator[Callable[[int, int], None] | None]:
    """A bar by bytes on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (doing, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint's folder or file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--tensors", action="store_true", help="list every stored tensor")


def _inspect(arguments: argparse.Namespace) -> int:
    from bioinit.describe import describe, lines
    from bioinit.families import open_checkpoint
    from bioinit.report import printable

    with open_checkpoint(arguments.checkpoint) as checkpoint:
        document = describe(checkpoint, with_tensors=arguments.tensors)
    if arguments.json:
        _print_json(document)
    else:
        print("\n".join(map(printable, lines(document))))
    return 0


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a checkpoint's folder or file")
    parser.add_argument("destination", metavar="DST", help="the folder to make")
    add = parser.add_argument
    add("--to", required=True, metavar="DIALECT", help="hf, nemo2 or neox")
    add("--format", help="how bytes lie; the dialect's usual one if left out")
    add("--dtype", help="bfloat16, float16 or float32; every tensor keeps its own if left out")
    add("--family", help="of which family the model is, where the source does not say")
    add("--config", metavar="FILE", help="the model's saved config, of any kind")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of our config")
    add("--architecture", help="the class or the task that the hf dialect names")
    add("--tokenizer", metavar="DIR", help="a tokenizer that goes along in place of the source's")
    add("--partitions", type=int, metavar="N", help="over how many files, for neox")
    add("--max-shard-size", metavar="SIZE", help="the most of one file; 5GB")
    add("--model-id", metavar="ID", help="a published model that it must be, by NeMo's name")
    add(
        "--drop", action="append", default=[], metavar="PREFIX", help="stored names to leave behind"
    )
    add("--overwrite", action="store_true", help="replace a folder that is not empty")
    add("--json", action="store_true", help="print one JSON document")
    parser.epilog = f"A killed conversion goes on when it is started again.\n{_EXITS}"


def _convert(arguments: argparse.Namespace) -> int:
    from bioinit.convert import convert
    from bioinit.recipe.overrides import fields

    with _progress("converting") as progress:
        done = convert(
            arguments.source,
            arguments.destination,
            arguments.to,
            format=arguments.format,
            dtype=arguments.dtype,
            family=arguments.family,
            config=arguments.config,
            set=fields(arguments.set),
            architecture=arguments.architecture,
            tokenizer=arguments.tokenizer,
            partitions=arguments.partitions,
            max_shard_size=arguments.max_shard_size,
            model_id=arguments.model_id,
            drop=arguments.drop,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    if arguments.json:
        _print_json(done.to_json())
    else:
        print(done.render())
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="what `bioinit init` wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _verify(arguments: argparse.Namespace) -> int:
    from bioinit.save import verify

    files = verify(arguments.directory)
    if arguments.json:
        _print_json(files)
    else:
        print(f"{arguments.directory} is what its receipt says: {len(files)} files unchanged")
    return 0


def _recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this one, composed")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _recipes(arguments: argparse.Namespace) -> int:
    from bioinit.recipe import compose_tree, sources

    if arguments.name is not None:
        composed = compose_tree(arguments.name)
        if arguments.json:
            _print_json(composed.tree)
        else:
            print(composed.render(), end="")
        return 0
    about = {name: sources.summary(sources.find(name)) for name in sources.names()}
    if arguments.json:
        _print_json([{"name": name, "about": text} for name, text in about.items()])
        return 0
    width = max(map(len, about), default=0)
    for name, text in about.items():
        print(f"{name:<{width}}  {text}")
    return 0


def _say(message: str) -> None:
    from bioinit.report import printable_lines

    print(f"bioinit: {printable_lines(message)}", file=sys.stderr)


def _print_json(document: Any) -> None:
    from bioinit.report import dumps

    print(dumps(document))


VERBS = {
    "init": Verb("merge, build, load, and write output_dir", _run_arguments, _init),
    "plan": Verb("everything but reading weights: print what would be done", _run_arguments, _plan),
    "inspect": Verb("what a checkpoint holds, from its headers", _inspect_arguments, _inspect),
    "convert": Verb("the same weights in another dialect and format", _convert_arguments, _convert),
    "verify": Verb("recompute the digests of a receipt", _verify_arguments, _verify),
    "recipes": Verb("list the recipes, or show one composed", _recipes_arguments, _recipes),
}
