"""Where the files of the 20B model come from, where they lie, and how a layer's are read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self

import torch
import yaml

from bioinit.compat.labml._download import DownloadProgress, fetch, read_digests
from bioinit.compat.labml._merge import (
    merge_params_dim_0,
    merge_params_dim_1,
    merge_params_duplicate,
    merge_params_sum,
)
from bioinit.compat.labml._server import Server
from bioinit.contexts import Checkpoint
from bioinit.errors import ConfigError, StorageError
from bioinit.formats import open_weights
from bioinit.storage import File, Folder

__all__ = [
    "CHECKPOINTS_URL",
    "download",
    "get_checkpoints_download_path",
    "get_files_to_download",
    "load_checkpoint_files",
    "merge_params_dim_0",
    "merge_params_dim_1",
    "merge_params_duplicate",
    "merge_params_sum",
]

CHECKPOINTS_URL = "https://mystic.the-eye.eu/public/AI/models/GPT-NeoX-20B/slim_weights/"
"""Where EleutherAI published the weights; the original's. Whether it answers is not ours to say."""

DEPTH, PARTITIONS, STEP = 44, 2, "global_step150000"
BESIDE = ("20B_tokenizer.json", "configs/20B.yml", "latest")

_LAYER = re.compile(r"layer_(\d{1,6})-model_(\d{1,6})-model_states\.pt")
_LAB = ".labml.yaml"


class MissingFile(StorageError, FileNotFoundError):
    """A file of a layer is not here."""

    __str__ = Exception.__str__


class Places(NamedTuple):
    """How many layers the transformer of a checkpoint has, and in how many files each layer is."""

    depth: int = DEPTH
    partitions: int = PARTITIONS

    @classmethod
    def of(cls, step: Path, depth: int | None = None) -> Self:
        """What the names of the files in ``step`` say; as the 20B model if there are none.

        The last two numbers are those of the final norm and the readout, unless ``depth`` is given.
        """
        found = [
            match
            for path in (step.iterdir() if step.is_dir() else ())
            if (match := _LAYER.fullmatch(path.name))
        ]
        if not found:
            return cls(depth or DEPTH)
        last = max(int(match[1]) for match in found)
        if depth is None and last < 5:
            raise StorageError(
                f"the last layer in {step} is number {last}, so the final norm and the readout, "
                "which have the two highest numbers, are not there. Fetch all files, or say how "
                "deep the model is with depth=."
            )
        return cls(depth or last - 4, 1 + max(int(match[2]) for match in found))

    def numbers(self, num_layers: int) -> list[int]:
        """The numbers of embedding, the first layers, final norm and readout.

        Raises:
            ConfigError: there are not so many layers.
        """
        if not 0 <= num_layers <= self.depth:
            raise ConfigError(
                f"cannot take {num_layers} layers of a model that has {self.depth}. Choose at most "
                f"{self.depth}, or say how deep the model is with depth=."
            )
        return [0, *range(2, 2 + num_layers), self.depth + 3, self.depth + 4]

    def files(self, number: int) -> tuple[str, ...]:
        """The files of layer ``number``, by partition."""
        return tuple(
            f"layer_{number:02d}-model_{part:02d}-model_states.pt"
            for part in range(self.partitions)
        )


def get_checkpoints_download_path() -> Path:
    """The folder of the downloaded files.

    It is ``neox_fast/slim_weights`` in the data folder if that is there, else
    ``neox/slim_weights``. Stands in for
    ``labml_nn.neox.checkpoint.get_checkpoints_download_path``. As with labml, the data folder is
    what the nearest ``.labml.yaml`` calls ``data_path``, else ``data`` beside that file; it is
    looked for from the current folder upwards, where labml begins at the running script. It is
    looked up each time, where the original remembered the first answer.
    """
    data = _data_path()
    fast = data / "neox_fast" / "slim_weights"
    return fast if fast.exists() else data / "neox" / "slim_weights"


def _data_path() -> Path:
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / _LAB).is_file():
            try:
                said = yaml.safe_load((folder / _LAB).read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise ConfigError(f"cannot read {folder / _LAB}: {error}. Mend it.") from error
            named = said.get("data_path", "data") if isinstance(said, dict) else "data"
            return (folder / str(named)).resolve()
    return here / "data"


def get_files_to_download(
    n_layers: int = 44,
    *,
    depth: int = DEPTH,
    partitions: int = PARTITIONS,
    step: str = STEP,
    beside: Sequence[str] = BESIDE,
    ranks: int = 8,
) -> list[str]:
    """The names of the files, as :func:`download` takes them.

    Stands in for ``labml_nn.neox.checkpoint.get_files_to_download``: the same list, in the same
    order, for the first ``n_layers`` of the 44 of the 20B model. The keywords are for other
    checkpoints, of which the original did not know: final norm and readout follow the last of
    ``depth`` layers. More layers than there are is an error; the original named files twice.

    Args:
        n_layers: how many transformer layers to take, from the first.
        depth: how many the model has.
        partitions: in how many files each layer is.
        step: the folder of the layers.
        beside: tokenizer, settings and pointer, outside of that folder.
        ranks: of how many ranks the engine left its state, which nobody needs.

    Raises:
        ConfigError: there are not so many layers.
    """
    places = Places(depth, partitions)
    layers = [f"{step}/{name}" for n in places.numbers(n_layers) for name in places.files(n)]
    engine = [f"{step}/mp_rank_{rank:02d}_model_states.pt" for rank in range(ranks)]
    return [*beside, *layers, *engine]


def download(
    n_layers: int = 44,
    *,
    base_url: str = CHECKPOINTS_URL,
    to: str | PathLike[str] | None = None,
    files: Sequence[str] | None = None,
    sha256: Mapping[str, str] | str | PathLike[str] | None = None,
    parallel: int = 4,
    progress: DownloadProgress | None = None,
    timeout: float = 60.0,
    retries: int = 5,
) -> Path:
    """Bring the files here; what is here already is not fetched again.

    Stands in for ``labml_nn.neox.checkpoint.download``, which fetched one file after the other from
    one host, and kept half a file under its name if it was interrupted. Here a file has its name
    only when it is whole, and a call after an interruption goes on where it was.

    Args:
        n_layers: as in :func:`get_files_to_download`, for ``files``.
        base_url: the folder on the server.
        to: the folder here; :func:`get_checkpoints_download_path` if None.
        files: which files, relative to both.
        sha256: digests by file name, or the path of a file as ``sha256sum`` writes it. What is here
            already is held against them too, and fetched again if it differs. Without one, the
            server is asked how many bytes the file has, since the original leaves half files.
        parallel: how many files at once.
        progress: told of a file, the bytes of it that are here, and how many it has or None. It may
            be called from several threads, one at a time. If None there is a bar on a terminal.
        timeout: for how many seconds a server may say nothing.
        retries: how often to ask again, with growing pauses, after a failure that brought nothing.

    Returns:
        The folder here.

    Raises:
        StorageError: a server does not answer or lacks a file, or the file system refused. What has
            arrived is kept, and the next call goes on with it.
        CorruptCheckpoint: a file does not have its digest.
        ConfigError: an argument makes no sense.
    """
    given = get_files_to_download(n_layers) if files is None else files
    names = [str(PurePosixPath(name)) for name in given]
    for name in names:
        is_below = not name.startswith("/") and ".." not in name.split("/")
        if name == "." or not is_below or not name.isprintable() or "\\" in name:
            raise ConfigError(
                f"{name!r} is not the name of a file below the folder. Give names such as "
                f"'{STEP}/layer_00-model_00-model_states.pt'."
            )
    if parallel < 1:
        raise ConfigError(f"cannot download {parallel} files at once. Choose 1 or more.")
    place = get_checkpoints_download_path() if to is None else Path(to)
    digests = read_digests(sha256)
    unknown = sorted(set(digests) - set(names))
    if isinstance(sha256, Mapping) and unknown:
        raise ConfigError(
            f"there is a sha256 of {unknown[0]!r}, which is none of the {len(names)} files. Name "
            "files as they are listed."
        )
    server = Server(base_url, timeout, retries)
    with _told(progress) as tell:
        fetch(server, list(dict.fromkeys(names)), place, digests, parallel, tell)
    return place


@contextmanager
def _told(progress: DownloadProgress | None) -> Iterator[DownloadProgress | None]:
    """``progress``, or a bar by bytes on a terminal."""
    if progress is not None or not sys.stderr.isatty():
        yield progress
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Callable[[int, int | None], None]] = {}

        def tell(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                task = bar.add_task(name, total=total)
                tasks[name] = lambda now, whole: bar.update(
                    task, completed=now, total=whole, visible=now != whole
                )
            tasks[name](done, total)

        yield tell


def step_folder(path: str | PathLike[str] | None = None) -> Path:
    """The folder in which the layers lie: ``path``, or in it what ``latest`` names.

    If neither, the step of the 20B model in it, whether it is there or not.
    """
    root = get_checkpoints_download_path() if path is None else Path(path)
    if root.is_dir() and any(_LAYER.fullmatch(entry.name) for entry in root.iterdir()):
        return root
    pointer = root / "latest"
    named = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else STEP
    is_plain = named not in ("", ".", "..") and "/" not in named and "\0" not in named
    return root / (named if is_plain else STEP)


def load_checkpoint_files(
    files: Sequence[str], *, path: str | PathLike[str] | None = None
) -> list[dict[str, torch.Tensor]]:
    """What the files of a layer hold: the tensors of each by name, on the CPU, as they are stored.

    Stands in for ``labml_nn.neox.checkpoint.load_checkpoint_files``. Pickles are read without
    running anything in them, files of any number of partitions are taken, and tensors saved on a
    GPU are given on the CPU.

    Args:
        files: names as :meth:`LayerGenerator.get_layers` gives them.
        path: the folder in which they, or ``latest`` and the folder that it names, lie;
            :func:`get_checkpoints_download_path` if None.

    Raises:
        StorageError: a file is not there.
        CheckpointError: one is damaged, or no file of weights.
    """
    if isinstance(files, str):
        raise ConfigError(
            f"{files!r} is one name, and a sequence of them is wanted. Write (name,)."
        )
    folder = step_folder(path)
    return [_read(folder / name) for name in files]


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise MissingFile(
            f"there is no file {path}. Fetch it with download(), or give the folder of the "
            "checkpoint with path=."
        )
    # As if it came out of an archive: by itself it would stand for all layers around it.
    folder = Folder.over(path.parent, {path.name: File.at(path, path.name)}).lone(path.name)
    name, contents = open_weights(folder)
    with Checkpoint(folder, name, contents, None) as opened:
        return {
            key: opened.read(key)
            for key, stored in opened.tensors.items()
            if stored.kind == "weight"
        }
