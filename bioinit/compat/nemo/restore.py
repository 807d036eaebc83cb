"""What to take from a checkpoint that a run starts from: stands in for ``RestoreConfig``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class RestoreConfig:
    """Which parts of which checkpoint a run begins with.

    Stands in for ``nemo.lightning.pytorch.strategies.utils.RestoreConfig``, of both generations:
    ``adapter_path`` was there in 2024.

    Attributes:
        path: a checkpoint's folder; ``nemo://NAME`` is one in NeMo's cache of models, and
            ``hf://ORG/NAME`` one that the model's importer converts.
        adapter_path: the folder of an adapter that was trained on it.
        load_model_state: take the weights.
        load_optim_state: take the optimizer's state.
        load_artifacts: take the tokenizer, and what else was saved along.
    """

    path: str
    adapter_path: str | None = None
    load_model_state: bool = True
    load_optim_state: bool = False
    load_artifacts: bool = True
