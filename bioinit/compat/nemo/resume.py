"""Going on with a run, or starting from a checkpoint: stands in for ``nemo.lightning.resume``.

``AutoResume`` had three generations. The first (June 2024) is told a ``path``, a ``dirpath`` or an
``import_path``; the second (September 2024) a ``RestoreConfig``, and converts ``hf://`` sources
through the model; the third (since October 2024) takes ``nemo://`` only, and finds an adapter's
model itself. :class:`AutoResume` here understands the words of all three.
"""

from __future__ import annotations

import json
import logging
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from bioinit.compat._capture import IOProtocol
from bioinit.compat._saved import load_context
from bioinit.compat.nemo._found import (
    UNFINISHED,
    AlreadyEnded,
    NotFoundError,
    Unfinished,
    is_unfinished,
    newest_checkpoint,
)
from bioinit.compat.nemo._paths import AdapterPath, as_path
from bioinit.compat.nemo.app_state import AppState, log_dir
from bioinit.compat.nemo.caches import models_cache
from bioinit.compat.nemo.ckpt_utils import ADAPTER_META_FILENAME, CONTEXT_PATH, WEIGHTS_PATH
from bioinit.compat.nemo.restore import RestoreConfig
from bioinit.errors import BioinitError, ConfigError, CorruptCheckpoint

__all__ = ["AdapterPath", "AlreadyEnded", "AutoResume", "NotFoundError", "RestoreConfig"]

_log = logging.getLogger("bioinit")
_NEMO = "nemo"
_FIRST = ("path", "dirpath", "import_path")
_LATER = ("restore_config", "resume_from_directory", "resume_from_path")


class Contradiction(ConfigError, ValueError):
    """What ``AutoResume`` was told cannot be meant together."""


class NotImportable(ConfigError, ValueError, AssertionError):
    """A source that is no checkpoint of NeMo's, and nobody there who converts it."""


class NoFabric(ConfigError, NotImplementedError):
    """It was given a ``Fabric``, which no generation of it supports."""


class NoTrainer(ConfigError, TypeError):
    """It was given a model, and nobody who is to be told."""


@dataclass
class AutoResume:
    """Finds the checkpoint that a run goes on with, and tells the trainer.

    Stands in for ``nemo.lightning.AutoResume`` of all three generations. The first seven arguments
    are those of the first generation, in its order; the others go by name. What differs: a
    ``resume_from_path`` that is not there is an error (it came back as it was);
    ``resume_past_end=True`` goes on with the end (it began again from nothing); words of the first
    generation do not mix with those of later ones.

    Attributes:
        path: a checkpoint to start from where none of this run is found.
        dirpath: the folder of this run's checkpoints.
        import_path: a source that the model's importer converts, ``hf://ORG/NAME``; nothing else
            is then looked at.
        adapter_path: the folder of an adapter on the checkpoint that is found.
        resume_if_exists: look for a checkpoint of this run, in ``<log_dir>/checkpoints`` or the
            folder given. ``log_dir`` is what :class:`AppState` says.
        resume_past_end: go on even if a name ends in ``end``: training had come to its end.
        resume_ignore_no_checkpoint: finding none is no error.
        restore_config: what to start from where none of this run is found.
        resume_from_directory: the folder of this run's checkpoints.
        resume_from_path: the checkpoint to go on with; nothing is looked for.
    """

    path: str | None = None
    dirpath: str | None = None
    import_path: str | None = None
    adapter_path: str | None = None
    resume_if_exists: bool = False
    resume_past_end: bool = False
    resume_ignore_no_checkpoint: bool = False
    _: KW_ONLY
    restore_config: RestoreConfig | None = None
    resume_from_directory: str | None = None
    resume_from_path: str | None = None

    WEIGHTS_PATH: ClassVar[str] = WEIGHTS_PATH

    def __post_init__(self) -> None:
        self._require_one_meaning()

    def get_weights_path(self, path: Any) -> Any:
        """The folder of weights in the checkpoint ``path``."""
        return as_path(path) / self.WEIGHTS_PATH

    def setup(self, trainer: Any, model: Any = None) -> None:
        """Tell ``trainer`` what to go on with, or to start from.

        A checkpoint becomes ``trainer.ckpt_path``, and ``last_model_path`` of its checkpoint
        callback if it has one. Where there is none, ``trainer.strategy.restore_config`` becomes
        ``restore_config``, with the path resolved in a copy of it. A tokenizer that was saved along
        becomes the model's if ``restore_config`` wants artifacts.

        The first generation had them the other way round, ``setup(model, trainer)``: which is which
        is told by what they are.

        Raises:
            NoFabric: ``trainer`` is a Fabric.
            NoTrainer: there is a model only; it is a ``TypeError`` too.
            BioinitError: see :meth:`nemo_path` and :meth:`get_trainer_ckpt_path`.
        """
        if not _is_trainer(trainer) and _is_trainer(model):
            trainer, model = model, trainer
        if isinstance(trainer, nn.Module):
            raise NoTrainer(
                f"setup was given a model, {type(trainer).__name__}, where a trainer was expected: "
                "call setup(trainer, model), or setup(model, trainer) as the first generation did."
            )
        for cls in type(trainer).__mro__:
            if cls.__name__ == "Fabric" and cls.__module__.startswith(("lightning", "nemo.")):
                raise NoFabric(
                    f"cannot resume with a {cls.__module__}.Fabric: Fabric is not supported yet. "
                    "Load the checkpoint with bioinit.load_weights, or use a Trainer."
                )
        is_first = self._is_first
        found = self.nemo_path(model) if is_first else self.get_trainer_ckpt_path(model)
        if found:
            trainer.ckpt_path = found
            if trainer.checkpoint_callback is not None:
                trainer.checkpoint_callback.last_model_path = found
            if self.restore_config is not None and self.restore_config.load_artifacts:
                _restore_tokenizer(model, _context_of(found))
        elif self.restore_config is not None:
            self._start_from(self.restore_config, trainer, model)

    def nemo_path(self, model: Any = None) -> Path | None:
        """What to go on with, by the rules of the first generation.

        ``import_path`` is converted by ``model`` and comes back as a NeMo checkpoint. Otherwise it
        is the newest checkpoint of this run, or else ``path``, or None. With an ``adapter_path`` it
        is an :class:`AdapterPath` that says so.

        Raises:
            NotImportable: there is an ``import_path`` and no model to convert it.
            NotFoundError: ``path`` is not there; or there is no checkpoint of this run, and
                ``resume_ignore_no_checkpoint`` is not set.
            BioinitError: see :func:`newest_checkpoint`.
        """
        self._require_one_meaning()
        found: Any
        if self.import_path:
            if self.path or self.dirpath or self.resume_if_exists:
                _log.warning("import_path=%s: nothing else is looked at.", self.import_path)
            found = _imported(self.import_path, model)
        else:
            found = self._of_this_run()
            if found is None and self.path:
                found = _existing(self.path)
        if found is not None and self.adapter_path:
            found = AdapterPath(str(found), adapter_path=self.adapter_path)
        declared: Path | None = found
        return declared

    def get_trainer_ckpt_path(self, model: Any = None) -> Path | None:
        """The weights to go on with, by the rules of the later generations.

        ``resume_from_path`` comes first; if it has no folder of weights it comes back as it was
        given. Then, with ``resume_if_exists``, the newest checkpoint of this run. That of an
        adapter is an :class:`AdapterPath` that says on which model it was trained.

        Raises:
            NotFoundError: ``resume_from_path`` is not there; or there is no checkpoint of this run,
                no ``restore_config``, and ``resume_ignore_no_checkpoint`` is not set.
            BioinitError: see :func:`newest_checkpoint`.
        """
        self._require_one_meaning()
        found: Any
        if self.resume_from_path:
            given = _existing(self.resume_from_path)
            found = self.get_weights_path(given)
            if not found.is_dir():
                if self.adapter_path:
                    return AdapterPath(self.adapter_path, base_model_path=given)
                declared: Path = self.resume_from_path  # type: ignore[assignment]
                return declared
            adapter = given
        else:
            found = self._of_this_run()
            if found is None:
                return None
            inner = self.get_weights_path(found)
            adapter = found = inner if inner.is_dir() else found
        if self.adapter_path:
            return AdapterPath(self.adapter_path, base_model_path=found)
        if (found / ADAPTER_META_FILENAME).exists():
            return AdapterPath(str(adapter), base_model_path=self._base_of_adapter(found))
        weights: Path = found
        return weights

    def get_context_path(self, model: Any = None) -> Path | None:
        """The folder of settings of the checkpoint to go on with, or the checkpoint without one."""
        self._require_one_meaning()
        given = self.resume_from_path
        found = _existing(given) if given else self._of_this_run()
        context: Path | None = None if found is None else _context_of(found)
        return context

    @property
    def _is_first(self) -> bool:
        return any(getattr(self, name) for name in _FIRST)

    def _require_one_meaning(self) -> None:
        if self.path and self.import_path:
            raise Contradiction(
                f"Only one of path or import_path can be set, and path is {self.path!r}, "
                f"import_path {self.import_path!r}. Leave one of them out."
            )
        first = [name for name in _FIRST if getattr(self, name)]
        later = [name for name in _LATER if getattr(self, name)]
        if first and later:
            raise Contradiction(
                f"AutoResume was told {', '.join(first)}, words of its first generation, and "
                f"{', '.join(later)}, of later ones. Use one kind: path is now resume_from_path, "
                "dirpath resume_from_directory, import_path the path of a RestoreConfig."
            )

    def _of_this_run(self) -> Any:
        """The newest checkpoint of this run, if it is to be gone on with and there is one."""
        AppState().restore = self.resume_if_exists
        return self._find_trainer_ckpt_path() if self.resume_if_exists else None

    def _find_trainer_ckpt_path(self) -> Any:
        """The newest checkpoint of this run, or None where its absence is no error.

        Subclasses that know other places override it, so it has its name of old.
        """
        given = self.dirpath or self.resume_from_directory
        home = log_dir()
        if given:
            folder = as_path(given)
        elif home is not None:
            folder = home / "checkpoints"
        else:
            _log.warning(
                "resume_if_exists is set, but neither a folder of checkpoints nor a log_dir is "
                "known: nothing is resumed. Set resume_from_directory, or AppState().log_dir."
            )
            return None
        found = newest_checkpoint(folder, past_end=self.resume_past_end)
        if found is None:
            self._none_in(folder)
        return found

    def _none_in(self, folder: Any) -> None:
        none = f"There were no checkpoints found in {folder}"
        if not folder.is_dir():
            none += ", which is no folder"
        elif (folder / "checkpoints").is_dir():
            none += ": did you mean its checkpoints/"
        start = self.path or self.restore_config
        if self.restore_config is None and not self.resume_ignore_no_checkpoint:
            raise NotFoundError(
                f"cannot resume: {none}. Its folders should end in 'last' or 'end'. Give another "
                "folder, or start anew with resume_ignore_no_checkpoint=True."
            )
        if start:
            _log.info("%s. Starting from %s.", none, start)
        else:
            _log.warning("%s. Training from scratch.", none)

    def _start_from(self, config: RestoreConfig, trainer: Any, model: Any) -> None:
        path = self._extract_path(config.path, model)
        if path.exists():
            path = _existing(path)
        elif config.load_artifacts:
            raise NotFoundError(
                f"cannot start from {config.path}: {path} is not there. Give the folder of a "
                "checkpoint, or convert it first: model.import_ckpt('hf://ORG/NAME')."
            )
        if config.adapter_path:
            inner = self.get_weights_path(config.adapter_path)
            adapter = inner if inner.is_dir() else as_path(config.adapter_path)
            config = replace(config, adapter_path=str(adapter))
        self.restore_config = replace(config, path=str(path))
        trainer.strategy.restore_config = self.restore_config
        if config.load_artifacts:
            _restore_tokenizer(model, _context_of(path))

    def _extract_path(self, path: str, model: Any = None) -> Any:
        """``path`` on this machine: from NeMo's cache of models, or converted by the model."""
        scheme, separator, rest = str(path).partition("://")
        if not separator or scheme == "msc":
            return as_path(path)
        if scheme == _NEMO:
            return models_cache() / rest
        return _imported(str(path), model)

    def _base_of_adapter(self, weights: Any) -> Path:
        """The model on which the adapter in ``weights`` was trained."""
        notes = weights / ADAPTER_META_FILENAME
        try:
            said = json.loads(notes.read_text())["model_ckpt_path"]
            if not said or "\0" in said:
                raise ValueError(f"no path: {said!r}")
            trained_on = Path(said)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptCheckpoint(
                f"{notes} does not say on which model the adapter was trained ({error!r}): it "
                "should be JSON with model_ckpt_path. Write it there, or use another checkpoint."
            ) from error
        if trained_on.exists() and not trained_on.is_dir():
            trained_on = trained_on.parent
        if self.restore_config is not None and "://" not in self.restore_config.path:
            told = Path(self.restore_config.path)
            if told not in (trained_on, trained_on.parent):
                has_moved = told.exists() and not trained_on.exists()
                _log.warning(
                    "restore_config says %s, but the adapter in %s was trained on %s. The %s is "
                    "taken%s.", told, weights, trained_on, "former" if has_moved else "latter",
                    ", since the latter is not there" if has_moved else "",
                )  # fmt: skip
                return Path(told) if has_moved else trained_on
        return trained_on


def _is_trainer(value: Any) -> bool:
    """Whether ``value`` is told what to go on with: it has what every Lightning trainer has."""
    return not isinstance(value, nn.Module) and (
        hasattr(value, "checkpoint_callback") or type(value).__name__ == "Fabric"
    )


def _existing(path: Any) -> Any:
    """``path``, which a person named, if there is a whole checkpoint."""
    found = as_path(path)
    if not found.exists():
        raise NotFoundError(
            f"cannot resume from {path}: it is not there. Give the folder of a checkpoint, or look "
            "for the newest with resume_if_exists=True."
        )
    home = found.parent if found.name == WEIGHTS_PATH else found
    if is_unfinished(home):
        raise Unfinished(
            f"cannot go on with {path}: it was never finished, since its writer left a marker, "
            f"*{UNFINISHED}, beside it. Use an earlier checkpoint, or, if you know that this one "
            "is whole, remove that marker."
        )
    return found


def _imported(source: str, model: Any) -> Any:
    """``source`` as a NeMo checkpoint, converted by the model's importer."""
    if model is None:
        raise NotImportable(
            f"cannot import {source}: Model is needed to import checkpoint from HF or other "
            "non-NeMo checkpoint format. Only NeMo based paths starting with nemo:// are currently "
            "supported without one. Pass the model: setup(trainer, model)."
        )
    if not callable(getattr(model, "import_ckpt", None)):
        raise NotImportable(
            f"cannot import {source}: {type(model).__name__} has no import_ckpt. Only NeMo based "
            "paths starting with nemo:// are currently supported for it. Derive its class from "
            "ConnectorMixin, and register an importer with io.model_importer."
        )
    return as_path(model.import_ckpt(source))


def _context_of(path: Any) -> Any:
    """Where the settings of the checkpoint ``path`` lie; of an adapter, those of its model."""
    if isinstance(path, AdapterPath) and path.base_model_path is not None:
        path = path.base_model_path
    path = as_path(path)
    home = path.parent if path.name == WEIGHTS_PATH else path
    return home / CONTEXT_PATH if (home / CONTEXT_PATH).is_dir() else home


def _restore_tokenizer(model: Any, context: Any) -> None:
    """Give ``model`` the tokenizer that was saved along; say so if there is none."""
    if model is None:
        return
    try:
        tokenizer = load_context(context, subpath="model.tokenizer")
    except (BioinitError, OSError) as error:
        _log.warning("The tokenizer in %s is not restored: %s", context, error)
        return
    model.tokenizer = tokenizer
    if isinstance(model, IOProtocol) and isinstance(tokenizer, IOProtocol):
        model.__io__.tokenizer = tokenizer.__io__
