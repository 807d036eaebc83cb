"""What IOMixin and track_io keep. The values in the tables are those of nemo-toolkit 2.2.1."""

import functools
import subprocess
import sys
import threading
import types
from dataclasses import dataclass, field
from pathlib import Path

import fiddle as fdl
import pytest
import torch

from bioinit.compat import nemo
from bioinit.compat.nemo import io
from bioinit.compat.nemo.io.capture import IOProtocol, ReInitProtocol
from bioinit.compat.nemo.io.mixin import IOMixin
from bioinit.errors import ConfigError


class Point(io.IOMixin):
    def __init__(self, a, b=2):
        self.a = a
        self.b = b


class Child(Point):
    def __init__(self, c, d=4):
        super().__init__(c + 1)
        self.c = c


class Heir(Point):
    """Inherits its constructor."""


@dataclass
class Settings(io.IOMixin):
    x: int = 1
    names: list = field(default_factory=lambda: ["n"])

    def __post_init__(self):
        self.twice = self.x * 2


@dataclass
class MoreSettings(Settings):
    y: int = 5


@dataclass(frozen=True)
class Frozen(io.IOMixin):
    a: int = 1


@dataclass
class Plain:
    u: int = 1
    v: list = field(default_factory=list)
    w: int = field(init=False, default=3)


class Anything(io.IOMixin):
    def __init__(self, a, **kw):
        self.a = a
        self.kw = kw


class Sequence(io.IOMixin):
    def __init__(self, a, /, b=0, *rest, k=1):
        self.given = (a, b, rest, k)


class Holder(io.IOMixin):
    def __init__(self, p, q=None):
        self.p = p
        self.q = q


class Module(io.IOMixin, torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = torch.nn.Linear(width, width)


class Foreign:
    def __init__(self, a, b=3):
        self.a = a
        self.b = b


io.track_io(Foreign)


class ForeignChild(Foreign):
    def __init__(self, z):
        super().__init__(z * 2)


class ForeignHeir(Foreign):
    pass


class OldStyle:
    def __init__(self, a, b=2):
        self.a = a


class Mixed(io.IOMixin, OldStyle):
    pass


class MixedWithTracked(io.IOMixin, Foreign):
    pass


class Empty(io.IOMixin):
    pass


def kept(value):
    return (fdl.get_callable(value.__io__), dict(value.__io__.__arguments__))


TABLE = {
    "positional": (lambda: Point(1), Point, {"a": 1}),
    "equal to the default": (lambda: Point(a=1, b=2), Point, {"a": 1, "b": 2}),
    "inherited constructor": (lambda: Heir(1), Heir, {"a": 1}),
    "dataclass, nothing given": (lambda: Settings(), Settings, {}),
    "dataclass": (lambda: Settings(3, ["m"]), Settings, {"x": 3, "names": ["m"]}),
    "only *args declared": (lambda: Sequence(1), Sequence, {0: 1}),
    "a class as argument": (lambda: Holder(Plain, Point), Holder, {"p": Plain, "q": Point}),
    "tracked": (lambda: Foreign(1), Foreign, {"a": 1}),
    "tracked, inherited constructor": (lambda: ForeignHeir(1), ForeignHeir, {"a": 1}),
    "constructor of a later base": (lambda: Mixed(1, b=4), Mixed, {"a": 1, "b": 4}),
    "constructor of a later base, tracked": (
        lambda: MixedWithTracked(1, b=4),
        MixedWithTracked,
        {"a": 1, "b": 4},
    ),
    "no constructor": (lambda: Empty(), Empty, {}),
    "module of torch": (lambda: Module(3), Module, {"width": 3}),
}
MENDED = {  # the original failed, lost the arguments, or nested them one level deeper
    "child with a constructor of its own": (lambda: Child(1), Child, {"c": 1}),
    "child dataclass": (lambda: MoreSettings(3, y=2), MoreSettings, {"x": 3, "y": 2}),
    "frozen dataclass": (lambda: Frozen(2), Frozen, {"a": 2}),
    "**kw": (lambda: Anything(1, z=2), Anything, {"a": 1, "z": 2}),
    "*args": (lambda: Sequence(1, 2, 3, 4, k=5), Sequence, {0: 1, "b": 2, 2: 3, 3: 4, "k": 5}),
}


@pytest.mark.parametrize(
    "made, kind, arguments", {**TABLE, **MENDED}.values(), ids=[*TABLE, *MENDED]
)
def test_what_was_given_is_kept(made, kind, arguments):
    Point(0), Settings()  # a parent that was made before changes nothing
    assert kept(made()) == (kind, arguments)


@pytest.mark.parametrize(
    "made",
    [Anything(1, z=2), Sequence(1, 2, 3, k=4), Child(1, d=5)],
    ids=lambda made: type(made).__name__,
)
def test_an_object_is_made_again_from_what_was_given(made):
    copied = made
    for _ in range(3):
        copied = io.reinit(copied)
    assert type(copied) is type(made)
    assert vars(copied) | {"__io__": 0} == vars(made) | {"__io__": 0}


def test_reinit_makes_another_object_with_its_own_defaults():
    first = Settings(3)
    again = io.reinit(first)
    assert again is not first
    assert (again.x, again.twice, again.names) == (3, 6, ["n"])
    assert again.names is not first.names


def test_a_thousand_objects_do_not_wrap_a_constructor_a_thousand_times():
    assert len([Point(i, i) for i in range(1001)]) == 1001
    assert not hasattr(Point.__init__.__wrapped__, "__wrapped__")


def test_the_outermost_constructor_is_what_is_kept_in_any_order():
    class First(io.IOMixin):
        def __init__(self, a):
            self.a = a

    class Second(First):
        def __init__(self, b, c=0):
            super().__init__(a=b * 10)
            self.friend = First(b)

    child = Second(1, c=2)
    First(3)
    assert kept(Second(4)) == (Second, {"b": 4})
    assert kept(child) == (Second, {"b": 1, "c": 2})
    assert kept(child.friend) == (First, {"a": 1})


def test_a_constructor_that_fails_leaves_nothing_behind():
    class Failing(io.IOMixin):
        def __init__(self, fail):
            if fail:
                raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Failing(True)
    assert kept(Failing(False)) == (Failing, {"fail": False})


def test_threads_do_not_disturb_one_another():
    found = []

    def work(number):
        found.extend(kept(Child(number))[1]["c"] == number for _ in range(50))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 200


def test_arguments_that_do_not_fit_are_the_errors_of_python():
    with pytest.raises(TypeError, match="unexpected keyword argument 'zz'"):
        Point(1, zz=2)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        Point()


def test_a_child_and_its_parent_share_one_record():
    child = Point(1)
    parent = Holder(child, child)
    assert parent.__io__.p is child.__io__ and parent.__io__.q is child.__io__
    child.__io__.b = 9
    assert io.reinit(parent).p.b == 9


def test_a_dataclass_is_kept_as_a_record_all_through():
    record = Holder(Plain(4, [Plain(5), {"k": (Plain(6),)}])).__io__.p
    inner = [fdl.Config(Plain, u=5, v=[]), {"k": (fdl.Config(Plain, u=6, v=[]),)}]
    assert fdl.get_callable(record) is Plain
    assert dict(record.__arguments__) == {"u": 4, "v": inner}


def test_objects_in_lists_and_mappings_stay_what_they_are():
    point = Point(1)
    assert Holder([point]).__io__.p[0] is point


def test_a_constructor_called_again_is_kept_again():
    point = Point(1)
    point.__init__(5)
    assert kept(point) == (Point, {"a": 5})


def test_hooks_of_a_class_have_the_last_word():
    class Hooked(io.IOMixin):
        def __init__(self, a, secret=None):
            self.a = a

        def io_transform_args(self, init_fn, *args, **kwargs):
            found = super().io_transform_args(init_fn, *args, **kwargs)
            found.pop("secret", None)
            return found

        def io_init(self, **kwargs):
            return super().io_init(**{**kwargs, "a": kwargs["a"] + 1})

    assert kept(Hooked(1, secret="s")) == (Hooked, {"a": 2})


def test_what_cannot_be_kept_is_a_runtime_error_as_it_was():
    class Odd(io.IOMixin):
        def __init__(self, a):
            pass

        def io_transform_args(self, init_fn, *args, **kwargs):
            return {"b": 1}

    with pytest.raises(RuntimeError, match=r"Error creating fdl\.Config for Odd") as raised:
        Odd(1)
    assert isinstance(raised.value, ConfigError)


def test_reinit_asks_the_object_first():
    class Knows:
        def reinit(self):
            return "made"

    assert io.reinit(Knows()) == "made"
    assert isinstance(Knows(), ReInitProtocol)


def test_reinit_refuses_what_does_not_know_how_it_was_made():
    with pytest.raises(ValueError, match="does not have a __io__ attribute") as raised:
        io.reinit(Plain())
    assert "track_io(Plain)" in str(raised.value)


def test_the_protocol_is_that_there_is_a_record():
    assert isinstance(Point(1), IOProtocol)
    assert isinstance(Foreign(1), IOProtocol)
    assert not isinstance(Plain(), IOProtocol)
    assert not isinstance(Point, IOProtocol)


def test_a_child_of_a_tracked_class_keeps_nothing_until_it_is_tracked():
    assert not hasattr(ForeignChild(1), "__io__")

    class Tracked(Foreign):
        def __init__(self, z):
            super().__init__(z)

    io.track_io(Tracked)
    assert kept(Tracked(1)) == (Tracked, {"z": 1})


def test_tracking_twice_wraps_once_and_keeps_the_artifacts():
    class Twice:
        def __init__(self, a=1):
            pass

    mark = io.artifact.FileArtifact("a")
    assert io.track_io(Twice, artifacts=[mark]) is Twice
    wrapped = Twice.__init__
    assert io.track_io(Twice).__init__ is wrapped
    assert Twice.__io_artifacts__ == [mark]


def test_tracking_a_module_takes_the_classes_that_are_defined_in_it():
    class Inside:
        def __init__(self, a):
            pass

    class Imported:
        def __init__(self, a):
            pass

    module = types.ModuleType("a_module_of_a_test")
    Inside.__module__ = module.__name__
    module.Inside, module.Imported, module.number = Inside, Imported, 3
    assert io.track_io(module) is module
    assert kept(Inside(2)) == (Inside, {"a": 2})
    assert not hasattr(Imported(2), "__io__")
    assert io.is_known("a_module_of_a_test." + Inside.__qualname__)


def test_a_class_without_a_place_for_a_record_is_not_tracked():
    class Narrow:
        __slots__ = ("a",)

        def __init__(self, a):
            self.a = a

    with pytest.raises(TypeError, match="Narrow has __slots__"):
        io.track_io(Narrow)
    module = types.ModuleType(Narrow.__module__)
    module.Narrow = Narrow
    assert io.track_io(module).Narrow(3).a == 3


@pytest.mark.parametrize("kind", [int, str, dict, type(None)])
def test_plain_types_are_not_tracked(kind):
    assert io.track_io(kind) is kind


@pytest.mark.parametrize("target", ["text", 3, functools.partial(Point, 1), kept])
def test_only_classes_and_modules_are_tracked(target):
    with pytest.raises(TypeError, match="Target must be a module or a class"):
        io.track_io(target)


def test_the_names_are_where_people_import_them_from():
    assert nemo.io is io
    assert io.IOMixin is IOMixin
    assert io.mixin.track_io is io.track_io
    assert io.capture.reinit is io.reinit
    assert io.api.load_context is io.load_context
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        io.nothing_of_the_kind  # noqa: B018
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        nemo.nothing_of_the_kind  # noqa: B018


@pytest.mark.parametrize("module", [nemo, io, io.api, io.mixin, io.capture, io.pl, io.artifact])
def test_every_name_that_is_promised_is_there(module):
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert len(module.__all__) > 2


def test_importing_needs_nothing_of_other_systems():
    code = (
        "import sys, bioinit.compat.nemo as nemo, bioinit.compat.nemo.io as io\n"
        "import bioinit.compat.bionemo, bioinit.compat.labml\n"
        "[getattr(m, n) for m in (nemo, io, io.api, io.mixin, io.pl) for n in m.__all__]\n"
        "others = 'nemo lightning megatron transformers labml nemo_run cloudpickle'.split()\n"
        "print(sorted({n.split('.')[0] for n in sys.modules} & set(others)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (done.stdout, done.stderr) == ("[]\n", "")
