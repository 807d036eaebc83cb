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
from typing import NamedTuple, NoReturn

from bioinit.cli import cache, migrate, runs
from bioinit.cli.said import EXITS, USAGE, Said, Terminated, ended, print_json, progress
from bioinit.version import __version__


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
    except Said as error:
        return error.code
    except BrokenPipeError:
        # Whoever read our output has seen enough, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return ended(error)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Inside, SIGTERM is an exception; only a main thread can ask for that."""
    if threading.current_thread() is not threading.main_thread():
        return (yield)
    swallowed: list[type[KeyboardInterrupt]] = []

    def stop(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # one is enough while we clean up
        swallowed.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        raise swallowed[-1]

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    # Any other handler than Python's own is somebody's who ignores it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
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
        + f"\n\n`bioinit VERB --help` says more.\n{EXITS}",
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


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint's folder or file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--tensors", action="store_true", help="list every stored tensor")


def _inspect(given: argparse.Namespace) -> int:
    from bioinit.describe import describe, lines
    from bioinit.families import open_checkpoint
    from bioinit.report import printable

    with open_checkpoint(given.checkpoint) as checkpoint:
        document = describe(checkpoint, with_tensors=given.tensors)
    if given.json:
        print_json(document)
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
    parser.epilog = f"A killed conversion goes on when it is started again.\n{EXITS}"


def _convert(given: argparse.Namespace) -> int:
    from bioinit.convert import convert
    from bioinit.recipe.overrides import fields

    with progress("converting") as advance:
        done = convert(
            given.source,
            given.destination,
            given.to,
            format=given.format,
            dtype=given.dtype,
            family=given.family,
            config=given.config,
            set=fields(given.set),
            architecture=given.architecture,
            tokenizer=given.tokenizer,
            partitions=given.partitions,
            max_shard_size=given.max_shard_size,
            model_id=given.model_id,
            drop=given.drop,
            overwrite=given.overwrite,
            progress=advance,
        )
    if given.json:
        print_json(done.to_json())
    else:
        print(done.render())
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="what `bioinit init` wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _verify(given: argparse.Namespace) -> int:
    from bioinit.save import verify

    files = verify(given.directory)
    if given.json:
        print_json(files)
    else:
        print(f"{given.directory} is what its receipt says: {len(files)} files unchanged")
    return 0


def _recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this one, composed")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _recipes(given: argparse.Namespace) -> int:
    from bioinit.recipe import compose_tree, sources

    if given.name is not None:
        composed = compose_tree(given.name)
        if given.json:
            print_json(composed.tree)
        else:
            print(composed.render(), end="")
        return 0
    about = {name: sources.summary(sources.find(name)) for name in sources.names()}
    if given.json:
        print_json([{"name": name, "about": text} for name, text in about.items()])
        return 0
    width = max(map(len, about), default=0)
    for name, text in about.items():
        print(f"{name:<{width}}  {text}")
    return 0


VERBS = {
    "init": Verb("merge, build, load, and write output_dir", runs.arguments, runs.init),
    "plan": Verb(
        "everything but reading weights: print what would be done", runs.arguments, runs.plan
    ),
    "inspect": Verb("what a checkpoint holds, from its headers", _inspect_arguments, _inspect),
    "convert": Verb("the same weights in another dialect and format", _convert_arguments, _convert),
    "verify": Verb("recompute the digests of a receipt", _verify_arguments, _verify),
    "recipes": Verb("list the recipes, or show one composed", _recipes_arguments, _recipes),
    "cache": Verb("what was converted once: list, verify, prune", cache.arguments, cache.run),
    "migrate": Verb(
        "old settings, contexts and recipes as YAML of ours", migrate.arguments, migrate.run
    ),
}
