"""One line of a conversion: which names it takes and makes, and the function between them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

from bioinit.compat.nemo.io.state.context import TransformCTX
from bioinit.compat.nemo.io.state.pairing import Call, TransformError, pair, spreads

_log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

SourceKey = str | tuple[str, ...] | dict[str, str]
TargetKey = str | tuple[str, ...]


def _default_transform(inp: Any) -> Any:
    """The same tensor: what a mapping does."""
    return inp


class StateDictTransform(Generic[F]):
    """A function with the names that it takes and makes.

    Stands in for ``nemo.lightning.io.state.StateDictTransform``. In a key ``*`` stands for what has
    no dot, ``**`` for anything; every other character for itself, where the original lets regular
    expressions through.

    - One source, one target: a call per name. If the source has a wildcard more than the target,
      all that it caught are the arguments of one call; if the target has one more, the function
      returns a sequence.
    - Several sources (a tuple by position, a dict by parameter), one target: a call takes one
      name of each.
    - One source, several targets: the function returns one value for each.

    Several sources with several targets are an error; the original loses what the function made.

    Args:
        source_key: a pattern; a tuple of them; or a dict from parameter to pattern.
        target_key: a pattern, or a tuple of them.
        transform: gets the tensors, and the context if one of its parameters is named ``ctx``,
            wherever that stands. Parameters with a default may stay without a source.
    """

    def __init__(
        self,
        source_key: SourceKey,
        target_key: TargetKey,
        transform: F = _default_transform,  # type: ignore[assignment]
    ) -> None:
        self.source_key = source_key
        self.target_key = target_key
        self.transform = transform

    def __call__(self, ctx: TransformCTX) -> TransformCTX:
        """Make the targets, in ``ctx.target_state``, which is given back.

        Raises:
            TransformError: a key matches nothing, or the function takes or gives another number.
            UnpairedNames: a name has no partner on the other side.
        """
        sources, targets = self._patterns()
        calls = pair(
            self._line,
            sources,
            targets,
            [name for name in ctx.source_state if isinstance(name, str)],
            [name for name in ctx.target_state if isinstance(name, str)],
        )
        if not calls:
            _log.warning("No matches found for source key or target key: %s", self._line)
        several = not isinstance(self.target_key, str)
        spread = several or any(spreads(text, (*sources, *targets)) for text in targets)
        if calls and (several or not isinstance(self.source_key, str)):
            self._check_even((*sources, *targets))
        for call in calls:
            result = self._call(ctx, call)
            names = [name for given in call.targets for name in given]
            values = self._several(result, names) if spread else [result]
            for name, value in zip(names, values, strict=True):
                if value is None:
                    raise TransformError(
                        f"{self._line}: the function gives None for {name!r}. Return its value."
                    )
                ctx.target_state[name] = value
        return ctx

    @property
    def _line(self) -> str:
        return f"{self.source_key} -> {self.target_key}"

    def _patterns(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        source, target = self.source_key, self.target_key
        if not isinstance(target, str | tuple | list):
            raise TransformError(
                "Target key must be a string or a tuple of strings. It is a "
                f"{type(target).__name__}: {target!r}. Write one pattern for each tensor made."
            )
        if not isinstance(source, str) and not isinstance(target, str):
            raise TransformError(
                f"{self._line}: several source keys with several target keys. Write a line for "
                "each target; each may take all the sources."
            )
        if isinstance(source, dict):
            source = tuple(source.values())
        return (
            (source,) if isinstance(source, str) else tuple(source),
            (target,) if isinstance(target, str) else tuple(target),
        )

    def _check_even(self, patterns: Sequence[str]) -> None:
        """Where a side has several patterns, nothing may be spread over one call."""
        odd = next((text for text in patterns if spreads(text, patterns)), None)
        if odd is not None:
            raise TransformError(
                f"{self._line}: {odd!r} has a wildcard more than the others, and one call takes or "
                "makes one name of each. Give all the same wildcards."
            )

    def _call(self, ctx: TransformCTX, call: Call) -> Any:
        """The function on the tensors of ``call``."""
        tensors = [ctx.source_state[name] for given in call.sources for name in given]
        names = [list(given) if given[1:] else given[0] for given in call.sources]
        about = f"Mismatch between source and target keys: {names} vs {list(call.targets)}"
        if isinstance(self.source_key, dict):
            arguments: tuple[list[Any], dict[str, Any]] = (
                [],
                dict(zip(self.source_key, tensors, strict=True)),
            )
        else:
            arguments = (tensors, {})
        bound = self._bound(ctx, *arguments, about=about)
        try:
            return self.transform(*bound[0], **bound[1])
        except Exception as error:
            error.add_note(f"in the transform {self._line}, for {names}")
            raise

    def _several(self, result: Any, names: Sequence[str]) -> list[Any]:
        """One value for each of ``names``."""
        try:
            count = len(result)
        except TypeError:
            count = None
        if isinstance(result, Mapping | str) or count != len(names):
            raise TransformError(
                f"{self._line}: the function gives "
                f"{f'a {type(result).__name__}' if count is None else count} where {len(names)} "
                f"values are wanted, for {', '.join(map(repr, names[:4]))}"
                f"{', ...' if names[4:] else ''}. Return one for each, in this order."
            )
        return list(result)

    def call_transform(self, ctx: TransformCTX, *args: Any, **kwargs: Any) -> Any:
        """The function on ``args`` and ``kwargs``, and on ``ctx`` if it has such a parameter.

        Raises:
            TransformError: it does not take that many.
        """
        positional, keyword = self._bound(ctx, list(args), kwargs)
        return self.transform(*positional, **keyword)

    def _bound(
        self, ctx: TransformCTX, values: list[Any], named: dict[str, Any], about: str = ""
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What to call the function with."""
        try:
            signature = inspect.signature(self.transform)
        except (TypeError, ValueError):
            return tuple(values), named  # a builtin, which checks for itself
        left, by_name = list(values), dict(named)
        found: dict[str, Any] = {}
        lacking = False
        for name, parameter in signature.parameters.items():
            if name == "ctx":
                found[name] = ctx
            elif parameter.kind is parameter.VAR_POSITIONAL:
                found[name], left = tuple(left), []
            elif parameter.kind is parameter.VAR_KEYWORD:
                found[name], by_name = by_name, {}
            elif name in by_name:
                found[name] = by_name.pop(name)
            elif left:
                found[name] = left.pop(0)
            else:
                lacking = lacking or parameter.default is parameter.empty
        if lacking or left or by_name:
            wanted = [name for name in signature.parameters if name != "ctx"]
            given = len(values) + len(named)
            names = f" ({', '.join(map(repr, named))})" if named else ""
            raise TransformError(
                f"Expected {len(wanted)} arguments for the transformation function, but got "
                f"{given}{names}. It takes {signature}. {f'{about}. ' if about else ''}Give it a "
                "parameter for each source, or correct the source key."
            )
        arguments = inspect.BoundArguments(signature, found)
        return arguments.args, arguments.kwargs


@overload
def state_transform(
    source_key: SourceKey, target_key: TargetKey
) -> Callable[[F], StateDictTransform[F]]: ...


@overload
def state_transform(
    source_key: SourceKey, target_key: TargetKey, fn: F
) -> StateDictTransform[F]: ...


def state_transform(
    source_key: SourceKey, target_key: TargetKey, fn: F | None = None
) -> Callable[[F], StateDictTransform[F]] | StateDictTransform[F]:
    """Make a function a :class:`StateDictTransform`: ``nemo.lightning.io.state.state_transform``.

    A decorator, or, with ``fn``, the transform itself.

    >>> @state_transform(source_key="layers.*.w", target_key="blocks.*.weight")
    ... def double(w):
    ...     return 2 * w
    >>> double(TransformCTX(None, {"layers.7.w": 1}, None, {"blocks.7.weight": 0})).target_state
    {'blocks.7.weight': 2}
    """
    if fn is None:
        return lambda function: StateDictTransform(source_key, target_key, function)
    return StateDictTransform(source_key, target_key, fn)
