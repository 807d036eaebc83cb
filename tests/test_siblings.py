"""The lists that folders are, and what other packages add to them."""

from importlib.metadata import EntryPoint

import pytest

from bioinit import backends, contexts, families, formats
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError

CORRIDORS = {room.__name__: room for room in (formats, contexts, backends, families)}
each_corridor = pytest.mark.parametrize("room", CORRIDORS.values(), ids=CORRIDORS)


@pytest.fixture
def plug_in(monkeypatch):
    def add(room, name, value):
        siblings = room.SIBLINGS
        entry = EntryPoint(name, value, siblings.package)
        monkeypatch.setitem(vars(siblings), "plug_ins", {name: entry})

    return add


@each_corridor
def test_every_name_is_a_sibling_of_the_right_kind(room):
    assert room.names() and "protocol" not in room.names()
    assert all(isinstance(room.load(name), room.SIBLINGS.kind) for name in room.names())


@each_corridor
def test_a_name_that_there_is_not_is_answered_with_the_closest(room):
    name = room.names()[0]
    with pytest.raises(ConfigError, match=f"there is no .*Closest: '{name}'"):
        room.load(f"{name}x")


@each_corridor
def test_a_plug_in_that_does_not_import_is_named_when_it_is_asked_for(room, plug_in):
    plug_in(room, "broken", "no_such_package.at_all:THING")
    assert room.names()[-1] == "broken"
    with pytest.raises(ConfigError, match=r"'broken'.*no_such_package.*uninstall"):
        room.load("broken")


@each_corridor
def test_a_plug_in_of_another_kind_is_refused(room, plug_in):
    plug_in(room, "strange", "json:dumps")
    with pytest.raises(ConfigError, match=r"'strange' is a function, not a"):
        room.load("strange")


@each_corridor
def test_a_plug_in_cannot_take_the_name_of_a_file(room, plug_in):
    plug_in(room, room.names()[0], "json:dumps")
    with pytest.raises(ConfigError, match="takes the name"):
        room.names()


def test_a_family_that_does_not_import_hides_no_other(plug_in):
    plug_in(families, "broken", "no_such_package.at_all:FAMILY")
    context = Context("hf", "config.json", {"model_type": "bert"}, "bert")
    with pytest.warns(RuntimeWarning, match=r"'broken'.*left out"):
        assert families.find(context, ()) == "bert"
