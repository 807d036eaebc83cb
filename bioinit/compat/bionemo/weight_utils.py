"""Weights of a checkpoint into a model, in place: stands in for ``bionemo.llm.utils.weight_utils``.

Bytes are moved by :func:`bioinit.load_weights`, so a checkpoint of any format and dialect that
bioinit reads will do, and a plan is made before anything is written: where something is missing or
does not fit, the model is as it was. What only the bytes show may come too late for that.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from bioinit.compat.bionemo import sharded
from bioinit.contexts import Checkpoint
from bioinit.errors import ConfigError, PlanError
from bioinit.families import open_checkpoint
from bioinit.initialize import load_weights
from bioinit.keys import SkipPrefix

logger = logging.getLogger(__name__)

_RENAMED = (
    ("dense_h_to_4h", "linear_fc1"),
    ("dense_4h_to_h", "linear_fc2"),
    ("query_key_value", "linear_qkv"),
    ("self_attention.dense", "self_attention.linear_proj"),
    ("lm_head.bias", "output_layer.bias"),
    ("lm_head.weight", "output_layer.weight"),
    ("lm_head.layernorm", "lm_head.layer_norm"),
    ("post_attention_layernorm", "pre_mlp_layernorm"),
)
_FUSED = (
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("input_layernorm.bias", "self_attention.linear_qkv.layer_norm_bias"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ("pre_mlp_layernorm.bias", "mlp.linear_fc1.layer_norm_bias"),
)
_BODY = "language_model."
_LISTED = "skip_keys_with_these_prefixes"
_NOT_HERE = (
    " name it in new or",
    "; on_missing=init accepts whatever is missing",
    " or set on_mismatch=init",
)
"""What cures of :func:`bioinit.load_weights` name, and the calls here do not have."""


def nemo1_to_nemo2_biobert_key_mapping(
    old_key: str,
    new_model_prefix: str = "module",
    old_model_prefix: str = "model",
    te_mapping: bool = False,
) -> str:
    """The name in NeMo 2 of a parameter of a BERT model of NeMo 1.

    Stands in for ``bionemo.llm.utils.weight_utils.nemo1_to_nemo2_biobert_key_mapping``. Here a
    prefix is taken off the front alone, and names are compared by whole dotted segments; so
    ``submodel.language_model.x`` stays as it is, and an empty ``old_model_prefix`` puts the new one
    in front once.

    Args:
        old_key: a name in NeMo 1's ``model_weights.ckpt``.
        new_model_prefix: what stands in front in NeMo 2; empty for the bare model of Megatron.
        old_model_prefix: what stands in front in NeMo 1.
        te_mapping: whether the new model has Transformer Engine's layers, which keep norms in the
            linear layer that follows.

    >>> nemo1_to_nemo2_biobert_key_mapping(
    ...     "model.language_model.encoder.layers.0.self_attention.dense.bias"
    ... )
    'module.encoder.layers.0.self_attention.linear_proj.bias'
    """
    old, new = _dotted(old_model_prefix), _dotted(new_model_prefix)
    key = old_key
    if key.startswith(old):
        key = new + key.removeprefix(old).removeprefix(_BODY)
    for before, after in (*_RENAMED, *(_FUSED if te_mapping else ())):
        key = re.sub(rf"(?<![^.]){re.escape(before)}(?![^.])", after, key)
    return key


def _dotted(prefix: str) -> str:
    return f"{prefix.rstrip('.')}." if prefix else ""


def load_weights_sharded_inplace_nemo2_to_mcore(
    model: Any,
    distributed_checkpoint_dir: str | Path,
    skip_keys_with_these_prefixes: Iterable[str],
) -> None:
    """Load what a trainer of NeMo 2 saved into ``model``, in place.

    Stands in for ``bionemo.llm.utils.weight_utils.load_weights_sharded_inplace_nemo2_to_mcore``.
    ``model`` is one of megatron-core, divided or whole, a list of its chunks, or any module; the
    names in the checkpoint may have ``module.`` in front, or not. What the checkpoint has besides
    is left alone; what the model has besides must be skipped.

    As in the original a prefix is raw text: ``encoder.layers.1`` skips ``encoder.layers.10`` too,
    which is warned of. Different here: a prefix that no key has is an error; some of the layers may
    be skipped; a parameter that is not contiguous is loaded too. Names and shapes are checked
    before anything is changed; where bytes turn out to be damaged, or two copies of one tensor to
    differ, the error says which parameters are not as they were.

    Raises:
        ConfigError: the prefixes are one text, or one of them is empty.
        PlanError: a parameter is missing in the checkpoint, or of another shape; a prefix hits
            nothing.
        BioinitError: the checkpoint cannot be read.
    """
    prefixes = _prefixes(skip_keys_with_these_prefixes, _LISTED)
    _load(model, Path(distributed_checkpoint_dir), prefixes, _LISTED)


def _load(model: Any, path: Path, prefixes: tuple[str, ...], listed: str) -> None:
    """Load but for ``prefixes``, which the person calls ``listed``."""
    root = model if isinstance(model, nn.Module) else nn.ModuleList(model)
    with open_checkpoint(path) as checkpoint:
        raw = [SkipPrefix(_open_ended(prefix)) for prefix in prefixes]
        asked = [each for each in raw if not _is_idle(each, root, checkpoint)]
        names = sharded.names_of(root, checkpoint, asked)
    texts = [each.text for each in asked]
    try:
        report = load_weights(root, path, skip_prefixes=texts, mapping=names)
    except PlanError as error:
        problems = [
            replace(
                each,
                message=_in_their_words(each.message, listed),
                cure=_in_their_words(each.cure, listed),
            )
            for each in error.problems
        ]
        changed = getattr(error, "__notes__", [])
        said = " ".join((f"{path}: {_in_their_words(str(error), listed)}", *changed))
        raise PlanError(said, problems) from error
    for prefix in map(SkipPrefix, prefixes):
        keys = [claim.key for claim in report.claims if claim.claim == "skipped"]
        beyond = [k for k in keys if k.startswith(prefix.text) and not prefix.matches(k)]
        if beyond:
            logger.warning(
                "the prefix %r skips %s too, and %d in all that go on within its last word",
                prefix.text,
                beyond[0],
                len(beyond),
            )
    logger.info("loaded %s: %s", path, report)


def update_model_from_checkpoint(config: Any, model: Any, initial_ckpt_path: str | Path) -> None:
    """Load a checkpoint's weights into ``model``, but for what ``config`` says to skip.

    Stands in for the method of this name of
    ``bionemo.llm.model.config.MegatronBioNeMoTrainableModelConfig``; ``config`` is any that has
    ``initial_ckpt_skip_keys_with_these_prefixes``. For what is different here see
    :func:`load_weights_sharded_inplace_nemo2_to_mcore`.
    """
    given = config.initial_ckpt_skip_keys_with_these_prefixes
    listed = f"initial_ckpt_{_LISTED}"
    _load(model, Path(initial_ckpt_path), _prefixes(given, listed), listed)


def _in_their_words(said: str, listed: str) -> str:
    for words in _NOT_HERE:
        said = said.replace(words, "")
    # What stands in for the list here may hold its name already.
    said = re.sub(rf"\b(?:skip_prefixes|{_LISTED})\b", listed, said)
    return re.sub(r"(skip prefix '.*?)\*'", r"\1'", said)


def _open_ended(prefix: str) -> str:
    """A prefix of raw text, as :class:`SkipPrefix` spells it; an empty one is its error."""
    return prefix if prefix.endswith("*") or not prefix.strip(".") else f"{prefix}*"


def _is_idle(prefix: SkipPrefix, model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Whether only the checkpoint has what is to be skipped, which is left alone anyway.

    Processes that share a model know only their parts of it, so there nothing is.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return False
    keys = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    stored = (name.removeprefix(front) for name in checkpoint.tensors for front in sharded.FRONTS)
    return not any(map(prefix.matches, keys)) and any(map(prefix.matches, stored))


def _prefixes(given: Any, name: str) -> tuple[str, ...]:
    if isinstance(given, str):
        raise ConfigError(
            f"{name}={given!r} is one text, and each of its letters would be a prefix. Write "
            f"[{given!r}]."
        )
    return tuple(sorted(given or ()))
