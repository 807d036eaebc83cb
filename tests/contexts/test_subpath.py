"""Dotted keys into a saved config, of whatever kind."""

from typing import Any

import pytest

from bioinit.contexts._subpath import at
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError

TREE: dict[str, Any] = {
    "model": {
        "_target_": "a.Model",
        "config": {"num_layers": 2, "list": [1, {"x": "y"}], 3: "three", "a.b": {"c.d": 5}},
    },
    "trainer": None,
}
NESTED = Context("nemo2", "io.json", TREE["model"]["config"], None, TREE)
FLAT = Context("hf", "config.json", {"n": 2}, None, {"model": {"n": 2}})


@pytest.mark.parametrize(
    ("subpath", "expected"),
    [
        (None, TREE),
        ("", TREE),
        ("model.config", TREE["model"]["config"]),
        ("model.config.num_layers", 2),
        ("model.config.list.0", 1),
        ("model.config.list.1.x", "y"),
        ("model.config.3", "three"),
        ("model.config.a.b.c.d", 5),
        ("trainer", None),
    ],
)
def test_a_subpath_leads_to_what_was_saved(subpath: str | None, expected: Any) -> None:
    assert at(NESTED, subpath) == expected


@pytest.mark.parametrize("subpath", ["model", "model.config"])
def test_model_config_means_the_model_where_that_has_no_config(subpath: str) -> None:
    assert at(FLAT, subpath) == {"n": 2} and at(FLAT, f"{subpath}.n") == 2


@pytest.mark.parametrize(
    ("context", "subpath", "says"),
    [
        (NESTED, "modl", r"the top there is no 'modl'.*'model'.*There is: model, trainer\."),
        (NESTED, "model.config.num_layer", "'num_layers'"),
        (NESTED, "model.config.list.2", "There is: 0, 1"),
        (NESTED, "model.config.list.-1", "There is: 0, 1"),
        (NESTED, "model.config.num_layers.x", "a single value"),
        (NESTED, "model.", "There is: config"),
        (NESTED, "trainer.strategy", "a single value"),
        (FLAT, "model.config.config", "at model.config there is no 'config'"),
    ],
)
def test_a_missing_subpath_is_an_error_that_lists_what_there_is(
    context: Context, subpath: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        at(context, subpath)


def test_a_long_list_of_what_there_is_ends_somewhere() -> None:
    many = Context("x", "f", {}, None, {f"k{i}": i for i in range(10_000)})
    with pytest.raises(ConfigError, match="and 9600 more") as raised:
        at(many, "nothing")
    assert len(str(raised.value)) < 5000
