"""Published models by the names that NeMo's converter takes, held against our presets."""

from __future__ import annotations

from typing import Any, NamedTuple

from omegaconf import OmegaConf

from bioinit.convert.source import Source
from bioinit.errors import ConfigError
from bioinit.keys import suggestion
from bioinit.recipe import sources
from bioinit.record import coerce, shown

_META = "meta-llama/"
MODELS = {
    f"{_META}Llama-2-7b-hf": ("llama", "llama2_7b"),
    f"{_META}Llama-2-13b-hf": ("llama", "llama2_13b"),
    f"{_META}Llama-2-70b-hf": ("llama", "llama2_70b"),
    f"{_META}Meta-Llama-3-8B": ("llama", "llama3_8b"),
    f"{_META}Meta-Llama-3-70B": ("llama", "llama3_70b"),
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", "mixtral_8x7b"),
    "mistralai/Mixtral-8x22B-v0.1": ("mixtral", "mixtral_8x22b"),
    "mistralai/Mistral-7B-v0.1": ("mistral", "mistral_7b"),
    "nvidia/nemotron-3-8b-base-4k": ("nemotron", "nemotron3_8b"),
    "nemotron4-22b": ("nemotron", "nemotron3_22b"),
    "nemotron4-15b": ("nemotron", "nemotron4_15b"),
    "nemotron4-340b": ("nemotron", "nemotron4_340b"),
}
"""Family and preset by id."""

_OF_TRAINING = ("seq_length", "init_method_std", "attention_dropout", "hidden_dropout")
"""Fields in which a model may differ from the published one and still be it."""


class Difference(NamedTuple):
    """A field whose value is not that of the preset."""

    field: str
    value: Any
    wanted: Any

    def __str__(self) -> str:
        return f"{self.field} is {shown(self.value)!r}, the preset has {shown(self.wanted)!r}"


def check_model_id(model_id: str, source: Source) -> tuple[str, ...]:
    """Hold the source's config against the preset of ``model_id``.

    Returns:
        Sentences on differences that concern training alone.

    Raises:
        ConfigError: no such id, another family, or another architecture; all differences are
            listed.
    """
    if model_id not in MODELS:
        raise ConfigError(
            f"model_id={model_id!r} is none of the published models that are known: "
            f"{', '.join(MODELS)}. {suggestion(model_id, MODELS)}".rstrip()
        )
    family, preset = MODELS[model_id]
    if family != source.name:
        raise ConfigError(
            f"{model_id} is a model of the family {family!r}, and the source is of "
            f"{source.name!r}. Give the id of the model that it is, or leave --model-id out."
        )
    if preset not in sources.options("model"):
        raise ConfigError(
            f"there is no preset {preset!r} for {model_id} yet. Leave --model-id out."
        )
    path = sources.shipped("conf") / "model" / f"{preset}.yaml"
    cls = type(source.config)
    differences = []
    tree = OmegaConf.to_container(sources.parse(path, f"the preset {preset}").tree)
    assert isinstance(tree, dict)
    for field, value in tree.items():
        have, wanted = getattr(source.config, str(field)), coerce(cls, str(field), value)
        if have != wanted:
            differences.append(Difference(str(field), have, wanted))
    said = tuple(f"not as {model_id}: {difference}" for difference in differences)
    if any(difference.field not in _OF_TRAINING for difference in differences):
        raise ConfigError(
            f"the source is not {model_id}: {'; '.join(map(str, differences))}. Correct the config "
            "that was given, or leave --model-id out if it is meant to be another model."
        )
    return said
