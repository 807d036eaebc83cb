"""A person's own module: constructed without memory, initialized by its own constructor."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bioinit.backends import module as backend
from bioinit.errors import ConfigError

CLASSES = 3


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, CLASSES)


class Net(nn.Module):
    """Uses every way in which people give parameters their first value."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8, padding_idx=0)
        self.token = nn.Parameter(torch.randn(1, 8) * 0.02)
        self.scale = nn.Parameter(torch.ones(8), requires_grad=False)
        self.head = Head()
        nn.init.constant_(self.head.proj.bias, 3.0)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.embed.weight
        self.mask = nn.Buffer(torch.tensor([1.0, 0.0]), persistent=False)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)


class Unfinished(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.done = nn.Linear(2, 2)
        self.forgotten = nn.Parameter(torch.empty(4))


class Watch:
    def __init__(self) -> None:
        self.named: dict[str, torch.Tensor] = {}
        self.paths: list[str] = []

    def entering(self, path: str) -> None:
        self.paths.append(path)

    def stands_for(self, tensor: torch.Tensor, key: str) -> None:
        self.named[key] = tensor


def keys(model: nn.Module) -> set[str]:
    return {key for key, _ in model.named_parameters(remove_duplicate=False)}


def new_values(make, new: set[str]) -> tuple[dict[str, torch.Tensor], Watch]:
    model, watch = make(), Watch()
    return dict(backend.initialize(model, make, keys(model) - new, watch)), watch


def test_parameters_are_on_meta_and_buffers_are_real():
    model = backend.build(Net)
    assert all(p.is_meta for p in model.parameters())
    assert model.mask.tolist() == [1.0, 0.0]


def test_ties_and_what_needs_no_gradient_survive():
    model = backend.build(Net)
    assert model.out.weight is model.embed.weight
    assert not model.scale.requires_grad and model.token.requires_grad


def test_one_parameter_registered_twice_is_one_parameter():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = nn.Parameter(torch.zeros(2))
            self.one, self.other = shared, shared

    model = backend.build(Shared)
    assert model.one is model.other


def test_modules_built_outside_are_left_alone():
    backend.build(Net)
    assert not nn.Linear(2, 2).weight.is_meta


def test_new_parameters_get_what_the_constructor_gives_them():
    values, _ = new_values(Net, {"token", "scale", "head.proj.weight", "head.proj.bias"})
    assert (values["head.proj.bias"] == 3.0).all()
    assert (values["scale"] == 1.0).all()
    assert 0.0 < values["token"].abs().max() < 0.2
    assert values["head.proj.weight"].std() < 0.1, "apply() has the last word, as in the module"


def test_only_what_is_new_is_made():
    values, watch = new_values(Net, {"head.proj.weight"})
    assert values.keys() == watch.named.keys() == {"head.proj.weight"}
    assert watch.named["head.proj.weight"].shape == (CLASSES, 8)


def test_a_new_tied_weight_comes_once_although_one_of_its_names_is_called_loaded():
    values, _ = new_values(Net, {"embed.weight"})
    assert values.keys() == {"embed.weight"}
    assert (values["embed.weight"] == 0).sum() == 0, "apply() went over the tied linear layer"


def test_nothing_is_constructed_when_nothing_is_new():
    def refuse() -> nn.Module:
        raise AssertionError("constructed again")

    assert backend.initialize(Net(), refuse, keys(Net()), Watch()) == {}


def test_what_the_constructor_leaves_unwritten_is_not_a_value():
    values, watch = new_values(Unfinished, {"forgotten", "done.weight"})
    assert values.keys() == {"done.weight"}
    assert "forgotten" in watch.named


def test_the_settings_of_torch_are_as_before():
    before = torch.are_deterministic_algorithms_enabled()
    new_values(Net, {"token"})
    assert torch.are_deterministic_algorithms_enabled() == before


def test_random_values_can_be_named_before_they_are_drawn():
    _, watch = new_values(Net, {"token", "head.proj.weight"})
    assert list(dict.fromkeys(watch.paths)) == ["", "head.proj"]


def test_a_constructor_that_changes_is_refused():
    made = iter(range(100))

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(1 + next(made)))

    model = Growing()
    with pytest.raises(ConfigError, match="not repeatable"):
        backend.initialize(model, Growing, set(), Watch())


def test_a_constructor_that_reads_its_parameters_is_told_why_it_cannot():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.norm = float(self.fc.weight.sum())

    with pytest.raises(ConfigError, match="before its parameters have any"):
        backend.build(Reads)


def test_what_is_no_module_is_refused():
    with pytest.raises(ConfigError, match="gave a dict"):
        backend.build(dict)


def test_saving_writes_tied_tensors_once_and_splits_files(tmp_path):
    model = Net()
    backend.save(model, tmp_path, 10**9)
    stored = load_file(tmp_path / "model.safetensors")
    assert "out.weight" not in stored and torch.equal(stored["embed.weight"], model.embed.weight)
    split = tmp_path / "split"
    split.mkdir()
    backend.save(model, split, 150)
    index = json.loads((split / "model.safetensors.index.json").read_text())
    held = {k: name.name for name in split.glob("*.safetensors") for k in load_file(name)}
    assert held == index["weight_map"] and len(set(held.values())) > 1


def test_the_rule_of_an_initial_value_has_a_name():
    assert backend.describe_init(Net(), "head.proj.bias") == "the constructor of Net (Linear)"
