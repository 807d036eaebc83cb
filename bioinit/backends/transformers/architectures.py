"""Which transformers class a model is: by class name, or by task and model type.

Everything is looked up in transformers' own tables by plain names; a checkpoint cannot add to them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from bioinit.backends import transformers as backend
from bioinit.backends.protocol import MOST_LABELS
from bioinit.errors import ConfigError
from bioinit.keys import suggestion

TASKS = {
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token_classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "regression": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "body": "MODEL_MAPPING_NAMES",
}
"""Names of tasks, and the table of transformers that gives the class for a model type."""

_REFUSED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)
"""What constructors of transformers and torch raise for values that they cannot use."""


def config_class(model_type: str | None) -> Any:
    """The config class of transformers for a ``model_type``.

    Raises:
        ConfigError: transformers has none.
    """
    known: Any = backend.imported("transformers").CONFIG_MAPPING
    if model_type not in known:
        version = backend.imported().__version__
        raise ConfigError(
            f"transformers {version} has no model type {model_type!r}. "
            f"{suggestion(str(model_type), known)} If the model is your own, subclass "
            "bioinit.TrainableModelConfig and write configure_model()."
        )
    return known[model_type]


def make_config(cls: Any, fields: Mapping[str, Any]) -> Any:
    """The config object that transformers makes of plain ``fields``, which stay untouched.

    Raises:
        ConfigError: transformers refuses a value.
    """
    strict = backend.imported("huggingface_hub.errors")
    refused = (*_REFUSED, strict.StrictDataclassError)
    try:
        # Constructors of configs fill in nested mappings in place.
        given = {key: _listed(copy.deepcopy(value)) for key, value in fields.items()}
        return cls(**given)
    except refused as error:
        raise ConfigError(
            f"transformers refuses this {cls.__name__}: {_said(error)}. Correct the model's fields."
        ) from error


@functools.cache
def names(model_type: str) -> tuple[str, ...]:
    """The classes of transformers for a model type, heads included, as its tables list them."""
    tables: Any = backend.imported("transformers.models.auto.modeling_auto")
    found: dict[str, None] = {}
    for name, table in vars(tables).items():
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES"):
            classes = table.get(model_type, ())
            found |= dict.fromkeys((classes,) if isinstance(classes, str) else classes)
    return tuple(sorted(found))


def tasks(model_type: str) -> tuple[str, ...]:
    """The tasks for which transformers has a class of a model type."""
    return tuple(task for task in TASKS if _class_for(task, model_type) is not None)


def model_class(model_type: str, architecture: str) -> Any:
    """The class that ``architecture``, a class name or a task, means for a model type.

    Raises:
        ConfigError: there is none, or it is a class of another model type.
    """
    name = _class_for(architecture, model_type) or architecture
    cls: Any = getattr(backend.imported(), name, None)
    wanted = config_class(model_type)
    is_model = (
        isinstance(cls, type)
        and issubclass(cls, backend.imported().PreTrainedModel)
        and "forward" in {n for kind in cls.__mro__ if kind is not nn.Module for n in vars(kind)}
    )
    if is_model and cls.config_class is not None and issubclass(wanted, cls.config_class):
        return cls
    choices = (*tasks(model_type), *names(model_type))
    reason = (
        f"a class for {cls.config_class.model_type!r}"
        if is_model and cls.config_class is not None
        else "no such class of transformers, nor a task that this type has"
    )
    raise ConfigError(
        f"model.architecture={architecture!r} is {reason}; the model type is {model_type!r}. "
        f"{suggestion(architecture, choices)} Choose one of: {', '.join(choices)}."
    )


def construct(cls: Any, config: Any) -> nn.Module:
    """``cls(config)``; call it inside ``backend.build``.

    Raises:
        ConfigError: the config does not fit the class.
    """
    try:
        model: nn.Module = cls(config)
    except _REFUSED as error:
        raise ConfigError(
            f"{cls.__name__} cannot be built from this config: {_said(error)}. Correct the "
            "model's fields."
        ) from error
    return model


def head_fields(
    architecture: str, num_labels: int | None, labels: tuple[str, ...] | None
) -> dict[str, Any]:
    """What a chosen head size, names of labels, or the task ``regression`` mean for a config."""
    if num_labels is not None and num_labels > MOST_LABELS:
        raise ConfigError(
            f"num_labels={num_labels} is more than a head can have here, {MOST_LABELS}. Set "
            "model.num_labels to the number of classes."
        )
    found: dict[str, Any] = {}
    if architecture == "regression":
        num_labels = num_labels or 1
        found["problem_type"] = "regression"
    if labels is None and num_labels is not None:
        labels = tuple(f"LABEL_{i}" for i in range(num_labels))
    if labels is not None:
        found["id2label"] = dict(enumerate(labels))
        found["label2id"] = {label: i for i, label in enumerate(labels)}
    return found


def _said(error: BaseException) -> str:
    """What an error says, without the stack that torch's C++ adds and the lines of a table."""
    text = str(error).split("\nException raised from")[0]
    lines = text.split("\n") if isinstance(error, RuntimeError) else [text]
    return " ".join(lines[0].split()) or type(error).__name__


def _class_for(task: str, model_type: str) -> str | None:
    tables: Any = backend.imported("transformers.models.auto.modeling_auto")
    found = getattr(tables, TASKS[task]).get(model_type) if task in TASKS else None
    return found if found is None or isinstance(found, str) else found[0]


def _listed(value: Any) -> Any:
    """Transformers writes lists where our configs hold tuples."""
    if isinstance(value, tuple | list):
        return [_listed(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return value
