"""GPT-NeoX's "slim weights" as labml's annotated implementation reads them, layer by layer.

In the place of ``labml_nn.neox``: ``checkpoint``, ``model`` and ``finetune`` have the same names
here, and all of them can be imported from this package. Neither labml nor labml_nn is needed. What
is different is said in each docstring and in one table of ``docs/migration.md``: downloads go on
where they were cut off, pickles are read without being run, every merge holds shapes and partitions
against each other, and other depths and numbers of partitions than those of the 20B model are read.

>>> from bioinit.compat.labml import get_files_to_download
>>> len(get_files_to_download())
105
"""

from __future__ import annotations

from bioinit.compat.labml._download import DownloadProgress
from bioinit.compat.labml._merge import (
    MissingKey,
    PartitionsDiffer,
    WrongShape,
    merge_params_dim_0,
    merge_params_dim_1,
    merge_params_duplicate,
    merge_params_sum,
)
from bioinit.compat.labml.checkpoint import (
    CHECKPOINTS_URL,
    download,
    get_checkpoints_download_path,
    get_files_to_download,
    load_checkpoint_files,
)
from bioinit.compat.labml.finetune import FineTuneBiases, FineTuner, UnknownKey
from bioinit.compat.labml.model import (
    Embedding,
    FinalNorm,
    Layer,
    LayerGenerator,
    NeoXModule,
    ReadoutLayer,
    TransformerLayer,
)

__all__ = [
    "CHECKPOINTS_URL",
    "DownloadProgress",
    "Embedding",
    "FinalNorm",
    "FineTuneBiases",
    "FineTuner",
    "Layer",
    "LayerGenerator",
    "MissingKey",
    "NeoXModule",
    "PartitionsDiffer",
    "ReadoutLayer",
    "TransformerLayer",
    "UnknownKey",
    "WrongShape",
    "download",
    "get_checkpoints_download_path",
    "get_files_to_download",
    "load_checkpoint_files",
    "merge_params_dim_0",
    "merge_params_dim_1",
    "merge_params_duplicate",
    "merge_params_sum",
]
