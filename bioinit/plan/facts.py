"""What a plan is made of: copies, one decision per target, and the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from bioinit.errors import Problem
from bioinit.layout import Overlap, numel
from bioinit.mapping import Conversion
from bioinit.report import Claim, Unused, human_bytes, printable, summary
from bioinit.targets import Target

DtypeRule = torch.dtype | Literal["stored", "module"]
"""What a parameter is materialized as: one dtype, each tensor's stored one, or the module's own."""

STAGING_BYTES = 4 * 2**20
"""One worker's reusable buffer for casts and strided copies; also part of a plan's peak memory."""


class Copy(NamedTuple):
    """Move ``overlap`` from file number ``file`` into a target.

    ``offset`` is the byte of the file where element 0 of the source view lies; starts and strides
    of ``overlap`` count elements, of ``dtype`` on the source side and of the final dtype on the
    target's. ``add`` is added to every element, in float32.
    """

    file: int
    offset: int
    dtype: torch.dtype
    overlap: Overlap
    add: float = 0.0

    @property
    def bytes(self) -> int:
        """Bytes of the elements that are copied, in the file."""
        return numel(self.overlap.sizes) * self.dtype.itemsize

    def is_run(self, final: torch.dtype) -> bool:
        """Whether it is one stretch of bytes on both sides, read into place as it is."""
        overlap = self.overlap
        return (
            self.dtype == final
            and not self.add
            and (
                not overlap.sizes
                or (overlap.source_strides == (1,) and overlap.target_strides == (1,))
            )
        )


class TargetPlan(NamedTuple):
    """What is done for one target that owns memory.

    ``dtype`` is the final one. ``copies`` fill what lies of it in local memory; ``equal`` are
    further stored copies of the same elements, which must be byte-equal. ``needs_init`` is True
    where the checkpoint leaves elements of it out, and ``padded`` where ``copies`` do and what they
    leave out is zero.
    """

    claim: Claim
    dtype: torch.dtype
    copies: tuple[Copy, ...] = ()
    equal: tuple[tuple[str, tuple[Copy, ...]], ...] = ()
    conversion: Conversion | None = None
    needs_init: bool = False
    padded: bool = False

    def all_copies(self) -> Iterator[Copy]:
        yield from self.copies
        for _, copies in self.equal:
            yield from copies


@dataclass(frozen=True)
class LoadPlan:
    """The whole decision, made without reading a weight byte. Printable, and JSON."""

    targets: Mapping[str, TargetPlan]
    """By key, for every persistent target that owns memory (tied names own none)."""
    tensors: tuple[Claim, ...]
    """One claim per key of the state dict, tied names included, in state-dict order."""
    unused: tuple[Unused, ...]
    problems: tuple[Problem, ...]
    hits: Mapping[str, int]
    """How many targets and stored keys each skip prefix matched."""
    bytes_by_file: Mapping[int, int]
    memory_parameters: int
    """Bytes of what lies of all targets in local memory, in their final dtypes."""
    memory_peak: int
    """``memory_parameters`` and the buffers of the workers."""
    notes: tuple[str, ...] = ()
    fields: tuple[Any, ...] = ()
    """One decision per config field (see ``merge``); empty for ``load_weights``."""
    files: tuple[str, ...] = ()
    """Paths of the checkpoint's files, as ``bytes_by_file`` numbers them."""
    header: Callable[[], Mapping[str, Any]] = dict
    """What the JSON says of the checkpoint; a function, for its digest takes a while."""
    seconds: float = 0.0
    """How long planning took, opening the checkpoint and building on meta included."""
    described: Mapping[str, Target] = field(default_factory=dict)
    """All targets by key, those that ``targets`` says nothing of included."""

    def __repr__(self) -> str:
        return (
            f"<LoadPlan: {summary(self.tensors)}; {len(self.problems)} problems, "
            f"{human_bytes(self.bytes_to_read)} to read>"
        )

    @property
    def bytes_to_read(self) -> int:
        return sum(self.bytes_by_file.values())

    def to_json(self) -> dict[str, Any]:
        """The document that ``bioinit plan --json`` prints."""
        from bioinit.plan.present import document

        return document(self)

    def render(self) -> str:
        """Lines for a person, equal facts and unbroken ranges folded."""
        from bioinit.plan.present import lines

        return "\n".join(map(printable, lines(self)))


def _nothing_pinned(key: str) -> torch.dtype | None:
    return None


def _nothing_computed(key: str) -> bool:
    return False


@dataclass(frozen=True)
class Model:
    """The live model's side of planning: its targets, and what its architecture knows of a key."""

    targets: Mapping[str, Target]
    describe_init: Callable[[str], str]
    """The name of the initializer of a key."""
    pinned_dtype: Callable[[str], torch.dtype | None] = _nothing_pinned
    """The dtype that the architecture insists on for a key, or None."""
    computed: Callable[[str], bool] = _nothing_computed
    """Whether the architecture gives this buffer its value when the checkpoint lacks it."""
    vocab_keys: Collection[str] = ()
    """Keys whose rows may differ under ``init.on_mismatch=resize``."""
