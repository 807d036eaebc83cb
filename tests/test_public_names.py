"""The front door: what is promised is there, and nothing else is."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bioinit

HEAVY = set("torch numpy pydantic hydra omegaconf rich fiddle transformers yaml".split())
PROMISED = (
    "compose plan initialize load_weights open_checkpoint load_context partial LoadPlan LoadReport "
    "TrainableModelConfig Run BioinitError ConfigError CheckpointError CorruptCheckpoint PlanError "
    "RefusedCheckpoint UnknownFormat AmbiguousFormat UnfinishedCheckpoint MappingError "
    "StorageError"
).split()


def names_for_type_checkers() -> set[str]:
    tree = ast.parse(Path(bioinit.__file__).read_text())
    [block] = [
        n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
    ]
    return {alias.name for node in block.body for alias in node.names}


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_everything_promised_is_public():
    assert set(PROMISED) <= set(bioinit.__all__)


def test_the_list_is_sorted_and_without_repetition():
    assert bioinit.__all__ == sorted(set(bioinit.__all__))


@pytest.mark.parametrize("name", bioinit.__all__)
def test_every_public_name_can_be_had(name):
    assert getattr(bioinit, name) is not None


def test_type_checkers_see_the_same_names():
    assert names_for_type_checkers() | {"__version__"} == set(bioinit.__all__)


def test_dir_shows_the_public_names():
    assert set(bioinit.__all__) <= set(dir(bioinit))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'initialise'"):
        bioinit.initialise  # noqa: B018


@pytest.mark.parametrize("name", ["plan", "initialize"])
def test_a_room_of_the_same_name_does_not_hide_the_function(name):
    room = importlib.import_module(f"bioinit.{name}")
    assert sys.modules[f"bioinit.{name}"] is room
    assert callable(getattr(bioinit, name))


def test_integrations_are_there_when_asked_for():
    statement = "import bioinit; bioinit.integrations.nemo_run.partial"
    assert "nemo_run" not in modules_after(statement)
    with pytest.raises(AttributeError, match="no attribute 'slurm'"):
        bioinit.integrations.slurm  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    assert not modules_after("import bioinit") & HEAVY


def test_importing_every_public_name_imports_no_extra():
    statement = "import bioinit; [getattr(bioinit, name) for name in bioinit.__all__]"
    assert not modules_after(statement) & {"transformers", "nemo_run", "huggingface_hub"}
