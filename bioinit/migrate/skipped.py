"""Prefixes of Megatron's names, as prefixes of the names that a model of ours has.

BioNeMo leaves a parameter at its initial value if its name begins with the letters of a prefix, be
it in the middle of a word: ``encoder.layers.1`` means the layers 10 to 19 as well. Here a prefix
ends where a segment ends, and names are those of the live model. So a prefix is carried over by
what it hits: Megatron's names to the canonical tensors, and these to the names here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from bioinit.families.protocol import Family
from bioinit.layout import Box
from bioinit.targets import describe

_FUSED = re.compile(r"\.linear_[qkv]\.(weight|bias)$")
_INNER_NORMS = (
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
)
_WRAPPERS = ("module.", "model.")


def carried_over(
    prefixes: Iterable[str], family: Family, config: Any
) -> Mapping[str, tuple[str, ...]]:
    """For each of Megatron's prefixes, the prefixes here that hit the same; none where none does.

    Args:
        prefixes: as BioNeMo takes them, without ``module.``.
        family: of the model.
        config: of the model, whose layers are counted.
    """
    backend = family.backend(config)
    module = backend.build(lambda: family.build(config))
    targets = describe(module, backend.located(module))
    names = family.names(config, module, "nemo2", {})
    canonical: dict[str, list[str]] = {}
    for key, target in targets.items():
        if target.tied_to is not None:
            continue
        placed = names.memory.place(key, (Box.contiguous(target.shape),)) or ()
        canonical[key] = [place.key for place in placed]
    found = {}
    for prefix in prefixes:
        plain = next((prefix.removeprefix(w) for w in _WRAPPERS if prefix.startswith(w)), prefix)
        hit = {key for key, held in canonical.items() if any(_hits(plain, name) for name in held)}
        found[prefix] = tuple(_covering(hit, canonical))
    return found


def _hits(prefix: str, canonical: str) -> bool:
    """Whether a name of Megatron's for a canonical tensor begins with ``prefix``."""
    return any(name.startswith(prefix) for name in _spellings(canonical))


def _spellings(canonical: str) -> Iterable[str]:
    """What Megatron calls a canonical tensor; Transformer Engine keeps norms in the layer after."""
    yield _FUSED.sub(r".linear_qkv.\1", canonical)
    for apart, inner in _INNER_NORMS:
        if apart in canonical:
            yield canonical.replace(apart, inner)


def _covering(hit: Collection[str], names: Collection[str], at: str = "") -> list[str]:
    """The fewest prefixes of whole segments below ``at`` that are ``hit`` and nothing else."""
    below: dict[str, list[str]] = {}
    for name in names:
        segment = name[len(at) :].partition(".")[0]
        below.setdefault(f"{at}{segment}", []).append(name)
    found: list[str] = []
    for prefix, inside in below.items():
        hits = [name for name in inside if name in hit]
        if hits and len(hits) == len(inside):
            found.append(prefix)
        elif hits:
            found += _covering(hits, inside, f"{prefix}.")
    return found
