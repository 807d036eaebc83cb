"""What GPT-NeoX and Megatron-DeepSpeed write with pipelines: a file for each layer and partition.

``layer_XX-model_YY-model_states.pt`` is a state dict of one layer, ``XX`` its place among all the
layers of the pipeline, with gaps where a layer has no parameters. Stored names are ``XX.<name in
the file>``, ``XX`` as a plain number. What else lies there is state of the engine that trained it.
"""

from __future__ import annotations

import re
from typing import Any

from bioinit.errors import CheckpointError, CorruptCheckpoint, UnfinishedCheckpoint
from bioinit.formats._partitions import (
    Merger,
    Rules,
    biases_are_copies,
    require_layers,
    require_one_step,
    require_partitions,
    settings,
    size,
    style,
)
from bioinit.formats.neox.layers import write
from bioinit.formats.protocol import Contents, Format, Open, StoredTensor
from bioinit.storage import Folder

_LAYER = re.compile(r"layer_(\d{1,6})-model_(\d{1,6})-model_states\.pt")
_ENGINE = re.compile(r"mp_rank_(\d{1,6})_model_states\.pt")
_OPTIMIZER = re.compile(r".*optim_states\.pt")
_KEPT = ("args", "iteration", "global_steps", "mp_world_size", "dp_world_size", "ds_version")
_OUTSIDE = re.compile(r".*embeddings?\..*|norm\..*|(final_linear|lm_head)\..*|weight|bias|scale")
"""Names in the files that are no layer of the transformer: embeddings, last norm and readout."""
_WRITERS = {
    "neox": "GPT-NeoX (DeepSpeed pipeline)",
    "savanna": "Savanna (DeepSpeed pipeline)",
    "megatron": "Megatron-DeepSpeed (DeepSpeed pipeline)",
}


def _recognizes(folder: Folder) -> bool:
    return not folder.is_file and any(map(_LAYER.fullmatch, folder.names()))


def _open(folder: Folder, open_inner: Open) -> Contents:
    layers = _layers(folder)
    count = len(next(iter(layers.values())))
    merger = Merger(str(folder.path))
    opened = {
        number: [(name, merger.take(open_inner(folder.lone(name)))) for name in names]
        for number, names in layers.items()
    }
    table = style([name for parts in opened.values() for name in parts[0][1]])
    everything: dict[str, StoredTensor] = {
        f"{number}.{name}": tensor
        for number, parts in opened.items()
        for name, tensor in parts[0][1].items()
    }
    engine, ignored = _engine(folder, open_inner)
    missing = f"layer_*-model_{count:02d}-model_states.pt"
    require_partitions(folder, engine, everything, count, missing, has_stages=True)
    numbers = [n for n, parts in opened.items() if not all(map(_OUTSIDE.fullmatch, parts[0][1]))]
    require_layers(str(folder.path), engine, numbers)
    width = Rules(table, everything, hidden=size(engine, "hidden_size")).hidden
    remark = biases_are_copies(folder, engine) if table == "neox" and count > 1 else ""
    for number, parts in opened.items():
        for name, tensors in parts:
            merger.aside(name, tensors)
        merger.merge(f"{number}.", parts, Rules(table, parts[0][1], hidden=width), remark)
    merger.require_weights()
    metadata: dict[str, Any] = {
        "writer": _WRITERS[table],
        "parallel": {"tensor": count},
        "layout": f"{len(layers)} layers, each in {count} files"
        if count > 1
        else f"{len(layers)} layers, each in a file",
    }
    metadata |= merger.metadata
    if remark and merger.sums:
        metadata["doubt"] = remark
    if isinstance(engine.get("iteration"), int):
        metadata["iteration"] = engine["iteration"]
    if engine:
        metadata["objects"] = engine
    if ignored:
        metadata["ignored"] = ignored
    return Contents(tuple(merger.files), merger.tensors, metadata)


def _layers(folder: Folder) -> dict[int, list[str]]:
    """The files of every layer, by partition, all layers in order.

    Raises:
        UnfinishedCheckpoint: a file is missing.
        CorruptCheckpoint: two have the same place.
    """
    found: dict[int, dict[int, str]] = {}
    for name in folder.names():
        match = _LAYER.fullmatch(name)
        if match is None:
            continue
        layer = found.setdefault(int(match[1]), {})
        if int(match[2]) in layer:
            raise CorruptCheckpoint(
                f"{folder.path} holds {layer[int(match[2])]} and {name}, which have the same place."
                " Remove the one that does not belong there."
            )
        layer[int(match[2])] = name
    numbers = {number for layer in found.values() for number in layer}
    count = len(numbers)
    for number, layer in sorted(found.items()):
        # Counting as far as there are files, not as far as one of their names says.
        missing = next((n for n in range(count) if n not in layer), None)
        if missing is not None:
            last = max(found, key=lambda n: max(found[n]))
            raise UnfinishedCheckpoint(
                f"{folder.path} lacks layer_{number:02d}-model_{missing:02d}-model_states.pt: it "
                f"holds {found[last][max(found[last])]}, and every layer needs partition 0 and "
                "all that follow up to the last. Fetch it, or point at a complete checkpoint."
            )
    return {number: [layer[n] for n in sorted(layer)] for number, layer in sorted(found.items())}


def _engine(folder: Folder, open_inner: Open) -> tuple[dict[str, Any], dict[str, str]]:
    """What the engine's first readable file says of the run, and the files without weights.

    Raises:
        CorruptCheckpoint: two of its files were saved at different steps.
    """
    said: list[tuple[str, dict[str, Any]]] = []
    ignored: dict[str, str] = {}
    for name in folder.names():
        if _OPTIMIZER.fullmatch(name):
            ignored[name] = "state of the optimizer"
        elif _ENGINE.fullmatch(name):
            ignored[name] = "state of the engine that trained it"
            try:
                objects = open_inner(folder.lone(name)).metadata.get("objects")
            except CheckpointError as error:  # no weight depends on it
                ignored[name] = f"state of the engine that trained it, not readable: {error}"
            else:
                said.append((name, settings(objects, _KEPT)))
    require_one_step(str(folder.path), said)
    return next((values for _, values in said if values), {}), ignored


FORMAT = Format(
    recognizes=_recognizes,
    open=_open,
    marks="layer_*-model_*-model_states.pt",
    write=write,
    honours=("partitions",),
)
