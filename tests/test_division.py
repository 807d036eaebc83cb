"""``parallelize=fn``: a person's own way to divide the model, and what it may not do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import bioinit
from bioinit.errors import ConfigError
from tests.processes import together


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("division") / "llama"
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def start(folder: Path | str, fn: Callable[[nn.Module], nn.Module | None], *said: str) -> object:
    path = f"model.initial_ckpt_path={folder}"
    record = bioinit.compose("llama/causal_lm", [path, *said])
    return bioinit.initialize(record, parallelize=fn)


def transposed(model: nn.Module) -> None:
    held = model.lm_head.weight
    turned = torch.empty(held.shape[::-1], device="meta", dtype=held.dtype).t()
    model.lm_head.weight = nn.Parameter(turned)


def test_a_layout_that_it_chooses_is_kept_and_filled_rightly(llama):
    whole = start(llama, lambda model: None).model.lm_head.weight
    turned = start(llama, transposed).model.lm_head.weight
    assert turned.stride() == (1, 64)
    assert torch.equal(turned, whole)


def test_a_head_of_another_size_is_the_mismatch_that_it_is(llama):
    def widened(model: nn.Module) -> None:
        model.lm_head = nn.Linear(32, 65, bias=False, device="meta")

    with pytest.raises(bioinit.PlanError, match=r"lm_head\.weight"):
        start(llama, widened)


def test_names_that_the_model_does_not_have_are_refused(llama):
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    with pytest.raises(ConfigError, match=r"Wrapped that has 'inner\.model\.embed_tokens"):
        start(llama, Wrapped)


def test_what_is_no_module_is_refused(llama):
    with pytest.raises(ConfigError, match="parallelize gave 5, which is no module"):
        start(llama, lambda model: 5)


def test_a_mesh_beside_it_is_refused(llama):
    with pytest.raises(ConfigError, match=r"placement\.strategy='ddp' is set, and parallelize="):
        start(llama, transposed, "placement.strategy=ddp")


def sharded(dim: int) -> Callable[[nn.Module], None]:
    def divide(model: nn.Module) -> None:
        mesh = init_device_mesh("cpu", (2,))
        held = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(dim)])
        model.lm_head.weight = nn.Parameter(held)

    return divide


def started_alike(folder: str) -> bool:
    whole = start(folder, lambda model: None, "placement.parallel_load=on").model.lm_head.weight
    held = start(folder, sharded(0)).model.lm_head.weight
    own = whole.chunk(2)[torch.distributed.get_rank()]
    return torch.equal(held.to_local(), own) and held.shape == whole.shape


def started_apart(folder: str) -> None:
    start(folder, sharded(torch.distributed.get_rank()))


def started_with_one_output(folder: str, output: str) -> None:
    rank = torch.distributed.get_rank()
    said = [f"output_dir={output}"] if rank == 0 else []
    start(folder, lambda model: None, *said)


def started_singly(folder: str, output: str) -> None:
    path = f"model.initial_ckpt_path={folder}"
    single = "placement.strategy=single"
    assert bioinit.initialize(bioinit.compose("llama/causal_lm", [path, single])).model
    record = bioinit.compose("llama/causal_lm", [path, single, f"output_dir={output}"])
    with pytest.raises(ConfigError, match="single is a process by itself, and 2 were started"):
        bioinit.initialize(record)


def among_two(folder: str, output: str) -> bool:
    started_singly(folder, output)
    alike = started_alike(folder)
    for wrong, says in (
        (lambda: started_apart(folder), "ranks do not divide lm_head.weight"),
        (lambda: started_with_one_output(folder, output), "output_dir"),
    ):
        with pytest.raises(ConfigError, match=says):
            wrong()
    return alike


@pytest.mark.dist
def test_two_ranks_divide_alike_or_hear_that_they_do_not(llama, tmp_path):
    assert together(2, among_two, str(llama), str(tmp_path / "out")) == [True, True]
    assert not list(tmp_path.iterdir())
