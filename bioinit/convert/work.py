"""Whether two conversions are one: what a killed process left is gone on with by the same alone."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bioinit.convert.options import Options
from bioinit.convert.source import Source
from bioinit.formats.protocol import Outgoing
from bioinit.plan import LoadPlan
from bioinit.save.beside import Beside
from bioinit.storage import File
from bioinit.version import __version__


def digest_of(
    source: Source,
    options: Options,
    given: Mapping[str, Any],
    plan: LoadPlan,
    side: Beside,
    tensors: Sequence[Outgoing],
) -> str:
    """A digest of everything that decides what is written, element by element.

    What it cannot know is whether functions of a mapping are the same ones: with conversions the
    digest is a new one each time, so such work begins anew.
    """
    found = hashlib.sha256()
    for part in _parts(source, options, given, plan, side, tensors):
        found.update(repr(part).encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()


def rules_of(
    source: Source, options: Options, given: Mapping[str, Any], plan: LoadPlan, side: Beside
) -> str | None:
    """A digest of what is done to a source, which leaves out what the source's bytes are.

    A rule that leads an element elsewhere, a field that is written otherwise, a new version: each
    is another digest. A rule that does not concern this source is not. None where a mapping has
    conversions, of which nobody knows whether they are the same functions again.
    """
    if any(target.conversion is not None for target in plan.targets.values()):
        return None
    how = [file.how for file in source.checkpoint.files]
    found = hashlib.sha256()
    for part in (
        (__version__, options, sorted(given.items()), how, sorted(side.copied)),
        *_elements(plan, side),
    ):
        found.update(repr(part).encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()


def _parts(
    source: Source,
    options: Options,
    given: Mapping[str, Any],
    plan: LoadPlan,
    side: Beside,
    tensors: Sequence[Outgoing],
) -> Iterator[object]:
    yield __version__, source.checkpoint.digest, options, sorted(given.items())
    yield sorted((name, *_identity(file)) for name, file in side.copied.items())
    for tensor in tensors:
        yield tensor.key, tensor.shape, tensor.dtype
    if any(target.conversion is not None for target in plan.targets.values()):
        yield secrets.token_hex(16)
    yield from _elements(plan, side)


def _elements(plan: LoadPlan, side: Beside) -> Iterator[object]:
    """What is written, and where each element of it comes from."""
    yield sorted(side.made.items())
    written = side.written
    yield written.weights, written.front
    yield sorted(written.objects.items()), sorted(written.common.items())
    for key, target in plan.targets.items():
        # Where each element comes from, and what is done to it on the way.
        yield key, target.dtype, target.copies, target.equal, target.padded


def _identity(file: File) -> tuple[str, int, int]:
    return str(file.path), file.size, file.mtime_ns
