"""Which class converts what: the registry of importers and exporters.

A connector is registered for a model class and a word such as ``hf``. It is found for subclasses
too, the nearest class first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from bioinit.compat._saved import load_context
from bioinit.compat.nemo.ckpt_utils import ADAPTER_META_FILENAME, WEIGHTS_PATH
from bioinit.errors import ConfigError
from bioinit.keys import suggestion

if TYPE_CHECKING:
    from bioinit.compat.nemo.io.connector import ModelConnector

ConnT = TypeVar("ConnT", bound="type[Any]")
_Registry = dict[tuple[type, str], "type[ModelConnector[Any, Any]]"]


class NoConnector(ConfigError, ValueError):
    """Nobody said how a source, or a target, is to be converted for this class of model."""


class WrongModel(ConfigError, ValueError, TypeError):
    """A model of another class than asked for, or none that takes part."""


class AdapterExport(ConfigError, ValueError):
    """A checkpoint of an adapter alone cannot be exported as a whole model."""


class ConnectorMixin:
    """A model class for which importers and exporters can be registered.

    Stands in for ``nemo.lightning.io.mixin.ConnectorMixin``. What differs: a subclass finds its
    parents' connectors; ``hf`` without a path means the connector's ``default_path`` (it meant a
    source called ``None``); only the first ``://`` parts the word from the path.
    """

    _IMPORTERS: ClassVar[_Registry] = {}
    _EXPORTERS: ClassVar[_Registry] = {}

    @classmethod
    def register_importer(
        cls, ext: str, default_path: str | None = None
    ) -> Callable[[ConnT], ConnT]:
        """A decorator: the class below it imports ``ext://...`` for this class of model.

        Args:
            ext: the word before ``://``.
            default_path: the source that is meant where none is given.
        """
        return _registered(cls._IMPORTERS, cls, ext, default_path)

    @classmethod
    def register_exporter(
        cls, ext: str, default_path: str | None = None
    ) -> Callable[[ConnT], ConnT]:
        """A decorator: the class below it exports this class of model as ``ext``."""
        return _registered(cls._EXPORTERS, cls, ext, default_path)

    @classmethod
    def importer(cls, path: str) -> ModelConnector[Any, Any]:
        """The connector that imports ``path``, such as ``hf://ORG/NAME`` or ``hf:///a/folder``.

        Raises:
            NoConnector: none is registered; or no path was given, and it has no default.
        """
        return cls._get_connector(path, importer=True)

    @classmethod
    def exporter(cls, ext: str, path: str | Path) -> ModelConnector[Any, Any]:
        """The connector that exports the checkpoint ``path`` as ``ext``.

        Raises:
            NoConnector: none is registered.
        """
        return cls._get_connector(ext, path, importer=False)

    @classmethod
    def import_from(cls, path: str) -> Self:
        """A new model, with the weights of ``path`` converted; ``ckpt_path`` says where to.

        Raises:
            NoConnector: see :meth:`importer`.
            WrongModel: a parent's connector was found, and it makes a parent.
        """
        connector = cls._get_connector(path)
        output = connector.init()
        if not isinstance(output, cls):
            raise WrongModel(
                f"{type(connector).__name__} makes a {type(output).__name__}, and {cls.__name__} "
                f"was asked for. Register an importer for {cls.__name__} whose init() makes one, "
                "or make it yourself and call its import_ckpt."
            )
        output.ckpt_path = output.import_ckpt(path)  # type: ignore[attr-defined]
        return output

    def import_ckpt(
        self, path: str, overwrite: bool = False, base_path: Path | None = None, **kwargs: Any
    ) -> Path:
        """Convert ``path`` for this model, once, and return the checkpoint's folder.

        Args:
            path: ``hf://ORG/NAME``, ``hf:///a/folder``, or ``hf`` for the default.
            overwrite: convert again, though it has been done.
            base_path: the folder in which it is kept; ``$NEMO_MODELS_CACHE`` if None.
            **kwargs: for the connector's constructor.
        """
        connector = self._get_connector(path, **kwargs)
        converted = connector(connector.local_path(base_path=base_path), overwrite=overwrite)
        connector.on_import_ckpt(self)
        return converted

    @classmethod
    def export_ckpt(
        cls,
        path: str | Path,
        target: str,
        output_path: str | Path | None = None,
        overwrite: bool = False,
        **kwargs: Any,
    ) -> Path:
        """As :func:`export_ckpt`, with this class's exporter, whoever saved ``path``."""
        return export_ckpt(
            path,
            target,
            output_path,
            overwrite,
            load_connector=lambda source, ext: cls.exporter(ext, source),
            **kwargs,
        )

    @classmethod
    def _get_connector(
        cls,
        ext: str | Path,
        path: str | Path | None = None,
        importer: bool = True,
        **kwargs: Any,
    ) -> ModelConnector[Any, Any]:
        word, separator, rest = str(ext).partition("://")
        source = rest if separator else ("" if path is None else str(path))
        registry = cls._IMPORTERS if importer else cls._EXPORTERS
        connector = next((registry[c, word] for c in cls.__mro__ if (c, word) in registry), None)
        if connector is None:
            known = sorted({known for owner, known in registry if issubclass(cls, owner)})
            kind = "importer" if importer else "exporter"
            cures = [
                suggestion(word, known),
                "" if separator or not importer else "Write the source like hf://ORG/NAME.",
                f"Register one: @io.model_{kind}({cls.__name__}, {word!r}). A model of a family of "
                "bioinit needs none: bioinit convert does it.",
            ]
            raise NoConnector(
                f"No connector found for extension '{word}' for {cls}. It has {kind}s for "
                f"{', '.join(map(repr, known)) or 'nothing'}. {' '.join(filter(None, cures))}"
            )
        if source:
            made = connector(source, **kwargs)
            if "://" in source:
                made.address = source
            return made
        if not connector.default_path:
            raise NoConnector(
                f"No default path specified for extension '{word}'. Please provide a path: "
                f"{word}://ORG/NAME."
            )
        return connector(connector.default_path, **kwargs)


def model_importer(
    target: type[ConnectorMixin], ext: str, default_path: str | None = None
) -> Callable[[ConnT], ConnT]:
    """A decorator that registers an importer: stands in for ``nemo.lightning.io.model_importer``.

    Args:
        target: the class of model.
        ext: the word before ``://``.
        default_path: the source that is meant where none is given.
    """
    return _taking_part(target).register_importer(ext, default_path)


def model_exporter(
    target: type[ConnectorMixin], ext: str, default_path: str | None = None
) -> Callable[[ConnT], ConnT]:
    """A decorator that registers an exporter: stands in for ``nemo.lightning.io.model_exporter``.

    Args:
        target: the class of model.
        ext: what it is exported as.
        default_path: the checkpoint that is meant where none is given.
    """
    return _taking_part(target).register_exporter(ext, default_path)


def import_ckpt(
    model: Any,
    source: str,
    output_path: str | Path | None = None,
    overwrite: bool = False,
    **kwargs: Any,
) -> Path:
    """Convert ``source`` for ``model``, once: stands in for ``nemo.lightning.io.import_ckpt``.

    Args:
        model: its class has an importer for ``source``.
        source: ``hf://ORG/NAME``, ``hf:///a/folder``, or ``hf`` for the default.
        output_path: the folder to make; in ``$NEMO_MODELS_CACHE`` if None.
        overwrite: convert again, though it has been done.
        **kwargs: for the connector's ``apply``.

    Returns:
        The checkpoint's folder.

    Raises:
        WrongModel: the class of ``model`` takes no part; it is a ``ValueError`` too.
        NoConnector: see :meth:`ConnectorMixin.importer`.
    """
    if not isinstance(model, ConnectorMixin):
        raise WrongModel(
            f"Model must be an instance of ConnectorMixin, not of {type(model).__name__}. Derive "
            "its class from ConnectorMixin and register an importer for it."
        )
    connector = model.importer(source)
    converted = connector(_given(output_path), overwrite=overwrite, **kwargs)
    connector.on_import_ckpt(model)
    return converted


def load_connector_from_trainer_ckpt(path: str | Path, target: str) -> ModelConnector[Any, Any]:
    """The exporter that the model saved in ``path`` has for ``target``.

    Stands in for ``nemo.lightning.io.api.load_connector_from_trainer_ckpt``.

    Raises:
        WrongModel: its class takes no part.
    """
    model = load_context(Path(path), subpath="model")
    if not isinstance(model, ConnectorMixin):
        raise WrongModel(
            f"Model must be an instance of ConnectorMixin, and {path} holds a "
            f"{type(model).__name__}. Derive its class from ConnectorMixin, or pass load_connector."
        )
    return model.exporter(target, path)


def export_ckpt(
    path: str | Path,
    target: str,
    output_path: str | Path | None = None,
    overwrite: bool = False,
    load_connector: Callable[[Path, str], Any] = load_connector_from_trainer_ckpt,
    modelopt_export_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Path:
    """Write the checkpoint ``path`` as ``target``: stands in for ``nemo.lightning.io.export_ckpt``.

    Args:
        path: the checkpoint's folder.
        target: a word for which the model's class has an exporter, such as ``hf``.
        output_path: the folder to make; ``<path>/<target>`` if None.
        overwrite: export again, though it has been done.
        load_connector: makes the exporter of ``path`` and ``target``.
        modelopt_export_kwargs: not taken: ModelOpt's export of quantized models is not here.
        **kwargs: for the connector's ``apply``.

    Returns:
        The folder.

    Raises:
        AdapterExport: it holds an adapter alone, and ``target`` is ``hf``.
        WrongModel, NoConnector: see :func:`load_connector_from_trainer_ckpt`.
    """
    if modelopt_export_kwargs:
        raise ConfigError(
            f"modelopt_export_kwargs={dict(modelopt_export_kwargs)!r} was given, and models that "
            "ModelOpt quantized are not exported here. Leave it out, or export with NeMo."
        )
    source = Path(path)
    if target == "hf" and (source / WEIGHTS_PATH / ADAPTER_META_FILENAME).exists():
        raise AdapterExport(
            f"{source} contains PEFT weights, an adapter alone, and target 'hf' is for full model "
            "checkpoints. Export it with target='hf-peft', or merge it into its model first."
        )
    exporter = load_connector(source, target)
    place = _given(output_path) or source / target
    converted: Path = exporter(overwrite=overwrite, output_path=place, **kwargs)
    return converted


def _registered(
    registry: _Registry, owner: type, ext: str, default_path: str | None
) -> Callable[[ConnT], ConnT]:
    def register(connector: ConnT) -> ConnT:
        registry[owner, ext] = connector
        if default_path:
            connector.default_path = default_path
        return connector

    return register


def _taking_part(target: Any) -> type[ConnectorMixin]:
    if isinstance(target, type) and issubclass(target, ConnectorMixin):
        return target
    raise WrongModel(
        f"{target!r} takes no connectors: it is no class derived from ConnectorMixin. Derive it."
    )


def _given(path: str | Path | None) -> Path | None:
    return Path(path) if path else None
