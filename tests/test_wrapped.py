"""Names that a training wrapper changed, on models whose names and layouts transformers changes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import bioinit
from tests.checkpoints import MODELS, write

PREFIXES = {"esm2": "esm.", "bert": "bert.", "llama": "model.", "mixtral": "model.",
            "gpt_neox": "gpt_neox."}  # fmt: skip


def infix(name: str) -> str:
    head, dot, rest = name.partition(".")
    return f"{head}._fsdp_wrapped_module{dot}{rest}"


WRAPS = {
    "module.": lambda name, model: f"module.{name}",
    "model.": lambda name, model: f"model.{name}",
    "module.model.": lambda name, model: f"module.model.{name}",
    "_orig_mod.": lambda name, model: f"_orig_mod.{name}",
    "an infix": lambda name, model: infix(name),
    "an infix and module.": lambda name, model: f"module.{infix(name)}",
    "no base prefix": lambda name, model: name.removeprefix(PREFIXES[model]),
}


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    for name in MODELS:
        write(root / name, name)
    return root


def wrapped(plain, folder, model, layout, wrap):
    source = plain / model / layout
    (folder / "config.json").write_text((source / "config.json").read_text())
    if layout == "bin":
        state = torch.load(source / "pytorch_model.bin", weights_only=True)
        state = {wrap(name, model): tensor for name, tensor in state.items()}
        torch.save(state, folder / "pytorch_model.bin")
    else:
        state = load_file(source / "model.safetensors")
        state = {wrap(name, model): tensor for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def reference(plain, model):
    return MODELS[model][0].from_pretrained(plain / model / "safetensors", dtype="auto")


def started(path, *overrides):
    record = bioinit.compose("auto/as_saved", [f"model.initial_ckpt_path={path}", *overrides])
    return bioinit.initialize(record)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("model", MODELS)
def test_a_wrapped_checkpoint_gives_the_model_that_the_plain_one_gives(
    plain, tmp_path, model, wrap, layout
):
    done = started(wrapped(plain, tmp_path, model, layout, WRAPS[wrap]))
    assert {c.claim for c in done.report.claims} <= {"loaded", "tied"} and not done.plan.unused
    assert len(done.plan.notes) == 1 and "stored names are read" in done.plan.notes[0]
    expected = reference(plain, model).state_dict()
    found = done.model.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("wrap", ["module.", "model.", "an infix"])
def test_what_is_written_afterwards_is_spelled_like_the_plain_checkpoint(plain, tmp_path, wrap):
    (tmp_path / "in").mkdir()
    source = wrapped(plain, tmp_path / "in", "mixtral", "safetensors", WRAPS[wrap])
    started(source, f"output_dir={tmp_path / 'out'}")
    expected = load_file(plain / "mixtral" / "safetensors" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mixtral"
