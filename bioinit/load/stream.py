"""Planned tensors for those who write them: any stretch of one, made when it is asked for.

A writer asks for elements in row-major order, a slab at a time, from several threads. What a plan
copies is cut to the slab and read into it; no tensor is ever whole, but for those that a conversion
makes, which cannot be made in parts.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

import torch

from bioinit.errors import Problem
from bioinit.formats.protocol import Outgoing, StoredTensor
from bioinit.layout import Dims, numel, restrict
from bioinit.load import whole_copies
from bioinit.load.staging import Staging
from bioinit.load.transfer import Job, Progress, Transfer
from bioinit.mapping import Conversion
from bioinit.plan import Copy, LoadPlan, TargetPlan
from bioinit.report import raise_for
from bioinit.storage import File

__all__ = ["Stream"]


class Stream:
    """The tensors of a plan without problems, whose targets are row-major and whole."""

    def __init__(
        self,
        plan: LoadPlan,
        files: Sequence[File],
        stored: Mapping[str, StoredTensor],
        progress: Progress | None = None,
    ) -> None:
        self._plan = plan
        self._stored = stored
        self._transfer = Transfer(files, 1, torch.device("cpu"), progress)
        self._of_thread = threading.local()
        self._conversions: dict[int, _Converted] = {}

    @property
    def bytes_read(self) -> int:
        return self._transfer.bytes_read

    def outgoing(self, spelled: Callable[[str], str] = str) -> list[Outgoing]:
        """The tensors in the order of the plan; ``spelled`` is what a key is called outside.

        Their ``fill`` raises:
            PlanError: stored duplicates of the same elements differ.
            BioinitError: reading failed.
        """
        return [
            Outgoing(spelled(key), planned.claim.shape, planned.dtype, self._filling(key, planned))
            for key, planned in self._plan.targets.items()
        ]

    def _filling(self, key: str, planned: TargetPlan) -> Callable[[int, torch.Tensor], None]:
        if planned.conversion is not None:
            return self._converted(key, planned)
        copies = _Ordered(planned.copies)
        equal = [(name, _Ordered(further)) for name, further in planned.equal]
        is_narrowed = any(_range(copy.dtype) > _range(planned.dtype) for copy in planned.copies)

        def fill(first: int, memory: torch.Tensor) -> None:
            if planned.padded:
                memory.zero_()
            staging = self._staging()
            self._transfer.move_here(copies.jobs(first, memory), staging)
            if is_narrowed and not bool(torch.isfinite(memory.float()).all()):
                raise_for([_too_large(key, planned)], "converting found")
            for name, further in equal:
                if not self._transfer.same(further.jobs(first, memory), staging):
                    raise_for([_unequal(key, planned.claim.sources, name)], "converting found")

        return fill

    def _converted(self, key: str, planned: TargetPlan) -> Callable[[int, torch.Tensor], None]:
        conversion = planned.conversion
        assert conversion is not None
        made = self._conversions.setdefault(
            id(conversion), _Converted(conversion, self._stored, self._transfer)
        )
        made.expect(key, planned.claim.shape)

        def fill(first: int, memory: torch.Tensor) -> None:
            with torch.no_grad():
                memory.copy_(made.part(key, first, memory.numel(), self._staging()))

        return fill

    def _staging(self) -> Staging:
        known: Staging | None = getattr(self._of_thread, "staging", None)
        if known is None:
            known = self._of_thread.staging = Staging(torch.device("cpu"))
        return known


class _Ordered:
    """Copies by where they begin in the target, so that those of a stretch are found."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = sorted(copies, key=lambda copy: copy.overlap.target_start)
        self._begins = [copy.overlap.target_start for copy in self._copies]
        # Views may interleave: up to here, no copy reaches further than this.
        self._reach = list(accumulate(map(_end, self._copies), max))

    def jobs(self, first: int, memory: torch.Tensor) -> Iterator[Job]:
        """The copies of the stretch from ``first`` on, with targets counted from there."""
        last = first + memory.numel()
        low, high = bisect_right(self._reach, first), bisect_left(self._begins, last)
        for copy in self._copies[low:high]:
            for part in restrict(copy.overlap, first, last):
                moved = part._replace(target_start=part.target_start - first)
                yield Job(copy._replace(overlap=moved), memory)


class _Converted:
    """What one conversion makes, from the first request on until all of it was handed out."""

    def __init__(
        self, conversion: Conversion, stored: Mapping[str, StoredTensor], transfer: Transfer
    ) -> None:
        self._conversion, self._stored, self._transfer = conversion, stored, transfer
        self._shapes: dict[str, Dims] = {}
        self._left = 0
        self._made: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def expect(self, key: str, shape: Dims) -> None:
        self._shapes[key] = shape
        self._left += numel(shape)

    def part(self, key: str, first: int, count: int, staging: Staging) -> torch.Tensor:
        with self._lock:
            if not self._made:
                self._make(staging)
            found = self._made[key][first : first + count]
            self._left -= count
            if self._left <= 0:
                self._made = {}
        return found

    def _make(self, staging: Staging) -> None:
        inputs = []
        jobs: list[Job] = []
        for name in self._conversion.sources:
            tensor = self._stored[name]
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
            jobs.extend(Job(copy, whole) for copy in whole_copies(tensor))
            inputs.append(whole)
        self._transfer.move_here(jobs, staging)
        made = self._conversion.convert(inputs)
        for key, shape in self._shapes.items():
            result = made.get(key)
            if result is None or tuple(result.shape) != shape:
                what = "nothing" if result is None else tuple(result.shape)
                text = f"{self._conversion.text} made {what} for {key!r}, which is {shape}."
                cure = "Correct the transform, or the field of the config that sizes it."
                raise_for([Problem("mismatch", key, text, cure)], "converting found")
            else:
                self._made[key] = result.reshape(-1)


def _end(copy: Copy) -> int:
    overlap = copy.overlap
    if not numel(overlap.sizes):
        return overlap.target_start
    steps = zip(overlap.sizes, overlap.target_strides, strict=True)
    return overlap.target_start + 1 + sum((size - 1) * stride for size, stride in steps)


def _range(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max if dtype.is_floating_point else 0.0


def _too_large(key: str, planned: TargetPlan) -> Problem:
    return Problem(
        "nonfinite",
        key,
        f"{key!r} holds values that {planned.dtype} cannot ({planned.claim.cast}), or that are not "
        "finite.",
        "Keep the dtype, or take bfloat16, which reaches as far as float32.",
    )


def _unequal(key: str, sources: Sequence[str], name: str) -> Problem:
    return Problem(
        "unequal",
        key,
        f"{key!r} is stored more than once and the copies differ: "
        f"{', '.join(map(repr, sources))} and {name!r}.",
        "Correct the field of the config that ties them, or remove one of them from the source.",
    )
