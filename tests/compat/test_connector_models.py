"""Connectors as people write them: a model comes in from elsewhere, and goes back."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bioinit
from bioinit.compat import nemo
from bioinit.compat.nemo import io, llm
from bioinit.compat.nemo.io.connector import ConnectorMixin, ModelConnector
from bioinit.errors import ConfigError, StorageError


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.setenv("NEMO_HOME", str(tmp_path / "nemo"))
    monkeypatch.setenv("BIOINIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NEMO_MODELS_CACHE", raising=False)


class Net(nn.Module, io.IOMixin, ConnectorMixin):
    """A model as NeMo has them: made empty, filled by ``configure_model``."""

    def __init__(self, config=None, tokenizer=None):
        super().__init__()
        self.config = config or Config()
        self.tokenizer = tokenizer

    def configure_model(self):
        self.module = nn.Linear(self.config.width, 2)


class Config(io.IOMixin):
    def __init__(self, width=3, fp8="hybrid"):
        self.width = width
        self.fp8 = fp8


@io.model_importer(Net, "hf")
class NetImporter(io.ModelConnector["nn.Linear", Net]):
    def init(self):
        return Net(Config(width=3))

    def apply(self, output_path):
        target = self.init()
        trainer = self.nemo_setup(target)
        self.convert_state(torch.load(self.local_source() / "w.pt"), target)
        self.nemo_save(output_path, trainer)
        return output_path

    def convert_state(self, source, target):
        target.module.load_state_dict({k.removeprefix("lin."): v for k, v in source.items()})


@io.model_exporter(Net, "hf")
class NetExporter(io.ModelConnector[Net, "nn.Linear"]):
    def apply(self, output_path):
        model, _ = self.nemo_load(str(self))
        output_path.mkdir()
        state = {f"lin.{key}": value for key, value in model.module.state_dict().items()}
        torch.save(state, output_path / "w.pt")


@pytest.fixture
def hf(tmp_path):
    folder = tmp_path / "hf" / "net"
    folder.mkdir(parents=True)
    state = {"lin.weight": torch.arange(6.0).reshape(2, 3), "lin.bias": torch.tensor([7.0, 8.0])}
    torch.save(state, folder / "w.pt")
    return folder


def test_there_and_back_is_the_same(tmp_path, hf):
    model = Net.import_from(f"hf://{hf}")
    kept = model.ckpt_path
    assert sorted(p.name for p in kept.iterdir()) == [".made.json", "context", "weights"]
    with bioinit.open_checkpoint(kept) as checkpoint:
        assert set(checkpoint.tensors) == {"module.weight", "module.bias"}
        assert torch.equal(checkpoint.read("module.bias"), torch.tensor([7.0, 8.0]))
    assert io.load_context(kept, subpath="model.config").width == 3
    loaded, trainer = NetExporter(str(kept)).nemo_load(kept)
    assert trainer.lightning_module is loaded and loaded.config.fp8 is None
    back = io.export_ckpt(kept, "hf")
    assert back == kept / "hf"
    again, first = torch.load(back / "w.pt"), torch.load(hf / "w.pt")
    assert all(torch.equal(again[key], first[key]) for key in first)
    assert io.export_ckpt(kept, "hf") == back, "what stands inside of the source is none of it"
    assert Net.export_ckpt(str(kept), "hf", str(tmp_path / "other")) == tmp_path / "other"


def test_resuming_imports_through_the_same_cache(tmp_path, hf):
    trainer = SimpleNamespace(checkpoint_callback=None)
    nemo.AutoResume(import_path=f"hf://{hf}").setup(trainer, Net())
    assert trainer.ckpt_path == tmp_path / "nemo/models/net"
    assert (trainer.ckpt_path / "weights/model.safetensors").is_file()


def test_a_model_that_cannot_be_saved_whole_is_not_saved(tmp_path):
    connector = ModelConnector("x")
    meta = Net()
    with torch.device("meta"):
        meta.configure_model()
    with pytest.raises(ConfigError, match="2 parameters have no values"):
        connector.nemo_save(tmp_path / "o", connector.nemo_setup(meta))
    bare = connector.nemo_setup(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="LightningModule must extend IOMixin"):
        connector.nemo_save(tmp_path / "o", bare)
    connector.nemo_save(tmp_path / "o", bare, dump_io=False)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("o")) == ["o"]
    with pytest.raises(ConfigError, match="its configure_model made none"):
        connector.nemo_setup(nn.Module())


def test_a_save_leaves_nothing_of_what_was_saved_there_before(tmp_path, monkeypatch):
    connector, model = ModelConnector("x"), Net()
    for most in (1, 10**9):
        monkeypatch.setattr(nemo.io._models, "_MAX_SHARD_BYTES", most)
        connector.nemo_save(tmp_path / "o", connector.nemo_setup(model))
    assert [p.name for p in (tmp_path / "o/weights").iterdir()] == ["model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["context", "weights"]


def test_a_save_that_is_stopped_leaves_no_marker_in_the_cache(tmp_path, hf, monkeypatch):
    def stopped(model, folder, most):
        assert len(list(tmp_path.rglob("*-unfinished"))) == 1, "from the first byte on"
        raise ZeroDivisionError

    monkeypatch.setattr(nemo.io._models.plain_module, "save", stopped)
    with pytest.raises(ZeroDivisionError):
        Net.import_from(f"hf://{hf}")
    assert not list((tmp_path / "nemo/models").iterdir())
    with pytest.raises(ZeroDivisionError):
        NetImporter("x").nemo_save(tmp_path / "mine", NetImporter("x").nemo_setup(Net()))
    assert (tmp_path / "mine-unfinished").exists(), "what stands there is not whole"


def test_a_trainer_of_somebody_elses_is_refused(tmp_path):
    connector = ModelConnector("x")
    with pytest.raises(ConfigError, match="no trainer is driven here"):
        connector.nemo_setup(nn.Linear(1, 1), SimpleNamespace())
    with pytest.raises(ConfigError, match="no strategy"):
        connector.nemo_setup(nn.Linear(1, 1), None, ckpt_async_save=False)
    with pytest.raises(ConfigError, match="without a model"):
        connector.nemo_save(tmp_path, nemo.io.connector.Conversion())


def test_models_with_adapters_are_refused(tmp_path, hf):
    kept = Net.import_from(f"hf://{hf}").ckpt_path
    (kept / "weights/adapter_metadata.json").write_text("{}")
    with pytest.raises(ValueError, match="target='hf-peft'"):
        io.export_ckpt(kept, "hf")
    with pytest.raises(ConfigError, match="ModelOpt"):
        io.export_ckpt(kept, "hf", modelopt_export_kwargs={"dtype": "fp8"})


def test_what_holds_no_model_with_connectors_is_not_exported(tmp_path):
    io.TrainerContext(Config(), Config()).io_dump(tmp_path / "context")
    with pytest.raises(ValueError, match="Model must be an instance of ConnectorMixin"):
        io.export_ckpt(tmp_path, "hf")
    with pytest.raises(FileNotFoundError):
        io.export_ckpt(tmp_path / "none", "hf")


def test_llm_refuses_a_place_that_is_taken_text_or_path(tmp_path, hf):
    for place in (tmp_path, str(tmp_path)):
        with pytest.raises(FileExistsError, match="Use overwrite=True to force overwrite"):
            llm.import_ckpt(Net(), f"hf://{hf}", output_path=place)
        with pytest.raises(FileExistsError, match="exists"):
            llm.export_ckpt(hf, "hf", output_path=place)
    kept = llm.import_ckpt(Net(), f"hf://{hf}", output_path=tmp_path / "new")
    assert llm.export_ckpt(kept, "hf", tmp_path / "back") == tmp_path / "back"


def test_what_llm_has_not_says_where_to_look():
    with pytest.raises(AttributeError, match=r"LlamaModel.*families of bioinit"):
        _ = nemo.llm.LlamaModel


def test_a_local_source_is_taken_as_it_is(hf):
    assert ModelConnector(str(hf)).local_source() == hf
    with pytest.raises(StorageError, match="no such file or folder"):
        ModelConnector("/no/where").local_source()


def test_a_name_on_the_hub_is_answered_by_its_cache(tmp_path, monkeypatch):
    repository = tmp_path / "hub/models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c0ffee")
    snapshot = repository / "snapshots/c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = fake_hub(monkeypatch, snapshot)
    assert ModelConnector("org/name").local_source() == snapshot
    assert ModelConnector("org/name@v2").local_source() == snapshot
    assert asked == [("org/name", None, True), ("org/name", "v2", True)]


@pytest.mark.parametrize(
    "files", [["tokenizer.json"], ["a.safetensors", "model.safetensors.index.json"]]
)
def test_a_cache_of_the_hubs_without_all_weights_is_no_answer(tmp_path, monkeypatch, files):
    for name in files:
        (tmp_path / name).write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    asked = fake_hub(monkeypatch, tmp_path)
    assert ModelConnector("org/name").local_source() == tmp_path
    assert [is_local for _, _, is_local in asked] == [True, False]


def fake_hub(monkeypatch, snapshot):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def snapshot_download(name, *, revision=None, local_files_only=False):
        asked.append((name, revision, local_files_only))
        if snapshot is None:
            kind = LocalEntryNotFoundError if local_files_only else OSError
            raise kind("We couldn't connect")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_name_that_cannot_be_fetched_says_what_to_do(monkeypatch):
    asked = fake_hub(monkeypatch, None)
    with pytest.raises(StorageError, match=r"couldn't connect.*give the path of its folder"):
        ModelConnector("org/name").local_source()
    assert [local for _, _, local in asked] == [True, False]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(StorageError, match="huggingface_hub is not installed"):
        ModelConnector("org/name").local_source()


def test_each_tokenizer_gets_a_folder_of_its_own(monkeypatch):
    asked = []

    def from_pretrained(name, **kwargs):
        asked.append((name, kwargs))
        return SimpleNamespace(save_pretrained=lambda folder: Path(folder, "t").write_text(name))

    fake = SimpleNamespace(AutoTokenizer=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    one, two = (ModelConnector("x").save_hf_tokenizer_assets(name) for name in ("a", "b"))
    assert one != two and Path(one, "t").read_text() == "a"
    assert asked == [("a", {}), ("b", {})], "code that it brought along is not run"


def test_taking_down_forgets_the_model():
    trainer = ModelConnector("x").nemo_setup(nn.Linear(1, 1))
    nemo.io.connector.teardown(trainer, trainer.lightning_module)
    assert trainer.lightning_module is None


class Block(nn.Module):
    """Attention as others store it: three matrices."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, rows, bias=False) for rows in (8, 4, 4))


class Elsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Shape()
        self.embed = nn.Embedding(5, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))


class Shape(io.IOMixin):
    num_attention_heads, num_query_groups, kv_channels, hidden_size = 4, 2, 2, 8

    def __init__(self, num_layers=2):
        self.num_layers = num_layers
        self.head_num = 4


class Fused(nn.Module, io.IOMixin, ConnectorMixin):
    """And as this model has it: one."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config or Shape()

    def configure_model(self):
        self.embedding = nn.Embedding(5, 8)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(nn.Module() for _ in range(self.config.num_layers))
        for layer in self.decoder.layers:
            layer.qkv = nn.Linear(8, 16, bias=False)


@io.model_importer(Fused, "elsewhere")
class FusedImporter(io.ModelConnector[Elsewhere, Fused]):
    def init(self):
        return Fused()

    def apply(self, output_path):
        source, target = Elsewhere(), self.init()
        source.load_state_dict(torch.load(self.local_source()))
        trainer = self.nemo_setup(target)
        self.convert_state(source, target)
        self.nemo_save(output_path, trainer)
        return output_path

    def convert_state(self, source, target):
        merge = io.state_transform(
            source_key=("layers.*.q.weight", "layers.*.k.weight", "layers.*.v.weight"),
            target_key="decoder.layers.*.qkv.weight",
            fn=io.TransformFns.merge_qkv,
        )
        mapping = {"embed.weight": "embedding.weight"}
        return io.apply_transforms(source, target, mapping=mapping, transforms=[merge])


@io.model_exporter(Fused, "elsewhere")
class FusedExporter(io.ModelConnector[Fused, Elsewhere]):
    def init(self):
        return Elsewhere()

    def apply(self, output_path):
        source, _ = self.nemo_load(str(self))
        split = io.state_transform(
            source_key="decoder.layers.*.qkv.weight",
            target_key=("layers.*.q.weight", "layers.*.k.weight", "layers.*.v.weight"),
            fn=io.TransformFns.split_qkv,
        )
        target = io.apply_transforms(
            source, self.init(), mapping={"embedding.weight": "embed.weight"}, transforms=[split]
        )
        torch.save(target.state_dict(), output_path)


def test_a_model_comes_in_through_transforms_is_resumed_from_and_goes_back(tmp_path):
    torch.manual_seed(0)
    first = Elsewhere().state_dict()
    torch.save(first, tmp_path / "theirs.pt")
    trainer, model = SimpleNamespace(checkpoint_callback=None), Fused()
    nemo.AutoResume(import_path=f"elsewhere://{tmp_path}/theirs.pt").setup(trainer, model)
    assert trainer.ckpt_path == tmp_path / "nemo/models" / tmp_path.name
    model.configure_model()
    bioinit.load_weights(model, trainer.ckpt_path)
    heads = model.decoder.layers[1].qkv.weight.reshape(2, 4, 2, 8)  # group: two q, one k, one v
    assert torch.equal(heads[:, :2].reshape(8, 8), first["layers.1.q.weight"])
    assert torch.equal(heads[:, 3].reshape(4, 8), first["layers.1.v.weight"])
    back = io.export_ckpt(trainer.ckpt_path, "elsewhere", tmp_path / "back.pt")
    again = torch.load(back)
    assert set(again) == set(first) and all(torch.equal(again[key], first[key]) for key in first)


class WithState(nn.Linear):
    """As Megatron's layers: their state dict holds what is no tensor."""

    def get_extra_state(self):
        return None

    def set_extra_state(self, state):
        pass


class Tied(nn.Module, io.IOMixin):
    def configure_model(self):
        self.module = nn.Sequential(WithState(2, 2), WithState(2, 2))
        self.module[1].weight = self.module[0].weight


def test_what_is_no_tensor_is_not_saved_and_ties_stay(tmp_path):
    connector, model = ModelConnector("x"), Tied()
    connector.nemo_save(tmp_path / "o", connector.nemo_setup(model))
    with bioinit.open_checkpoint(tmp_path / "o") as checkpoint:
        assert len(checkpoint.tensors) == 3
    again, _ = connector.nemo_load(tmp_path / "o")
    assert torch.equal(again.module[1].weight, model.module[1].weight)
    assert again.module[1].weight is again.module[0].weight


def test_weights_of_a_wrapped_model_of_megatrons_are_loaded_into_that(tmp_path, monkeypatch):
    connector, model = ModelConnector("x"), Tied()
    connector.nemo_save(tmp_path / "o", connector.nemo_setup(model))
    monkeypatch.setattr(bioinit.families, "is_megatron", lambda m: isinstance(m, nn.Sequential))
    asked = []
    monkeypatch.setattr(nemo.io._models, "load_weights", lambda m, path: asked.append(m))
    again, _ = connector.nemo_load(tmp_path / "o")
    assert asked == [again.module]
