"""What every test may ask for."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


def pytest_configure() -> None:
    # Many small models: one thread each is faster, and leaves the other core to the reader.
    torch.set_num_threads(1)
    # What tests make is kept in a cache of theirs, not in that of whoever runs them.
    os.environ["BIOINIT_HOME"] = tempfile.mkdtemp(prefix="bioinit-home-")
    os.environ["NEMO_HOME"] = str(Path(os.environ["BIOINIT_HOME"], "nemo"))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["BIOINIT_HOME"], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
    if item.get_closest_marker("dist") and not torch.distributed.is_available():
        pytest.skip("needs torch.distributed, which this torch was built without")


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Checkpoints written by the original software; they lie outside the repository."""
    named = os.environ.get("BIOINIT_FIXTURES")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"no fixtures at {folder}; set BIOINIT_FIXTURES to the folder that holds them")
    return folder
