"""Tools to write checkpoints that no writer writes: archives, pickles and indices by hand."""

from __future__ import annotations

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import SerializationFormat

STATE = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "a.bias": torch.arange(4, dtype=torch.bfloat16),
    "b.weight": torch.arange(6, dtype=torch.int64).view(2, 3),
}
CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
EXABYTE = 1 << 60

# safetensors


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """An image with this header, which need not fit the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: Iterable[Any] = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


# Pickles


class Call:
    """Pickles as a call of ``function``; with a state, or with items, if given."""

    def __init__(self, function: Any, *args: Any, rest: tuple[Any, ...] = ()) -> None:
        self.reduced = (function, args, *rest)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


class Pid:
    """Pickles as a persistent id."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.value if isinstance(obj, Pid) else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def storage(key: str = "0", numel: Any = 4, kind: Any = torch.FloatStorage) -> Pid:
    return Pid(("storage", kind, key, "cpu", numel))


def tensor(held: Any, offset: Any = 0, size: Any = (4,), stride: Any = (1,), *rest: Any) -> Call:
    args = (held, offset, size, stride, False, {}, *rest)
    return Call(torch._utils._rebuild_tensor_v2, *args)


def archive(
    pickle_bytes: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    root: str = "archive",
    method: int = zipfile.ZIP_STORED,
    extra: Iterable[tuple[str, bytes]] = (),
) -> bytes:
    """What torch.save writes around a pickle."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a name stands twice
        with zipfile.ZipFile(buffer, "w", method) as file:
            file.writestr(f"{root}/data.pkl", pickle_bytes)
            file.writestr(f"{root}/byteorder", b"little")
            for key, data in (storages or {}).items():
                file.writestr(f"{root}/data/{key}", data)
            file.writestr(f"{root}/version", b"3\n")
            for name, data in extra:
                file.writestr(name, data)
    return buffer.getvalue()


def saved(value: Any, *, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


FLOATS = struct.pack("<4f", 1, 2, 3, 4)

# torch's distributed checkpoint


_WRITTEN: dict[SerializationFormat, dict[str, bytes]] = {}
"""What torch's writer made of the state that most cases begin with: it takes its time."""


def write_dcp(
    folder: Path,
    state: Mapping[str, Any] = STATE,
    *,
    common: Any = ...,
    kind: SerializationFormat = SerializationFormat.TORCH_SAVE,
) -> Path:
    """A distributed checkpoint of torch, and with ``common`` of Megatron."""
    folder.mkdir(parents=True, exist_ok=True)
    if state is STATE and kind in _WRITTEN:
        for name, data in _WRITTEN[kind].items():
            (folder / name).write_bytes(data)
    else:
        writer = dcp.FileSystemWriter(folder, sync_files=False, serialization_format=kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(state), storage_writer=writer, no_dist=True)
        if state is STATE:
            _WRITTEN[kind] = {file.name: file.read_bytes() for file in folder.glob("*.distcp")}
            _WRITTEN[kind][".metadata"] = (folder / ".metadata").read_bytes()
    if common is not ...:
        (folder / "common.pt").write_bytes(common if isinstance(common, bytes) else saved(common))
        (folder / "metadata.json").write_text(json.dumps(CONFIG))
    return folder


def edit_index(folder: Path, change: Callable[[Any], Any]) -> None:
    """Let ``change`` do to the index what it wants; what it returns, if anything, is written."""
    file = folder / ".metadata"
    value = pickle.loads(file.read_bytes())
    answer = change(value)
    file.write_bytes(pickle.dumps(value if answer is None else answer))


def place_of(index: Any, name: str) -> Any:
    """Where the index says that the tensor called ``name`` lies."""
    return next(place for key, place in index.storage_data.items() if key.fqn == name)


def distcp(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


# zarr


def write_array(
    folder: Path,
    name: str,
    data: torch.Tensor,
    chunks: tuple[int, ...] | None = None,
    pack: Callable[[bytes], bytes] | None = None,
    **header: Any,
) -> Path:
    """An array of zarr 2, each chunk of it through ``pack``."""
    kinds = {torch.float32: "<f4", torch.int64: "<i8", torch.bfloat16: "bfloat16"}
    chunks = tuple(data.shape) if chunks is None else chunks
    place = folder / name
    place.mkdir(parents=True)
    said = {
        "chunks": list(chunks),
        "compressor": None,
        "dtype": kinds[data.dtype],
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(data.shape),
        "zarr_format": 2,
        **header,
    }
    (place / ".zarray").write_text(json.dumps(said))
    counts = [-(-size // step) for size, step in zip(data.shape, chunks, strict=True)]
    for number in torch.cartesian_prod(*map(torch.arange, counts)).view(-1, len(counts)).tolist():
        part = data
        for dim, (at, step) in enumerate(zip(number, chunks, strict=True)):
            part = part.narrow(dim, at * step, min(step, data.shape[dim] - at * step))
        raw = part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        (place / ".".join(map(str, number))).write_bytes(pack(raw) if pack else raw)
    return place


def write_zarr(folder: Path, state: Mapping[str, torch.Tensor] = STATE, common: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in state.items():
        write_array(folder, name, data)
    (folder / "common.pt").write_bytes(saved(common or {"iteration": 3}))
    said = {**CONFIG, "sharded_backend": "zarr"}
    (folder / "metadata.json").write_text(json.dumps(said))
    return folder


# tar


def tar_header(
    name: bytes | str,
    size: int | bytes = 0,
    kind: bytes = b"0",
    *,
    link: bytes = b"",
    prefix: bytes = b"",
) -> bytes:
    """A header of 512 bytes with a right checksum, whatever else it says."""
    raw = name.encode() if isinstance(name, str) else name
    digits = size if isinstance(size, bytes) else b"%011o\0" % size
    block = b"".join(
        (
            raw.ljust(100, b"\0"),
            b"0000644\0" + b"0000000\0" * 2,
            digits.ljust(12, b"\0"),
            b"00000000000\0",
            b" " * 8,
            kind,
            link.ljust(100, b"\0"),
            b"ustar\x0000" + b"\0" * 80,
            prefix.ljust(155, b"\0"),
        )
    ).ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def tar_member(name: bytes | str, data: bytes = b"", kind: bytes = b"0", **rest: Any) -> bytes:
    return tar_header(name, len(data), kind, **rest) + data + bytes(-len(data) % 512)


TAR_END = bytes(1024)
YAML = b"name: tiny\nhidden_size: 4\nnum_layers: 2\nnemo_version: 1.23.0\n"


def nemo(*members: bytes, weights: bytes | None = None, config: bytes = YAML) -> bytes:
    """An archive as NeMo writes it, with ``members`` before the weights."""
    held = saved(STATE) if weights is None else weights
    return b"".join(
        (
            tar_member("./model_config.yaml", config),
            *members,
            tar_member("./model_weights.ckpt", held),
            TAR_END,
        )
    )


# Partitions


def write_layers(folder: Path, partitions: int = 2) -> Path:
    """A model of GPT-NeoX with one layer."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(partitions):
        norm = {"weight": torch.ones(4), "bias": torch.zeros(4)}
        layers = {
            0: {"word_embeddings.weight": torch.full((4, 4), float(part))},
            2: {
                "input_layernorm.weight": torch.ones(4),
                "attention.query_key_value.weight": torch.full((6, 4), float(part)),
                "attention.dense.weight": torch.full((4, 2), float(part)),
                "attention.dense.bias": torch.ones(4),
                "mlp.dense_h_to_4h.weight": torch.full((8, 4), float(part)),
                "mlp.dense_4h_to_h.weight": torch.full((4, 8), float(part)),
            },
            4: {f"norm.{name}": value for name, value in norm.items()},
            5: {"final_linear.weight": torch.full((4, 4), float(part))},
        }
        for number, layer in layers.items():
            torch.save(layer, folder / layer_file(number, part))
    return folder


def layer_file(number: int, part: int) -> str:
    return f"layer_{number:02d}-model_{part:02d}-model_states.pt"
