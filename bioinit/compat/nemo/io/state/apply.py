"""A whole conversion: a mapping and transforms from one model into another."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from bioinit.compat.nemo.io.state.context import TransformCTX
from bioinit.compat.nemo.io.state.transform import StateDictTransform
from bioinit.compat.nemo.io.state.watched import Read, Written
from bioinit.errors import ConfigError, PlanError, Problem
from bioinit.keys import suggestion
from bioinit.load.parameters import fill
from bioinit.report import printable
from bioinit.targets import Slot, describe, is_divided, slots

TargetT = TypeVar("TargetT", bound=nn.Module)


class ConversionError(PlanError):
    """What the transforms made does not fit the target; it is as it was. All in ``problems``."""


class DifferentShapes(ConversionError, ValueError):
    """A value has another shape than its parameter."""


class AdditionalKeys(ConversionError, RuntimeError):
    """A value is for no parameter of the target, or two are for one that is tied."""


class NotConverted(ConversionError, AssertionError):
    """A parameter got no value, or one of another dtype."""


_KINDS: tuple[tuple[str, type[ConversionError], str], ...] = (
    ("shape", DifferentShapes, "Shape mismatch"),
    ("unused", AdditionalKeys, "Additional keys: {keys} in checkpoint but not in model"),
    ("unequal", AdditionalKeys, "Additional keys: {keys} for parameters that are tied"),
    ("unclaimed", NotConverted, "Parameters of the target without a value"),
    ("meta", NotConverted, "There are meta tensors in the model after conversion"),
    ("dtype", NotConverted, "dtype mismatch between source and target state dicts"),
)
_IGNORE = "name it in state_dict_ignored_entries to leave it as it is"


@torch.no_grad()
def apply_transforms(
    source: Any,
    target: TargetT,
    mapping: Mapping[str, str],
    transforms: Iterable[Callable[[TransformCTX], Any]] | None = (),
    state_dict_ignored_entries: Sequence[str] | None = (),
    cast_dtype: torch.dtype | None = None,
) -> TargetT:
    """Fill ``target`` from ``source``: stands in for ``nemo.lightning.io.state.apply_transforms``.

    The lines of ``mapping`` come first, then ``transforms``, in their order; a later one may write
    over an earlier one. All is checked before the first parameter changes: what a function writes
    into tensors of ``target_state`` goes into copies. What has memory is
    filled where it lies, what is on meta gets memory of its own; parameters keep their ties,
    attributes and ``requires_grad``, buffers stay buffers, and nothing shares memory with the
    source. The original replaces parameters by new ones and loses all these. Tensors of the source
    that no line used are named in a warning of the log.

    Args:
        source: a module, or what else has ``state_dict()``. Of a wrapper around a module of
            megatron-core that module is meant, here and for ``target``.
        target: a module.
        mapping: patterns of the source by those of the target, as in :class:`StateDictTransform`.
        transforms: :class:`StateDictTransform`, or any function that takes the context and writes
            into its ``target_state``.
        state_dict_ignored_entries: names of the target that need no value, and whose values are
            not wanted where another name of the same parameter has one. The original leaves every
            parameter without a value as it was, silently; here it must be named.
        cast_dtype: what everything floating is cast to. Without it a parameter takes values of its
            own dtype only.

    Raises:
        TransformError: a line does not fit the names (a ``ValueError``).
        DifferentShapes: a value has another shape than its parameter (a ``ValueError``).
        AdditionalKeys: a value that nothing in the target takes (a ``RuntimeError``).
        NotConverted: a parameter without a value, on meta, or of another dtype (an
            ``AssertionError``).
    """
    giver, taker = _inner(source), _inner(target)
    _check_whole(taker)
    state = Written(taker.state_dict())
    given = Read(giver.state_dict())
    ctx = TransformCTX(giver, given, taker, state)
    for taken, made in mapping.items():
        StateDictTransform(taken, made)(ctx)
    for transform in transforms or ():
        returned = transform(ctx)
        ctx = returned if isinstance(returned, TransformCTX) else ctx
    ignored = frozenset(state_dict_ignored_entries or ())
    decided = _Decision(taker, state, ctx.target_state, ignored, cast_dtype)
    decided.raise_for_problems()
    given.warn_of_rest()
    values = decided.values
    state.clear()
    fill(taker, values, cast_dtype)
    if decided.on_meta:
        taker.tie_weights()
        _raise([_meta(key) for key, p in taker.named_parameters() if p.is_meta])
    return target


def _inner(model: Any) -> Any:
    """The module of megatron-core that ``model`` wraps, or ``model``."""
    # Whoever has such a module has imported its class.
    megatron = sys.modules.get("megatron.core.transformer.module")
    kind = getattr(megatron, "MegatronModule", None)
    inner = getattr(model, "module", None)
    return inner if kind is not None and isinstance(inner, kind) else model


def _check_whole(target: nn.Module) -> None:
    divided = next((slot.key for slot in slots(target) if is_divided(slot.tensor)), None)
    if divided is not None:
        raise ConfigError(
            f"{divided!r} is divided among processes (a DTensor), and transforms make whole "
            "tensors. Convert before the model is divided, or start it with bioinit.initialize."
        )


class _Decision:
    """Which parameter gets which value, and what speaks against it."""

    def __init__(
        self,
        target: nn.Module,
        written: Written,
        state: MutableMapping[str, Any],
        ignored: frozenset[str],
        cast: torch.dtype | None,
    ) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.on_meta = False
        self._problems: list[Problem] = []
        self._cast = cast
        live: dict[str, Slot] = {slot.key: slot for slot in slots(target)}
        tied: dict[str, list[str]] = {}
        for key, described in describe(target).items():
            tied.setdefault(described.tied_to or key, []).append(key)
        can_tie = callable(getattr(target, "tie_weights", None))
        for owner, keys in tied.items():
            said = [key for key in keys if written.has(key, state)]
            said = [key for key in said if key not in ignored] or said
            tensor = live[owner].tensor
            if said:
                self._take(owner, said, state, live[owner].is_buffer, tensor)
            elif live[owner].is_buffer:
                continue
            elif not ignored.intersection(keys):
                self._problems.append(_unclaimed(owner, tensor))
            elif tensor.is_meta and not can_tie:
                self._problems.append(_meta(owner))
            elif tensor.is_meta:
                self.on_meta = True
        for key in state:
            if key not in live and written.has(key, state) and key not in ignored:
                self._leave(key, live)

    def _problem(self, kind: str, key: str, message: str, cure: str) -> None:
        self._problems.append(Problem(kind, key, message, cure))

    def _leave(self, key: Any, live: Mapping[str, Slot]) -> None:
        """Something was made that no parameter or buffer takes."""
        if not isinstance(key, str) or key.endswith("_extra_state"):
            return
        cure = suggestion(key, live)
        self._problem(
            "unused",
            key,
            f"{key!r} was made, and no parameter or buffer of the target has that name.",
            f"{cure}{' ' if cure else ''}Correct the target key, or {_IGNORE}.",
        )

    def _take(
        self,
        owner: str,
        said: Sequence[str],
        state: Mapping[str, Any],
        is_buffer: bool,
        tensor: torch.Tensor,
    ) -> None:
        value = state[said[0]]
        for other in said[1:]:
            if not _same(value, state[other]):
                self._problem(
                    "unequal",
                    other,
                    f"{other!r} and {said[0]!r} are one parameter of the target, and get "
                    "different values.",
                    "Untie them in the target's config, or name one of them in "
                    "state_dict_ignored_entries.",
                )
        self.values[owner] = value
        what = "buffer" if is_buffer else "parameter"
        if not isinstance(value, torch.Tensor) or value.shape != tensor.shape:
            got = tuple(value.shape) if hasattr(value, "shape") else f"a {type(value).__name__}"
            self._problem(
                "shape",
                owner,
                f"Shape mismatch for {what} {said[0]}: target shape {tuple(tensor.shape)} vs "
                f"converted source shape {got}.",
                "Correct the transform, or the target's config.",
            )
        elif value.is_meta:
            self._problem(
                "meta",
                owner,
                f"{said[0]!r} was made from tensors on meta, which hold no numbers.",
                "Load the source before it is converted.",
            )
        elif not self._fits(value.dtype, tensor.dtype, is_buffer):
            self._problem(
                "dtype",
                owner,
                f"{what} {said[0]!r} is {tensor.dtype} in the target and gets {value.dtype}.",
                "Give cast_dtype, or cast one of the models before (.to(dtype)).",
            )

    def _fits(self, given: torch.dtype, held: torch.dtype, is_buffer: bool) -> bool:
        if self._cast is not None and given.is_floating_point == held.is_floating_point:
            return True
        # A buffer may get what its own dtype can hold; the original changes its dtype.
        return given == held or (is_buffer and torch.promote_types(given, held) == held)

    def raise_for_problems(self) -> None:
        """Raise for the first kind of problem there is, with all problems.

        Raises:
            ConversionError: there are problems.
        """
        _raise(self._problems)


def _raise(problems: Sequence[Problem], shown: int = 8) -> None:
    for kind, error, what in _KINDS:
        found = [problem for problem in problems if problem.kind == kind]
        if found:
            keys = [problem.key for problem in found]
            title = what.format(keys=f"{keys[:shown]}{' and more' if keys[shown:] else ''}")
            lines = [f"{title}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"]
            ordered = [*found, *(each for each in problems if each.kind != kind)]
            lines += [printable(f"  {problem}") for problem in ordered[:shown]]
            if ordered[shown:]:
                lines.append(f"  ... and {len(ordered) - shown} more in .problems")
            raise error("\n".join(lines), ordered)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; what only one device or none holds is compared as it is."""
    if one is other or not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return one is other
    if one.is_meta or other.is_meta:
        return one.is_meta and other.is_meta
    return torch.equal(one.cpu(), other.cpu()) if one.dtype == other.dtype else False


def _unclaimed(key: str, tensor: torch.Tensor) -> Problem:
    what = f"{key!r} {list(tensor.shape)} got no value from the mapping or the transforms"
    if tensor.is_meta:
        return Problem(
            "meta", key, f"{what}, and is on meta.", "Map it, or make it by a transform."
        )
    return Problem(
        "unclaimed",
        key,
        f"{what}; it would keep what it was initialized with.",
        f"Map it, make it by a transform, or {_IGNORE}.",
    )


def _meta(key: str) -> Problem:
    return Problem(
        "meta",
        key,
        f"{key!r} is ignored and on meta: it has no value and no memory.",
        "Map it, or tie it before the conversion.",
    )
