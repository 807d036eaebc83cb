"""How one kind of model is converted: stands in for ``nemo.lightning.io.connector``.

A connector is a path, the source, with an ``apply`` that a person wrote. Calling it makes the
result once: under an OS lock, hidden until it is whole, with a note of what it was made of. The
original took whatever stood at the place for finished, and a lock file that somebody had left
switched ``overwrite`` off.
"""

from __future__ import annotations

import sys
from pathlib import Path, PosixPath
from typing import Any, ClassVar, Generic, Self, TypeVar

from bioinit.compat.nemo._hub import local_folder
from bioinit.compat.nemo.caches import cache_home, models_cache
from bioinit.compat.nemo.ckpt_utils import NoName
from bioinit.compat.nemo.io._kept import is_kept, kept, place_of
from bioinit.compat.nemo.io._models import (
    Conversion,
    give_tokenizer,
    load,
    prepare,
    save,
    teardown,
    tokenizer_assets,
)
from bioinit.compat.nemo.io._registry import (
    ConnectorMixin,
    export_ckpt,
    import_ckpt,
    load_connector_from_trainer_ckpt,
    model_exporter,
    model_importer,
)

__all__ = [
    "Connector",
    "ConnectorMixin",
    "Conversion",
    "ModelConnector",
    "export_ckpt",
    "import_ckpt",
    "load_connector_from_trainer_ckpt",
    "model_exporter",
    "model_importer",
    "teardown",
]

SourceT = TypeVar("SourceT")
TargetT = TypeVar("TargetT")


class Connector(PosixPath, Generic[SourceT, TargetT]):
    """A source, and how something is made from it.

    Stands in for ``nemo.lightning.io.connector.Connector``: a path whose text is the source, with
    ``init`` and ``apply`` for a subclass to write. ``apply`` is given a path that is not there yet,
    hidden beside the final one; what it makes there is moved into place when it is whole. So it
    should not write that path into what it makes.

    Attributes:
        default_path: the source that is meant where none is given.
        address: the source where it is no path but an address, of which a path would lose a slash.
        LOCK_TIMEOUT: how many seconds to wait for another process that makes the same; the first
            one has the lock as long as it lives.
    """

    default_path: ClassVar[Any] = None
    address: str | None = None
    LOCK_TIMEOUT: ClassVar[float] = 1200

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if not args and cls.default_path is not None and "path" not in kwargs:
            args = (cls.default_path,)
        made = super().__new__(cls, *args)
        if sys.version_info >= (3, 12):  # where it is the constructor that takes the segments
            PosixPath.__init__(made, *args)
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __str__(self) -> str:
        return self.address or super().__str__()

    def with_segments(self, *pathsegments: Any) -> PosixPath:
        """Paths made from this one are plain: only the source itself is a connector."""
        return PosixPath(*pathsegments)

    def init(self) -> TargetT:
        """A new target without the source's weights; a subclass writes it."""
        raise NotImplementedError(f"{type(self).__name__} has no init(): write it.")

    def apply(self, output_path: Path, **kwargs: Any) -> Path | None:
        """Make the target at ``output_path``; a subclass writes it."""
        raise NotImplementedError(f"{type(self).__name__} has no apply(): write it.")

    def __call__(
        self, output_path: str | Path | None = None, overwrite: bool = False, **kwargs: Any
    ) -> Path:
        """What ``apply`` makes of the source; it is made now unless it is there.

        What stands at ``output_path`` and was not made here is taken as it is. What was made here
        and of something else (the source's files have changed, its commit on the hub, an argument,
        or the text of the connector or of what that uses) is made again in the cache, and is an
        error at a place that a person chose. In the cache a second source of the same name is kept
        beside the first, ``<name>-<digest>``.

        Args:
            output_path: where it is to stand; :meth:`local_path` if None.
            overwrite: make it again, though it is there. The old one stays until then.
            **kwargs: for ``apply``.

        Raises:
            Changed: it was made of something else, and ``overwrite`` is not set; it is a
                ``FileExistsError`` too.
            StorageError: the file system refuses; or another process took longer than
                ``LOCK_TIMEOUT``.
        """
        place = Path(output_path) if output_path else self.local_path()
        return kept(
            self, place, kwargs, overwrite=overwrite, is_ours=place == self.local_path(),
            seconds=self.LOCK_TIMEOUT,
        )  # fmt: skip

    def local_path(self, base_path: Path | None = None) -> Path:
        """Where the result is kept: below ``base_path``, or NeMo's cache.

        A source that is a path of its own (``/a/model``, ``../model``) goes by its last name. Of
        :class:`Connector` the original took ``/a/model`` itself, the source, for that place.
        """
        return _below(cache_home() if base_path is None else Path(base_path), self)

    def is_in_cache(self, base_path: Path | None = None) -> bool:
        """Whether the result is there, whole."""
        return is_kept(place_of(self, self.local_path(base_path)))

    def local_source(self) -> Path:
        """The source's files: a path as it is; ``ORG/NAME`` from the Hugging Face hub.

        An addition of ours. The hub's own cache is asked first, without the network.

        Raises:
            StorageError: it is not there and cannot be fetched.
        """
        return local_folder(str(self))


class ModelConnector(Connector[SourceT, TargetT], Generic[SourceT, TargetT]):
    """A connector between checkpoints: stands in for ``nemo.lightning.io.ModelConnector``.

    ``nemo_setup``, ``nemo_save`` and ``nemo_load`` keep their names and do their work without NeMo:
    no trainer, no strategy and no process group is made, and the model stays on the CPU in one
    process. What ``nemo_save`` writes is a checkpoint that bioinit reads: ``weights/`` with
    safetensors under the model's own names, and ``context/`` with ``io.json`` and ``model.yaml``.
    NeMo itself does not read such weights.
    """

    def nemo_setup(
        self, model: Any, trainer: Conversion | None = None, *args: Any, **kwargs: Any
    ) -> Conversion:
        """``model`` with its parameters in memory, and what ``nemo_save`` will ask for.

        Stands in for the method that made a Lightning trainer with Megatron's strategy. If the
        model has no parameters yet, its ``configure_model`` is called; its config is not changed.
        Arguments for the strategy are not taken.

        Raises:
            ConfigError: ``trainer`` is none that this method made, or there are such arguments.
        """
        return prepare(model, trainer, args, kwargs)

    def nemo_save(self, output_path: str | Path, trainer: Conversion, dump_io: bool = True) -> None:
        """Write the model of ``trainer`` to ``output_path``: weights, and what it was made from.

        Stands in for the method that saved through the strategy. A marker
        ``<output_path>-unfinished`` stands beside the folder until all of it is written.

        Args:
            output_path: the checkpoint's folder.
            trainer: what ``nemo_setup`` returned.
            dump_io: write ``context/`` too.

        Raises:
            NoContext: ``dump_io``, and the model is not tracked; it is a ``ValueError`` too.
            ConfigError: parameters of the model are still on meta.
        """
        save(Path(output_path), trainer, dump_io)

    def nemo_load(
        self, path: str | Path, trainer: Conversion | None = None, cpu: bool = True
    ) -> tuple[Any, Conversion]:
        """The model saved in ``path``, with its weights, and what :meth:`nemo_setup` returns of it.

        Stands in for the method that loaded through the strategy: the class is built from
        ``context/``, and the weights are loaded by :func:`bioinit.load_weights`, in any format that
        bioinit reads. The config is set to be built as saved, without fp8.

        Args:
            path: the checkpoint's folder.
            trainer: as in :meth:`nemo_setup`.
            cpu: if False, the model is moved to the GPU in the end.

        Raises:
            UnknownClass: the program does not know the model's class.
            PlanError: the weights do not fit the model.
            ConfigError: it is a model with an adapter, which is not loaded here.
        """
        return load(Path(path), trainer, cpu)

    def local_path(self, base_path: Path | None = None) -> Path:
        """Where the result is kept: below ``base_path``, or ``$NEMO_MODELS_CACHE``.

        ``ORG/NAME`` is kept under that name, a path under its last part; a file that ends in
        ``.pt`` or ``.pth`` under the name of its folder.
        """
        base = models_cache() if base_path is None else Path(base_path)
        is_file = str(self).startswith("/") and self.suffix in (".pt", ".pth")
        return base / self.parent.name if is_file else _below(base, self)

    def on_import_ckpt(self, model: Any) -> None:
        """Called after an import: the connector's ``tokenizer`` becomes the model's."""
        give_tokenizer(self, model)

    def save_hf_tokenizer_assets(
        self, tokenizer_name_or_path: str, save_path: str | Path | None = None
    ) -> str:
        """Save a Hugging Face tokenizer to a folder, and return that.

        What differs: without ``save_path`` it is a new temporary folder, which is removed when the
        program ends (all processes of a machine shared one); and code that the tokenizer brought
        along is not run.
        """
        return tokenizer_assets(tokenizer_name_or_path, save_path)


def _below(base: Path, source: Path) -> Path:
    text = str(source)
    if source.name in ("", ".."):
        raise NoName(
            f"the source {text!r} ends in no name, so there is none for what is made of it. Give "
            "the path of its folder in full, or ORG/NAME."
        )
    if text.startswith("/") or ".." in source.parts:
        return base / source.name
    return base / text.replace("://", "/")
