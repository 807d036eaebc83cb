"""One parameter out of what the partitions of tensor parallelism hold of it.

The arithmetic is that of the originals on their good input, to the bit: concatenation, the sum in
the stored dtype, the mean of copies that are alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from bioinit.errors import CheckpointError, ConfigError, CorruptCheckpoint
from bioinit.keys import suggestion
from bioinit.load.parameters import overwrite

How = Literal["dim_0", "dim_1", "duplicate", "sum"]
Partition = Mapping[str, torch.Tensor]

TOLERANCE = 1e-4
"""Copies may differ by less than this, as the sum over their elements of the squared difference."""

_DIMS = {"dim_0": 0, "dim_1": 1}


class MissingKey(CheckpointError, KeyError):
    """A partition lacks a tensor."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class PartitionsDiffer(CorruptCheckpoint, AssertionError):
    """What should be the same in every partition is not."""


class WrongShape(ConfigError, RuntimeError):
    """The partitions do not give what the parameter holds."""


def merge_params_dim_0(
    param: torch.Tensor, key: str, p1: Partition, p2: Partition, *more: Partition
) -> None:
    """Put the partitions of ``key`` into ``param``, one below the other.

    Stands in for ``labml_nn.neox.checkpoint.merge_params_dim_0``. There may be more than two
    partitions, and all dims are held against those of ``param``: the original broadcast what was
    too small, and filled the rest with the wrong rows where a partition had another size.

    Args:
        param: a parameter with memory; it keeps its dtype and device.
        key: the name in the files.
        p1: what the first partition holds, by name.
        p2: what the second one holds.
        *more: the others, in order.

    Raises:
        MissingKey: a partition has no such tensor.
        WrongShape: together they are not of the shape of ``param``.
    """
    put(param, key, "dim_0", (p1, p2, *more))


def merge_params_dim_1(
    param: torch.Tensor, key: str, p1: Partition, p2: Partition, *more: Partition
) -> None:
    """Put the partitions of ``key`` into ``param``, side by side.

    Stands in for ``labml_nn.neox.checkpoint.merge_params_dim_1``; arguments, errors and differences
    are those of :func:`merge_params_dim_0`.
    """
    put(param, key, "dim_1", (p1, p2, *more))


def merge_params_duplicate(
    param: torch.Tensor, key: str, p1: Partition, p2: Partition, *more: Partition
) -> None:
    """Put ``key``, of which every partition has a copy, into ``param``; copies give their mean.

    Stands in for ``labml_nn.neox.checkpoint.merge_params_duplicate``. Tensors of any number of dims
    are taken, differences are counted in float64 instead of the stored dtype, and partitions that
    do not match are an error with ``python -O`` too.

    Raises:
        PartitionsDiffer: the squared differences of two copies add up to 1e-4 or more.
        MissingKey: a partition has no such tensor.
        WrongShape: a copy is not of the shape of ``param``.
    """
    put(param, key, "duplicate", (p1, p2, *more))


def merge_params_sum(
    param: torch.Tensor, key: str, p1: Partition, p2: Partition, *more: Partition
) -> None:
    """Put the sum of what the partitions hold of ``key`` into ``param``.

    Stands in for ``labml_nn.neox.checkpoint.merge_params_sum``; arguments, errors and differences
    are those of :func:`merge_params_dim_0`. Biases of row-parallel layers are such summands where
    attention and MLP are reduced together, as in the 20B model.
    """
    put(param, key, "sum", (p1, p2, *more))


def put(param: torch.Tensor, key: str, how: How, partitions: Sequence[Partition]) -> None:
    """Merge ``key`` of all ``partitions``, of which there may be one, into ``param``."""
    parts = _parts(key, partitions)
    shape = _shape(key, how, parts)
    if tuple(param.shape) != shape:
        raise WrongShape(
            f"{len(parts)} partitions of {key!r}, {_shapes(parts)}, give {list(shape)}, but the "
            f"parameter has {list(param.shape)}. Check the sizes that the model was made with, and "
            "that the files of all partitions were given."
        )
    overwrite(param, _merged(key, how, parts))


def merged(key: str, how: How, partitions: Sequence[Partition]) -> torch.Tensor:
    """``key`` of all ``partitions`` as one new tensor of the stored dtype."""
    parts = _parts(key, partitions)
    _shape(key, how, parts)
    return _merged(key, how, parts)


def _parts(key: str, partitions: Sequence[Partition]) -> list[torch.Tensor]:
    for number, partition in enumerate(partitions):
        if key not in partition:
            raise MissingKey(
                f"partition {number} of {len(partitions)} holds no tensor {key!r}. Check that the "
                f"files are those of this layer. {suggestion(key, partition)}".rstrip()
            )
    parts = [partition[key] for partition in partitions]
    if len({part.dtype for part in parts}) > 1:
        raise WrongShape(
            f"the partitions of {key!r} have the dtypes {', '.join(str(p.dtype) for p in parts)}. "
            "They are of different checkpoints: fetch them again from one."
        )
    return parts


def _shape(key: str, how: How, parts: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """The shape of what ``parts`` give together."""
    first = tuple(parts[0].shape)
    dim = _DIMS.get(how)
    if dim is not None and len(first) <= dim:
        raise WrongShape(
            f"{key!r} has the shape {list(first)}, so it cannot be divided along dim {dim}. "
            "Check the kind of merge."
        )
    others = {tuple(n for at, n in enumerate(part.shape) if at != dim) for part in parts}
    if len(others) > 1:
        raise WrongShape(
            f"the partitions of {key!r} have the shapes {_shapes(parts)}, which do not go together"
            + ("." if dim is None else f" along dim {dim}.")
            + " Check that they are of one checkpoint."
        )
    if dim is None:
        return first
    return (*first[:dim], sum(part.shape[dim] for part in parts), *first[dim + 1 :])


def _merged(key: str, how: How, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if how == "sum":
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
    if how == "duplicate":
        return _mean(key, parts)
    return torch.cat(tuple(parts), dim=_DIMS[how])


def _mean(key: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    first = parts[0]
    if all(torch.equal(first, part) for part in parts[1:]):
        return first
    exact = [part.double() for part in parts]
    for number, part in enumerate(exact):
        for other in range(number):
            difference = float((part - exact[other]).square().sum())
            if not difference < TOLERANCE:  # so that NaN does not pass
                raise PartitionsDiffer(
                    f"The partitions do not match: {key}. The squared differences of partitions "
                    f"{other} and {number} add up to {difference:.3g}, and less than {TOLERANCE:g} "
                    "is taken for rounding. Check that the files were written together."
                )
    # A double is exact for the sum of a few narrower numbers, so this rounds once, as halving does.
    return (sum(exact[1:], exact[0]) / len(exact)).to(first.dtype)


def _shapes(parts: Sequence[torch.Tensor]) -> str:
    return " and ".join(str(list(part.shape)) for part in parts)
