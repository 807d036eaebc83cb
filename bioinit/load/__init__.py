"""The only room that writes into a model.

Order of work: every parameter and buffer on meta gets memory in its final dtype on its final
device; the architecture's initializer gives values to whatever the plan does not load; then bytes
are read in parallel straight into place. If anything fails, a module that was on meta is on meta
again, and for one that had memory of its own the error names the parameters that no longer hold
what they held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from bioinit import collector
from bioinit.backends.protocol import Backend
from bioinit.config import InitPolicy
from bioinit.errors import Problem
from bioinit.formats.protocol import StoredTensor
from bioinit.layout import fold, row_major
from bioinit.load.exchange import NOBODY, heeding, shared
from bioinit.load.initial import Watching, own_random_state, reset_parameters
from bioinit.load.parameters import FullySharded, counted, is_finite, put, set_requires_grad
from bioinit.load.transfer import Job, Progress, Transfer
from bioinit.load.twin import New, initialize_divided, knows, undivided
from bioinit.mapping import Conversion
from bioinit.plan import Copy, LoadPlan
from bioinit.ranks import ALONE, World
from bioinit.report import LoadReport, raise_for
from bioinit.storage import File, worker_count
from bioinit.targets import Slot, Target, is_divided, local, slots

__all__ = ["execute", "reset_parameters"]


def execute(
    plan: LoadPlan,
    module: nn.Module,
    files: Sequence[File],
    tensors: Mapping[str, StoredTensor],
    *,
    backend: Backend,
    make: Callable[[], nn.Module],
    init: InitPolicy,
    device: torch.device,
    progress: Progress | None = None,
    world: World = ALONE,
    make_whole: Callable[[], nn.Module] | None = None,
    parallel: bool = False,
) -> LoadReport:
    """Carry out ``plan`` on ``module``, in place.

    Args:
        plan: a plan without problems, made for this module.
        module: on meta, or with memory of its own; what is on meta gets memory on ``device``.
        files: the checkpoint's files, as the plan numbers them.
        tensors: the checkpoint's tensors, by stored name.
        backend: who initializes what is new.
        make: the constructor of ``module``, for backends that need a second instance.
        init: the seed, what is trainable, and whether to look for NaN and Inf.
        device: where parameters that are on meta now will live.
        progress: is told the bytes as they arrive.
        world: the ranks that load this model together.
        make_whole: builds the model once more, undivided and on meta, for the first values of what
            is divided; None if there is no constructor.
        parallel: whether ranks that hold the same share the reading (see ``exchange``).

    Raises:
        PlanError: what only loading could find: stored duplicates that differ, values that are not
            finite, tensors that no initializer wrote.
        BioinitError: reading failed. For the state of ``module`` see the docstring of this room.
    """
    started = time.perf_counter()
    work = _Load(plan, module, device)
    try:
        with collector.paused():
            work.materialize()
        problems = work.initialize(backend, make, make_whole, init.seed)
        if parallel and world.size > 1:
            work.share_reading(world)
        transfer = Transfer(files, worker_count(), device, heeding(world, progress))
        work.fill(transfer, tensors)
        _synchronize(device)
        problems += work.compare(transfer)
        work.exchange.carry_out(device)
        _synchronize(device)
        if init.check_finite:
            problems += work.check_finite()
        raise_for(problems, "loading found")
        set_requires_grad(work.by_key(), init)
        # All ranks meet here once more: what one of them found wrong is wrong for all.
        trainable, parameters = counted(work.by_key(), plan.described, world)
        work.adopt()
    except BaseException as error:
        work.restore(error)
        raise
    return LoadReport(
        claims=plan.tensors,
        unused=plan.unused,
        problems=plan.problems,
        bytes_read=transfer.bytes_read,
        seconds=time.perf_counter() - started,
        trainable=trainable,
        parameters=parameters,
        document=plan.to_json,
        remarks=tuple(dict.fromkeys(remark for file in files for remark in file.remarks)),
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Load:
    """One execution of a plan: what was there before, and what is there now."""

    def __init__(self, plan: LoadPlan, module: nn.Module, device: torch.device) -> None:
        self.plan, self.module, self.device = plan, module, device
        self.live: dict[str, torch.Tensor] = {}
        """By the names that this process has for them."""
        self._keys = {t.live: key for key, t in plan.described.items() if t.live}
        self._sharded = FullySharded(module)
        self._before: list[tuple[Slot, torch.Tensor]] = []
        self._made: set[str] = set()
        self._touched: list[str] = []
        self._trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        self.exchange = NOBODY

    def key(self, slot: str) -> str:
        """What the whole model calls the tensor that is ``slot`` in this process."""
        return self._keys.get(slot, slot)

    def held(self, key: str) -> torch.Tensor:
        """The local memory of the target ``key``."""
        return local(self.live[self.plan.described[key].slot]).detach()

    def by_key(self) -> dict[str, torch.Tensor]:
        """The live tensors by the names of the whole model."""
        return {self.key(slot): tensor for slot, tensor in self.live.items()}

    def share_reading(self, world: World) -> None:
        """Leave a part of what is read to the ranks that hold the same."""
        memory = {key: self.held(key) for key in self.plan.targets}
        self.exchange = shared(self.plan.targets, self.plan.described, memory, world)

    def materialize(self) -> None:
        """Give memory to what has none, once; shared tensors stay shared."""
        made: dict[int, torch.Tensor] = {}
        found = list(slots(self.module))
        is_placed = any(slot.tensor.is_meta for slot in found)
        for slot in found:
            tensor = slot.tensor
            if tensor.is_meta:
                known = made.get(id(tensor))
                if known is None:
                    planned = self.plan.targets.get(self.key(slot.key))
                    dtype = tensor.dtype if planned is None else planned.dtype
                    known = self._sharded.make(tensor, dtype, self.device)
                    made[id(tensor)] = known
                    self._made.add(slot.key)
                self._put(slot, known)
                tensor = known
            elif slot.is_buffer and tensor.device.type != self.device.type and is_placed:
                tensor = made.setdefault(id(tensor), tensor.to(self.device))
                self._put(slot, tensor)
            self.live.setdefault(slot.key, tensor)

    def _put(self, slot: Slot, tensor: torch.Tensor) -> None:
        self._before.append((slot, slot.tensor))
        put(slot, tensor)

    def initialize(
        self,
        backend: Backend,
        make: Callable[[], nn.Module],
        make_whole: Callable[[], nn.Module] | None,
        seed: int,
    ) -> list[Problem]:
        """Run the architecture's initializer for what the plan does not load in full."""
        new = {slot for slot in self._made if self._is_new(slot)}
        divided = {slot for slot in new if is_divided(self.live[slot])}
        written: set[str] = set()
        if new - divided:
            written |= self._initialize(new - divided, backend, make, seed)
        if divided:
            wholes = {
                slot: New(tuple(tensor.shape), tensor.dtype)
                for slot, tensor in self.live.items()
                if slot in divided
            }
            with own_random_state(self.device):
                whole = None if make_whole is None else make_whole()
            # What divided the model may have renamed what is in it.
            if whole is None or not knows(whole, wholes):
                whole = undivided(self.module)
            written |= initialize_divided(
                wholes,
                self.live.keys() - new,
                whole,
                lambda slot, value: self._put_in(self.plan.described[self.key(slot)], value),
                backend=backend,
                make=make,
                seed=seed,
                device=self.device,
            )
        return [
            Problem(
                "uninitialized",
                slot,
                f"nothing gives {slot!r} its first value: the checkpoint does not have it, and no "
                "initializer of the architecture wrote it.",
                "Give its module a reset_parameters(), or load it.",
            )
            for slot in sorted(new - written)
            if self.live[slot].numel()
        ]

    def _initialize(
        self, new: set[str], backend: Backend, make: Callable[[], nn.Module], seed: int
    ) -> set[str]:
        """Where the tensors lie; which of them got a value is returned."""
        loaded = frozenset(self.live) - new
        watch = Watching(self.live, loaded, seed, self.key)
        with torch.no_grad(), own_random_state(self.device), watch:
            values = backend.initialize(self.module, make, loaded, watch)
        with torch.no_grad():
            for slot, value in values.items():
                if slot in new:
                    self.live[slot].copy_(value)
                    watch.written.add(slot)
        return watch.written

    def _is_new(self, slot: str) -> bool:
        planned = self.plan.targets.get(self.key(slot))
        return planned is None or planned.needs_init

    def fill(self, transfer: Transfer, stored: Mapping[str, StoredTensor]) -> None:
        """Read everything the plan loads."""
        with collector.paused():
            converted = self._fill_runs(transfer)
        for conversion, keys in converted:
            self._touched.extend(keys)
            if any(map(self.exchange.reads, keys)):
                self._convert(conversion, keys, transfer, stored)

    def _fill_runs(self, transfer: Transfer) -> list[tuple[Conversion, list[str]]]:
        """Move everything that is a move; conversions are given back, with what they are for."""
        jobs: list[Job] = []
        converted: dict[int, tuple[Conversion, list[str]]] = {}
        for key, planned in self.plan.targets.items():
            if planned.conversion is not None:
                known = converted.setdefault(id(planned.conversion), (planned.conversion, []))
                known[1].append(key)
            elif planned.copies or planned.padded:
                self._touched.append(key)
                tensor = self.held(key)
                # Whatever lies in no box is padding of the layout in this process.
                if planned.padded or self.plan.described[key].held < tensor.numel():
                    tensor.zero_()
                mine = self.exchange.mine(key, planned.copies)
                jobs.extend(Job(copy, tensor) for copy in mine)
        transfer.move(jobs)
        return list(converted.values())

    def _convert(
        self,
        conversion: Conversion,
        keys: Sequence[str],
        transfer: Transfer,
        stored: Mapping[str, StoredTensor],
    ) -> None:
        inputs = []
        jobs: list[Job] = []
        for name in conversion.sources:
            tensor = stored[name]
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
            jobs.extend(Job(copy, whole) for copy in whole_copies(tensor))
            inputs.append(whole)
        transfer.move(jobs)
        made = conversion.convert(inputs)
        for key in keys:
            target, result = self.plan.described[key], made.get(key)
            # The plan foresees this but for operations that read values.
            if result is None or result.shape != target.shape:
                what = "nothing" if result is None else tuple(result.shape)
                problem = Problem(
                    "mismatch",
                    key,
                    f"{conversion.text} made {what} for {key!r}, which is {target.shape}.",
                    "Skip the tensor by its prefix, or report the architecture.",
                )
                raise_for([problem], "loading found")
            else:
                self._put_in(target, result)

    def _put_in(self, target: Target, whole: torch.Tensor) -> None:
        """Copy what lies here of ``target`` out of the whole of it."""
        tensor = self.held(target.key)
        start = tensor.storage_offset()
        for offsets, sizes, first, strides in target.boxes:
            part = whole[tuple(map(slice, offsets, map(int.__add__, offsets, sizes)))]
            tensor.as_strided(sizes, strides, start + first).copy_(part)

    def compare(self, transfer: Transfer) -> list[Problem]:
        """Hold further stored copies of a target against what was loaded."""
        found = []
        for key, planned in self.plan.targets.items():
            for name, copies in planned.equal:
                tensor = self.held(key)
                mine = self.exchange.mine(key, copies)
                if not transfer.same(Job(copy, tensor) for copy in mine):
                    found.append(
                        Problem(
                            "unequal",
                            key,
                            f"{key!r} is stored more than once and the copies differ: "
                            f"{', '.join(map(repr, planned.claim.sources))} and {name!r}.",
                            "Untie them in the config (tie_word_embeddings), or skip one of them "
                            "by its prefix.",
                        )
                    )
        return found

    def check_finite(self) -> list[Problem]:
        """Look for NaN and Inf in everything that was loaded."""
        return [
            Problem(
                "nonfinite",
                key,
                f"{key!r}, loaded from {', '.join(map(repr, self.plan.targets[key].claim.sources))}"
                ", holds NaN or Inf.",
                "Mend the checkpoint, skip its prefix, or set init.check_finite=false.",
            )
            for key in self._touched
            if not is_finite(self.held(key))
        ]

    def adopt(self) -> None:
        """Let whoever divided the module know of its memory."""
        self._sharded.adopt()

    def restore(self, error: BaseException) -> None:
        """Put back what was on meta; say of the rest which parameters are not as they were."""
        for slot, tensor in reversed(self._before):
            put(slot, tensor)
        for parameter, is_trained in self._trained:
            parameter.requires_grad_(is_trained)
        made = set(map(self.key, self._made))
        changed = [key for key in self._touched if key not in made]
        if changed:
            shown = ", ".join(changed[:5]) + (
                f" and {len(changed) - 5} more" if changed[5:] else ""
            )
            error.add_note(
                f"The module is not as it was: {len(changed)} parameters may hold a part of the "
                f"checkpoint ({shown}). Load it again before it is used."
            )


def whole_copies(tensor: StoredTensor) -> list[Copy]:
    """The copies that fill a contiguous tensor of the stored shape."""
    strides = row_major(tensor.shape)
    found = []
    for piece in tensor.pieces:
        box = piece.box
        start = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
        overlap = fold(box.sizes, box.start, box.strides, start, strides)
        found.append(Copy(piece.file, piece.offset, tensor.dtype, overlap))
    return found
