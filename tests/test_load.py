"""Loading: bytes straight into place, exactly, and nothing half-done in the caller's hands."""

import os
import re
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bioinit
from bioinit.errors import ConfigError, CorruptCheckpoint, PlanError, StorageError
from bioinit.load.memory import HUGE_PAGE, allocate
from bioinit.load.parameters import FullySharded
from bioinit.storage import File

CPU = torch.device("cpu")


class Small(nn.Module):
    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, dtype=dtype)
        self.layers = nn.ModuleList([nn.Linear(6, 6, dtype=dtype) for _ in range(4)])
        self.wide = nn.Linear(6, 300_000, bias=False, dtype=dtype)
        self.head = nn.Linear(6, 11, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)


def on_meta(dtype=torch.float32) -> Small:
    with torch.device("meta"):
        model = Small(dtype)
    model.head.weight = model.embed.weight
    model.scale = torch.tensor(0.5)
    return model


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    torch.manual_seed(3)
    state = {k: v.detach().clone() for k, v in Small().state_dict().items() if k != "head.weight"}
    path = tmp_path_factory.mktemp("stored") / "model.safetensors"
    save_file(state, path)
    return path, state


def assert_holds(model, state, dtype=None):
    for key, wanted in state.items():
        got = model.state_dict()[key]
        wanted = wanted.to(dtype) if dtype is not None and wanted.is_floating_point() else wanted
        assert torch.equal(got, wanted), key


def test_a_module_on_meta_gets_exactly_the_stored_bytes(stored):
    path, state = stored
    model = on_meta()
    report = bioinit.load_weights(model, path)
    assert_holds(model, state)
    assert report.bytes_read == sum(t.nbytes for t in state.values())
    assert model.head.weight is model.embed.weight


def test_a_module_with_memory_is_filled_where_it_lies(stored):
    path, state = stored
    model = Small()
    before = {k: (id(p), p.data_ptr()) for k, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bioinit.load_weights(model, path)
    assert_holds(model, state)
    assert before == {k: (id(p), p.data_ptr()) for k, p in model.named_parameters()}
    assert optimizer.param_groups[0]["params"][0] is model.embed.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_on_the_way_is_the_cast_torch_makes(stored, dtype):
    path, state = stored
    for model in (on_meta(dtype), Small(dtype)):
        bioinit.load_weights(model, path)
        assert_holds(model, state, dtype)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_parameter_that_is_not_contiguous_is_filled_too(stored, device):
    path, state = stored
    model = on_meta() if device == "meta" else Small()
    model.wide.weight = nn.Parameter(torch.zeros(6, 300_000, device=device).t())
    assert not model.wide.weight.is_contiguous()
    bioinit.load_weights(model, path)
    assert_holds(model, state)
    assert model.wide.weight.stride() == (1, 300_000)


def test_channels_last_on_meta_keeps_its_layout_and_its_values(tmp_path):
    weight = torch.randn(4, 3, 5, 5)
    save_file({"weight": weight, "bias": torch.zeros(4)}, tmp_path / "conv.safetensors")
    conv = nn.Conv2d(3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    bioinit.load_weights(conv, tmp_path / "conv.safetensors")
    assert torch.equal(conv.weight, weight)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_memory_with_overlaps_is_given_a_layout_of_its_own(tmp_path):
    save_file({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "w.safetensors")
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(3, device="meta").expand(2, 3))
    bioinit.load_weights(module, tmp_path / "w.safetensors")
    assert torch.equal(module.w, torch.arange(6.0).reshape(2, 3))


def test_stored_views_come_out_right(tmp_path):
    base = torch.arange(600_000.0).reshape(1000, 600)
    views = {
        "turned": base.t(),
        "column": base[:, 7],
        "stripe": base[::3, 100:400:2],
        "same": base,
        "scalar": base[3, 4],
        "empty": base[:0],
    }
    torch.save(views, tmp_path / "views.pt")

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in views.items():
                self.register_parameter(name, nn.Parameter(torch.zeros(value.shape)))

    model = Views()
    bioinit.load_weights(model, tmp_path / "views.pt")
    for name, value in views.items():
        assert torch.equal(getattr(model, name), value), name


def test_skipped_bytes_are_not_read(stored):
    path, state = stored
    model = Small()
    kept = model.wide.weight.detach().clone()
    report = bioinit.load_weights(model, path, skip_prefixes=("wide",))
    assert torch.equal(model.wide.weight, kept)
    assert report.bytes_read == sum(t.nbytes for k, t in state.items() if k != "wide.weight")


def test_what_is_new_on_meta_is_initialized_by_name_and_seed(stored):
    path, _ = stored

    def start(seed, skip=("wide", "head.bias")):
        model = on_meta()
        bioinit.load_weights(model, path, skip_prefixes=skip, seed=seed)
        return model

    state = torch.random.get_rng_state()
    one, again, other = start(0), start(0), start(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.wide.weight, again.wide.weight)
    assert not torch.equal(one.wide.weight, other.wide.weight)
    assert 0 < one.wide.weight.std() < 1 and torch.isfinite(one.head.bias).all()
    # Its values depend on nothing else: with more of the model new, they are the same.
    assert torch.equal(start(0, ("wide", "head.bias", "layers")).wide.weight, one.wide.weight)


def test_the_mapping_a_person_gives_is_taken(stored, tmp_path):
    _, state = stored
    renamed = {f"net.{k}": v for k, v in state.items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    model = on_meta()
    bioinit.load_weights(model, tmp_path / "renamed.safetensors", mapping={"net.**": "**"})
    assert_holds(model, state)


def test_a_wrapper_prefix_is_solved_and_said(stored, tmp_path):
    _, state = stored
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "w.safetensors")
    model = on_meta()
    report = bioinit.load_weights(model, tmp_path / "w.safetensors")
    assert_holds(model, state)
    assert "without 'module.' in front" in report.to_json()["notes"][0]


def test_a_plan_with_problems_touches_nothing(stored, tmp_path):
    _, state = stored
    save_file({k: v for k, v in state.items() if k != "head.bias"}, tmp_path / "m.safetensors")
    model = Small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(PlanError, match=r"head\.bias") as caught:
        bioinit.load_weights(model, tmp_path / "m.safetensors")
    assert caught.value.problems[0].key == "head.bias"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tied_copies_that_differ_are_a_problem(stored, tmp_path):
    _, state = stored
    other = state["embed.weight"] + 1
    save_file({**state, "head.weight": other}, tmp_path / "t.safetensors")
    model = on_meta()
    with pytest.raises(PlanError, match="copies differ"):
        bioinit.load_weights(model, tmp_path / "t.safetensors")
    assert all(p.is_meta for p in model.parameters())
    save_file({**state, "head.weight": state["embed.weight"].clone()}, tmp_path / "s.safetensors")
    bioinit.load_weights(on_meta(), tmp_path / "s.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_found_if_asked(stored, tmp_path, value):
    _, state = stored
    poisoned = {k: v.clone() for k, v in state.items()}
    poisoned["wide.weight"][299_999, 5] = value
    save_file(poisoned, tmp_path / "p.safetensors")
    bioinit.load_weights(on_meta(), tmp_path / "p.safetensors")
    model = on_meta()
    with pytest.raises(PlanError, match=r"wide\.weight.*NaN or Inf"):
        bioinit.load_weights(model, tmp_path / "p.safetensors", check_finite=True)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(PlanError) as caught:
        bioinit.load_weights(Small(), tmp_path / "p.safetensors", check_finite=True)
    assert "not as it was" in caught.value.__notes__[0]


def broken(path, tmp_path):
    """A checkpoint whose file gets shorter between its header and its bytes."""
    copy = tmp_path / "short.safetensors"
    copy.write_bytes(path.read_bytes())
    return copy


def test_a_read_that_fails_leaves_a_meta_module_on_meta(stored, monkeypatch):
    path, _ = stored
    failing(monkeypatch)
    model = on_meta()
    with pytest.raises(StorageError, match="gone"):
        bioinit.load_weights(model, path)
    assert all(p.is_meta for p in model.parameters())
    assert model.head.weight is model.embed.weight


def test_a_read_that_fails_says_which_parameters_changed(stored, monkeypatch):
    path, _ = stored
    failing(monkeypatch)
    with pytest.raises(StorageError) as caught:
        bioinit.load_weights(Small(), path)
    assert "not as it was" in caught.value.__notes__[0]
    assert "embed.weight" in caught.value.__notes__[0]


def failing(monkeypatch):
    original = File.read_into

    def read_into(self, offset, buffers):
        if sum(memoryview(b).nbytes for b in buffers) > 1_000_000:
            raise StorageError("the disk is gone")
        return original(self, offset, buffers)

    monkeypatch.setattr(File, "read_into", read_into)


def test_a_file_that_shrinks_meanwhile_is_an_error_with_its_name(stored, tmp_path, monkeypatch):
    path, _ = stored
    copy = broken(path, tmp_path)
    original = File.read_into

    def read_into(self, offset, buffers):
        os.truncate(copy, 5000)
        return original(self, offset, buffers)

    with bioinit.open_checkpoint(copy):
        pass
    size = copy.stat().st_size
    monkeypatch.setattr(
        File, "read_into", lambda s, o, b: read_into(s, o, b) if o else original(s, o, b)
    )
    with pytest.raises(CorruptCheckpoint, match=r"short\.safetensors"):
        bioinit.load_weights(on_meta(), copy)
    assert copy.stat().st_size < size


def test_a_buffer_nobody_can_compute_is_a_problem_not_left_over_memory(stored):
    path, _ = stored
    with torch.device("meta"):
        model = Small()
    model.head.weight = model.embed.weight
    with pytest.raises(PlanError, match="'scale'"):
        bioinit.load_weights(model, path)
    assert model.embed.weight.is_meta


def test_patterns_decide_what_is_trained(stored):
    path, _ = stored
    model = on_meta()
    report = bioinit.load_weights(
        model, path, trainable=("head.*", "layers.**"), frozen=("layers.0.*",)
    )
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"layers.{i}.{n}" for i in (1, 2, 3) for n in ("weight", "bias")} | {
        "head.bias",
        "embed.weight",  # tied to head.weight, which a pattern names
    }
    assert report.trainable == 3 * 42 + 11 + 66


def test_freezing_one_parameter_thaws_no_other(stored):
    model = on_meta()
    model.wide.weight.requires_grad_(False)
    bioinit.load_weights(model, stored[0], frozen=("head.bias",))
    assert not model.wide.weight.requires_grad and not model.head.bias.requires_grad
    assert model.embed.weight.requires_grad


def test_cures_speak_the_words_of_the_call(stored):
    with pytest.raises(PlanError) as caught:
        bioinit.load_weights(on_meta(), stored[0], skip_prefixes=("hed",))
    [problem] = caught.value.problems
    assert "skip_prefixes" in problem.cure and "init." not in problem.cure


def test_one_text_for_the_prefixes_is_an_error(stored):
    with pytest.raises(ConfigError, match="letters"):
        bioinit.load_weights(on_meta(), stored[0], skip_prefixes="head")


def test_names_outside_the_mapping_stay_as_they_are(stored, tmp_path):
    _, state = stored
    renamed = {k.replace("layers.", "blocks."): v for k, v in state.items()}
    save_file(renamed, tmp_path / "partly.safetensors")
    model = on_meta()
    bioinit.load_weights(model, tmp_path / "partly.safetensors", mapping={"blocks.**": "layers.**"})
    assert_holds(model, state)


def test_a_pattern_that_matches_nothing_is_a_problem(stored):
    with pytest.raises(PlanError, match="matches no parameter"):
        bioinit.load_weights(on_meta(), stored[0], frozen=("layers",))


def test_an_unknown_policy_is_an_error_with_the_closest_name(stored):
    with pytest.raises(ConfigError, match="on_missing"):
        bioinit.load_weights(on_meta(), stored[0], on_mising="init")


def test_every_parameter_owns_its_storage(stored, tmp_path):
    path, _ = stored
    model = on_meta()
    bioinit.load_weights(model, path)
    storages = [p.untyped_storage() for p in model.parameters()]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    for parameter, storage in zip(model.parameters(), storages, strict=True):
        assert storage.nbytes() == parameter.nbytes
    torch.save(model.layers[0].weight, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 5000


def test_large_memory_begins_on_a_huge_page_and_is_writable():
    tensor = allocate((3 * HUGE_PAGE // 4 + 5,), torch.float32, CPU)
    assert tensor.data_ptr() % HUGE_PAGE == 0
    tensor.fill_(1.0)
    assert tensor.sum() == tensor.numel()


def test_attributes_and_gradients_of_a_parameter_survive(stored):
    path, _ = stored
    model = on_meta()
    model.wide.weight.tensor_model_parallel = True
    model.wide.weight.requires_grad_(False)
    bioinit.load_weights(model, path)
    assert model.wide.weight.tensor_model_parallel is True
    assert not model.wide.weight.requires_grad and model.embed.weight.requires_grad


def test_progress_adds_up_to_the_bytes_to_read(stored):
    path, state = stored
    seen, threads = [], set()
    bioinit.load_weights(
        on_meta(),
        path,
        progress=lambda d, t: (seen.append((d, t)), threads.add(threading.get_ident())),
    )
    total = sum(t.nbytes for t in state.values())
    assert seen[-1] == (total, total) and [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_the_callers_thread_count_is_left_alone(stored):
    before = torch.get_num_threads()
    bioinit.load_weights(on_meta(torch.bfloat16), stored[0])
    assert torch.get_num_threads() == before


def test_a_model_can_be_trained_after_loading(stored):
    model = on_meta()
    bioinit.load_weights(model, stored[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = model.head.bias.detach().clone()
    model.head(model.layers[0](model.embed(torch.tensor([1, 2])))).sum().backward()
    optimizer.step()
    assert not torch.equal(model.head.bias, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_on_meta_is_loaded_onto_a_gpu(stored, dtype):
    path, state = stored
    model = on_meta(dtype)
    bioinit.load_weights(model, path, device="cuda")
    assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    for key, wanted in state.items():
        wanted = wanted.to(dtype) if wanted.is_floating_point() else wanted
        assert torch.equal(model.state_dict()[key].cpu(), wanted), key


@pytest.mark.gpu
def test_new_parameters_on_a_gpu_leave_its_random_state_alone(stored):
    before = torch.cuda.get_rng_state()
    bioinit.load_weights(on_meta(), stored[0], skip_prefixes=("wide",), device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_a_torch_that_keeps_shards_in_another_way_is_refused(monkeypatch):
    from torch.distributed import fsdp

    class Sharded(nn.Linear):
        def _get_fsdp_state(self):
            return self

    monkeypatch.setattr(fsdp, "FSDPModule", Sharded)
    module = Sharded(2, 2, device="meta")
    with pytest.raises(ConfigError, match=f"torch {re.escape(torch.__version__)} keeps .*_groups"):
        FullySharded(module)
    # What is kept of a parameter is asked for, too, before anything is allocated.
    parameter = type("Kept", (), {"sharded_param": module.weight})()
    group = type("Group", (), {"fsdp_params": [parameter]})()
    module._fsdp_param_groups = [group]
    with pytest.raises(ConfigError, match="padded_sharded_param_size"):
        FullySharded(module)
