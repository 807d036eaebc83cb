"""What lies beside the weights of a NeMo 2 checkpoint: ``context/`` and the rest of ``weights/``.

``io.json`` is a :class:`fiddle.Config` of NeMo's ``TrainerContext`` in fiddle's own JSON. Fiddle
would have to import NeMo to write it, so the document is put together here: a table of objects,
each with the places at which it stands, by which NeMo finds ``model`` or ``model.config`` alone.
``model.yaml`` says the same of the model, for people.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import yaml

from bioinit.errors import ConfigError
from bioinit.families._megatron import EXTRA_STATE, extra_states
from bioinit.families.protocol import Written

FRONT = "module."
TOKENIZER_FOLDER = "nemo_tokenizer"
VERSION = "0.0.1"
LIGHTNING = "2.4.0"
"""Lightning looks which version wrote a checkpoint, and migrates what is older than itself."""

_CONTEXT = "context"
_TARGET, _PARTIAL = "_target_", "_partial_"
_CONFIG = "fiddle._src.config"
_LLM = "nemo.collections.llm."
_TOKENIZERS = "nemo.collections.common.tokenizers"
_AUTO = f"{_TOKENIZERS}.huggingface.auto_tokenizer.AutoTokenizer"
_SENTENCEPIECE = f"{_TOKENIZERS}.sentencepiece_tokenizer.SentencePieceTokenizer"
_FAST_OR_SLOW = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
_WORD = re.compile(r"(?<!^)(?=[A-Z][a-z])|(?<=[a-z0-9])(?=[A-Z])")
_NAME = re.compile(r"(torch|megatron|nemo|bionemo|transformer_engine)(\.\w+)+")
"""Texts that are names of Python objects: how our reader gives a function, a class or a dtype."""
_PLAIN = (bool, int, float, str, type(None))


class Ref(NamedTuple):
    """A function, class, dtype or member of an enumeration, by its dotted name."""

    name: str

    @property
    def parts(self) -> tuple[str, str]:
        """Module and name in it: ``torch`` and ``bfloat16``, ``pkg.enums`` and ``Color.RED``."""
        segments = self.name.split(".")
        is_class = (n for n, s in enumerate(segments) if n and s[:1].isupper())
        first = next(is_class, len(segments) - 1)
        return ".".join(segments[:first]), ".".join(segments[first:])


class Call(NamedTuple):
    """An object that is made when the config is built: its class, by name, and its arguments.

    With ``partial``, what is made is a function that makes the object.
    """

    name: str
    arguments: Mapping[str, Any] = {}
    partial: bool = False


def written(
    fields: Mapping[str, Any],
    *,
    config_class: str,
    model_class: str,
    keys: Collection[str],
    num_layers: int,
    tokenizer: Collection[str] = (),
    arguments: Mapping[str, Any] = {},
    unlayered: Collection[str] = (),
    num_experts: int = 0,
) -> Written:
    """A context that NeMo and fiddle load, and what goes with the weights.

    Args:
        fields: of the config, by NeMo's names: plain values, :class:`Ref`, :class:`Call`, or
            what :mod:`bioinit.contexts.nemo2` reads of these.
        config_class: dotted name of the config class.
        model_class: dotted name of the class whose argument ``config`` it is.
        keys: names of the tensors that are written, without ``module.``.
        num_layers: how many layers each of them holds.
        tokenizer: names of the tokenizer's files that the output will hold.
        arguments: further arguments of the model.
        unlayered: modules outside of the layers that have an extra state.
        num_experts: how many experts a tensor of experts holds.
    """
    given = {"config": Call(config_class, _meant(fields)), **arguments}
    folder, called = _tokenizer(tokenizer)
    if called is not None and model_class.startswith(_LLM):
        given["tokenizer"] = called
    model = Call(model_class, given)
    root = Call(
        "nemo.lightning.io.pl.TrainerContext", {"model": model, "trainer": _TRAINER, "extra": {}}
    )
    shown = yaml.safe_dump(_shown(model, "model"), sort_keys=True, allow_unicode=True, width=100)
    objects = extra_states(keys, num_layers, FRONT, num_experts)
    objects |= {f"{FRONT}{module}.{EXTRA_STATE}/shard_0_1": b"" for module in unlayered}
    return Written(
        files={
            f"{_CONTEXT}/io.json": json.dumps(_document(root)).encode(),
            f"{_CONTEXT}/model.yaml": shown.encode(),
        },
        weights="weights",
        front=FRONT,
        objects=objects,
        common={
            "state_dict": {},
            "epoch": 0,
            "global_step": 0,
            "pytorch-lightning_version": LIGHTNING,
        },
        tokenizer=folder,
    )


_TRAINER = Call(
    "nemo.lightning.pytorch.trainer.Trainer",
    {
        "accelerator": "cpu",
        "devices": 1,
        "strategy": Call(
            "nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy",
            {"ckpt_save_optimizer": False, "save_ckpt_format": "torch_dist"},
        ),
    },
)


def _tokenizer(names: Collection[str]) -> tuple[str, Call | None]:
    """The folder of a tokenizer's files, and how NeMo opens them; paths begin at ``context/``."""
    models = sorted(name for name in names if name.endswith(".model"))
    if models and not any(name in names for name in _FAST_OR_SLOW):
        return _CONTEXT, Call(_SENTENCEPIECE, {"model_path": models[0]})
    folder = f"{_CONTEXT}/{TOKENIZER_FOLDER}"
    if not names:
        return folder, None
    return folder, Call(_AUTO, {"pretrained_model_name": TOKENIZER_FOLDER})


def _meant(value: Any) -> Any:
    """``value`` with names and objects in the place of what our reader gives for them."""
    if isinstance(value, str) and _NAME.fullmatch(value):
        return Ref(value)
    if isinstance(value, Mapping):
        inner = {key: _meant(item) for key, item in value.items() if key not in (_TARGET, _PARTIAL)}
        kind = value.get(_TARGET)
        return inner if kind is None else Call(str(kind), inner, bool(value.get(_PARTIAL)))
    if isinstance(value, list | tuple) and not isinstance(value, Ref | Call):
        return type(value)(map(_meant, value))
    return value


def _document(root: Call) -> dict[str, Any]:
    table = _Table()
    reference = table.call(root, "<root>")
    return {
        "root": reference,
        "objects": table.objects,
        "refcounts": dict.fromkeys(table.objects, 1),
        "version": VERSION,
    }


class _Table:
    """The objects of one document, each under a name that nobody else has."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def call(self, call: Call, path: str) -> dict[str, Any]:
        """An object that fiddle reads as a ``Config``."""
        items = [
            [f"Attr(name={name!r})", self.value(value, f"{path}.{name}")]
            for name, value in call.arguments.items()
        ]
        about = self._add(
            "buildable_traverser_metadata",
            {
                "type": _pyref(_CONFIG, "BuildableTraverserMetadata"),
                "items": [
                    ["Attr(name='fn_or_cls')", _pyref(*Ref(call.name).parts)],
                    ["Attr(name='argument_names')", _sequence("tuple", list(call.arguments))],
                    ["Attr(name='argument_tags')", _mapping()],
                    ["Attr(name='argument_history')", _mapping()],
                ],
                "metadata": _pyref(_CONFIG, "BuildableTraverserMetadata"),
            },
        )
        name = _WORD.sub("_", Ref(call.name).parts[1]).lower()
        kind = (
            _pyref("fiddle._src.partial", "Partial") if call.partial else _pyref(_CONFIG, "Config")
        )
        config = {"type": kind, "items": items, "metadata": about}
        return self._add(name, {**config, "paths": [path]})

    def value(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Call):
            return self.call(value, path)
        if isinstance(value, Ref):
            return {**_pyref(*value.parts), "paths": [path]}
        if isinstance(value, _PLAIN):
            return {"type": "leaf", "value": value, "paths": [path]}
        if isinstance(value, Mapping):
            items = [
                [f"Key(key={key!r})", self.value(item, f"{path}[{key!r}]")]
                for key, item in value.items()
            ]
            found = {**_mapping(), "items": items, "metadata": _sequence("tuple", list(value))}
            return self._add("dict", {**found, "paths": [path]})
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            inner = [self.value(item, f"{path}[{number}]") for number, item in enumerate(value)]
            return self._add(kind, {**_sequence(kind, inner), "paths": [path]})
        raise _unsayable(path.removeprefix("<root>."), value)

    def _add(self, name: str, entry: dict[str, Any]) -> dict[str, Any]:
        number = self._counts[name] = self._counts.get(name, 0) + 1
        key = f"{name}_{number}"
        self.objects[key] = entry
        return {"type": "ref", "key": key}


def _pyref(module: str, name: str) -> dict[str, Any]:
    return {"type": "pyref", "module": module, "name": name}


def _sequence(kind: str, values: list[Any]) -> dict[str, Any]:
    items = [[f"Index(index={number})", value] for number, value in enumerate(values)]
    return {"type": _pyref("builtins", kind), "items": items, "metadata": None}


def _mapping() -> dict[str, Any]:
    return {"type": _pyref("builtins", "dict"), "items": [], "metadata": _sequence("tuple", [])}


def _shown(value: Any, at: str) -> Any:
    """``value`` as NeMo writes it into ``model.yaml``."""
    if isinstance(value, Call):
        inner = {name: _shown(item, f"{at}.{name}") for name, item in value.arguments.items()}
        mark = {_PARTIAL: True} if value.partial else {}
        return {_TARGET: value.name, **mark, **inner}
    if isinstance(value, Ref):
        return {_TARGET: value.name, "_call_": False}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {key: _shown(item, f"{at}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(item, f"{at}.{number}") for number, item in enumerate(value)]
    raise _unsayable(at, value)


def _unsayable(at: str, value: Any) -> ConfigError:
    return ConfigError(
        f"{at} is {value!r:.200}, a {type(value).__name__}, and a NeMo 2 context holds numbers, "
        "texts, lists, mappings and names. Set the field to one of these."
    )
