"""Every bad input: one clear message, the promised exit code, and nothing under a final name.

All of these go through the command line in a process of its own, as a person would meet them.
"""

import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bioinit import cli
from tests.checkpoints import write

USAGE, PLAN, CHECKPOINT, STORAGE = 2, 3, 4, 5


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine")
    write(root, "bert")
    return root


@pytest.fixture
def ckpt(pristine, tmp_path):
    """A copy of a good checkpoint, for the test to spoil."""
    for layout in ("safetensors", "sharded", "bin", "bin_sharded"):
        shutil.copytree(pristine / layout, tmp_path / layout)
    return tmp_path


@pytest.fixture
def run(capsys, tmp_path):
    """Run a command; returns its exit code and what it said on stderr."""

    def command(*words):
        code = cli.main(list(map(str, words)))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.err

    return command


def init(run, path, *words, recipe="auto/as_saved"):
    return run("init", f"recipe={recipe}", f"model.initial_ckpt_path={path}", *words)


def assert_refused(result, code, *said):
    got, message = result
    assert got == code, message
    for part in said:
        assert part in message


def test_a_missing_path(run, ckpt):
    assert_refused(init(run, ckpt / "nowhere"), STORAGE, "nowhere", "Check the path")


def test_a_name_on_the_hub(run):
    assert_refused(init(run, "facebook/esm2_t6_8M_UR50D"), STORAGE, "hf download")


def test_an_empty_directory(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(init(run, tmp_path / "empty"), CHECKPOINT, "empty")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_a_truncated_file(run, ckpt, keep):
    file = ckpt / "safetensors" / "model.safetensors"
    os.truncate(file, keep)
    assert_refused(init(run, file.parent), CHECKPOINT, "model.safetensors")


@pytest.mark.parametrize("layout", ["bin", "bin_sharded"])
def test_a_truncated_pickle(run, ckpt, layout):
    file = sorted((ckpt / layout).glob("*.bin"))[0]
    os.truncate(file, file.stat().st_size // 2)
    assert_refused(init(run, file.parent), CHECKPOINT, file.name)


@pytest.mark.parametrize("byte", [0, 7, 9, 40])
def test_a_flipped_bit_in_the_header(run, ckpt, byte):
    file = ckpt / "safetensors" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[byte] ^= 0x80
    file.write_bytes(data)
    assert_refused(init(run, file.parent), CHECKPOINT, "model.safetensors")


def edit_header(file, change):
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_offsets_that_leave_the_file_or_overlap(run, ckpt):
    file = ckpt / "safetensors" / "model.safetensors"

    def beyond(header):
        name = sorted(k for k in header if k != "__metadata__")[-1]
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [begin + 10**9, end + 10**9]

    edit_header(file, beyond)
    assert_refused(init(run, file.parent), CHECKPOINT)


def test_offsets_that_overlap(run, ckpt):
    file = ckpt / "safetensors" / "model.safetensors"

    def overlap(header):
        names = [k for k in header if k != "__metadata__"]
        same = [k for k in names if header[k]["shape"] == header[names[-1]]["shape"]]
        header[same[0]]["data_offsets"] = header[same[-1]]["data_offsets"]

    edit_header(file, overlap)
    assert_refused(init(run, file.parent), CHECKPOINT)


def test_an_index_that_names_a_missing_shard(run, ckpt):
    shard = sorted((ckpt / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(init(run, ckpt / "sharded"), CHECKPOINT, shard.name)


def test_a_shard_with_tensors_the_index_lacks(run, ckpt):
    index = ckpt / "sharded" / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    name = sorted(document["weight_map"])[0]
    del document["weight_map"][name]
    index.write_text(json.dumps(document))
    assert_refused(init(run, ckpt / "sharded"), CHECKPOINT, name)


def test_an_index_that_leads_out_of_the_checkpoint(run, ckpt):
    index = ckpt / "sharded" / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    name = sorted(document["weight_map"])[0]
    document["weight_map"][name] = "../safetensors/model.safetensors"
    index.write_text(json.dumps(document))
    assert_refused(init(run, ckpt / "sharded"), CHECKPOINT, "../safetensors")


def spoil(ckpt, change):
    file = ckpt / "safetensors" / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})
    return file.parent


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(run, ckpt, value):
    key = "bert.encoder.layer.1.output.dense.weight"
    path = spoil(ckpt, lambda state: state[key].view(-1)[7:8].fill_(value))
    assert_refused(init(run, path, "init.check_finite=true"), PLAN, key, "NaN or Inf")
    assert init(run, path)[0] == 0


def test_integers_where_floats_are_wanted(run, ckpt):
    key = "bert.encoder.layer.1.output.dense.weight"
    path = spoil(ckpt, lambda state: state.update({key: state[key].int()}))
    assert_refused(init(run, path), PLAN, key, "int32")


def test_a_head_of_another_size(run, ckpt, tmp_path):
    path = ckpt / "safetensors"
    assert (
        init(
            run,
            path,
            "model.num_labels=3",
            f"output_dir={tmp_path / 'three'}",
            recipe="bert/token_classification",
        )[0]
        == 0
    )
    result = init(
        run,
        tmp_path / "three",
        "model.num_labels=5",
        "init.new=[classifier.**]",
        recipe="auto/token_classification",
    )
    assert_refused(result, PLAN, "classifier.weight", "[3, 32]", "[5, 32]")


def test_a_vocabulary_of_another_size(run, ckpt):
    result = init(
        run, ckpt / "bin", "model.vocab_size=120", "model.override_parent_fields=[vocab_size]"
    )
    assert_refused(result, PLAN, "[100, 32]", "[120, 32]", "resize")


def test_a_prefix_without_a_hit(run, ckpt):
    result = init(
        run, ckpt / "bin", "model.initial_ckpt_skip_keys_with_these_prefixes=[bert.encodr]"
    )
    assert_refused(result, PLAN, "bert.encodr", "bert.encoder")


def test_a_misspelt_override(run, ckpt):
    assert_refused(init(run, ckpt / "bin", "init.sed=3"), USAGE, "init.sed", "seed")
    assert_refused(
        init(run, ckpt / "bin", "model.hiden_size=3"), USAGE, "hiden_size", "hidden_size"
    )
    assert_refused(init(run, ckpt / "bin", "outptu_dir=x"), USAGE, "outptu_dir")


@pytest.mark.parametrize("word", ["+init.seed=3", "++init.seed=3", "+init.typo=3", "~init.seed"])
def test_a_plus_override(run, ckpt, word):
    assert_refused(init(run, ckpt / "bin", word), USAGE, word)


def test_an_override_of_a_computed_field(run, ckpt, tmp_path, monkeypatch):
    (tmp_path / "mine_computed.py").write_text(
        "from dataclasses import dataclass, field\n"
        "from bioinit import TrainableModelConfig\n"
        "@dataclass(kw_only=True)\n"
        "class Mine(TrainableModelConfig):\n"
        "    width: int = 4\n"
        "    area: int = field(init=False, default=0)\n"
    )
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model:\n  _target_: mine_computed.Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert_refused(run("plan", f"recipe={recipe}", "model.area=3"), USAGE, "area", "compute")


def test_a_conflicting_field(run, ckpt):
    result = init(run, ckpt / "bin", "model.hidden_dropout_prob=0.5")
    assert_refused(result, PLAN, "hidden_dropout_prob", "0.5", "0.1", "override_parent_fields")


def test_remote_code_is_refused(run, ckpt):
    config = ckpt / "bin" / "config.json"
    document = json.loads(config.read_text())
    config.write_text(json.dumps({**document, "auto_map": {"AutoModel": "evil.Model"}}))
    assert_refused(init(run, ckpt / "bin"), CHECKPOINT, "auto_map")


def test_a_quantized_checkpoint_is_refused(run, ckpt):
    config = ckpt / "bin" / "config.json"
    document = json.loads(config.read_text())
    quantized = {**document, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    config.write_text(json.dumps(quantized))
    assert_refused(init(run, ckpt / "bin"), CHECKPOINT, "quantiz")


def test_a_bare_adapter_is_refused(run, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x"}))
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    assert_refused(init(run, folder), CHECKPOINT, "adapter")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_tries_to_run_code(run, ckpt, tmp_path, zipped):
    marker, out = tmp_path / "ran", tmp_path / "out"
    file = ckpt / "bin" / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    torch.save({**state, "evil": Evil(marker)}, file, _use_new_zipfile_serialization=zipped)
    code, message = init(run, ckpt / "bin", f"output_dir={out}")
    assert not marker.exists()
    assert code == 0, message
    notes = json.loads((out / "receipt.json").read_text())["notes"]
    assert [note for note in notes if "run code: evil (posix.system)" in note]


def test_what_is_left_out_is_named_in_the_plan(ckpt, tmp_path, capsys):
    folder = ckpt / "bin_sharded"
    (folder / "training_args.bin").write_bytes(b"x")
    first, second, *_ = sorted(folder.glob("pytorch_model-*.bin"))
    for file, name in ((first, "evil"), (second, "worse")):
        state = torch.load(file, weights_only=True)
        torch.save({**state, name: Evil(tmp_path / "ran")}, file)
    code = cli.main(["plan", "recipe=auto/as_saved", f"model.initial_ckpt_path={folder}"])
    printed = capsys.readouterr().out
    assert code == 0 and "evil (posix.system), worse (posix.system)" in printed
    assert "training_args.bin (training state or an adapter)" in printed


def test_a_tensor_that_needs_code_is_refused(run, ckpt, tmp_path):
    marker = tmp_path / "ran"
    file = ckpt / "bin" / "pytorch_model.bin"
    file.write_bytes(pickle.dumps(Evil(marker)))
    assert init(run, ckpt / "bin")[0] == CHECKPOINT
    assert not marker.exists()


# what is written


def test_an_output_directory_that_holds_something(run, ckpt, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    assert_refused(init(run, ckpt / "bin", f"output_dir={out}"), STORAGE, "'precious'", "overwrite")
    assert (out / "precious").read_text() == "mine"
    assert init(run, ckpt / "bin", f"output_dir={out}", "output.overwrite=true")[0] == 0
    assert not (out / "precious").exists() and (out / "receipt.json").exists()


def test_an_output_directory_that_holds_an_earlier_output(run, ckpt, tmp_path):
    out = tmp_path / "out"
    assert init(run, ckpt / "bin", f"output_dir={out}")[0] == 0
    receipt = (out / "receipt.json").read_bytes()
    assert_refused(init(run, ckpt / "bin", f"output_dir={out}"), STORAGE, "output.overwrite=true")
    assert (out / "receipt.json").read_bytes() == receipt
    assert init(run, ckpt / "bin", f"output_dir={out}", "output.overwrite=true")[0] == 0
    assert (out / "receipt.json").read_bytes() != receipt


@pytest.mark.parametrize(
    ("pointed_at", "out"),
    [
        ("proj/ck", "proj"),
        ("proj/ck", "proj/ck"),
        ("proj/ck", "alias"),
        ("proj/ck/model.safetensors", "proj"),
        ("proj/ck/model.safetensors", "alias/ck"),
    ],
)
def test_an_output_directory_that_touches_the_checkpoint(run, ckpt, tmp_path, pointed_at, out):
    """Even where everything is bioinit's own and may be replaced."""
    assert init(run, ckpt / "bin", f"output_dir={tmp_path / 'proj'}")[0] == 0
    assert init(run, ckpt / "bin", f"output_dir={tmp_path / 'proj' / 'ck'}")[0] == 0
    (tmp_path / "alias").symlink_to(tmp_path / "proj")
    before = {p: p.read_bytes() for p in (tmp_path / "proj").rglob("*") if p.is_file()}
    words = (f"output_dir={tmp_path / out}", "output.overwrite=true")
    assert_refused(init(run, tmp_path / pointed_at, *words), STORAGE, "the checkpoint", "apart")
    assert {p: p.read_bytes() for p in (tmp_path / "proj").rglob("*") if p.is_file()} == before


def test_an_existing_empty_directory_is_fine(run, ckpt, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert init(run, ckpt / "bin", f"output_dir={out}")[0] == 0


def test_an_output_directory_that_is_a_file(run, ckpt, tmp_path):
    out = tmp_path / "out"
    out.write_text("a file")
    assert_refused(init(run, ckpt / "bin", f"output_dir={out}"), STORAGE, "out")


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("out"))


START = """
import sys
from bioinit.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def spawn(path, out, prelude="", **options):
    words = ["init", "recipe=auto/as_saved", f"model.initial_ckpt_path={path}", f"output_dir={out}"]
    return subprocess.Popen(
        [sys.executable, "-c", prelude + START, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        **options,
    )


def test_a_disk_that_fills_up_half_way(ckpt, tmp_path):
    out = tmp_path / "out"
    process = spawn(
        ckpt / "bin",
        out,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )
    message = process.communicate(timeout=120)[1]
    assert process.returncode == STORAGE, message
    assert not leftovers(tmp_path)


# Stops the process inside the save, after the weights are written and before the rename.
PAUSE = """
import time
import bioinit.save
original = bioinit.save.save_context
def pause(*arguments):
    found = original(*arguments)
    print("PAUSED", flush=True)
    time.sleep(60)
    return found
bioinit.save.save_context = pause
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_start_that_is_stopped_half_way_leaves_no_final_name(ckpt, tmp_path, kind):
    out = tmp_path / "out"
    # A runner in the background may have SIGINT ignored, and a child would inherit that.
    process = spawn(
        ckpt / "bin",
        out,
        PAUSE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline().strip() == "PAUSED"
    process.send_signal(kind)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == (130 if kind == signal.SIGINT else -9), message
    assert not leftovers(tmp_path)
    if kind == signal.SIGINT:
        assert not [p for p in tmp_path.iterdir() if "partial" in p.name]
    again = spawn(ckpt / "bin", out)
    assert again.communicate(timeout=120) and again.returncode == 0
    assert (out / "receipt.json").exists()
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_two_processes_that_write_the_same_output(ckpt, tmp_path):
    out = tmp_path / "out"
    until_told = PAUSE.replace("time.sleep(60)", "input()")
    first = spawn(ckpt / "bin", out, until_told, stdin=subprocess.PIPE)
    assert first.stdout.readline().strip() == "PAUSED"
    second = spawn(ckpt / "bin", out)
    message = second.communicate(timeout=120)[1]
    assert second.returncode == STORAGE, message
    assert "another process" in message
    first.communicate("go on\n", timeout=120)
    assert first.returncode == 0 and (out / "receipt.json").exists()


def test_verify_says_what_changed(run, ckpt, tmp_path):
    out = tmp_path / "out"
    assert init(run, ckpt / "bin", f"output_dir={out}")[0] == 0
    assert run("verify", out)[0] == 0
    with open(out / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert_refused(run("verify", out), CHECKPOINT, "model.safetensors changed")
    (out / "config.json").unlink()
    assert_refused(run("verify", out), CHECKPOINT, "config.json missing")


def test_a_checkpoint_name_with_equal_signs_works_on_the_command_line(run, ckpt):
    odd = ckpt / "epoch=0-step=9-consumed_samples=20.0-last"
    shutil.copytree(ckpt / "bin", odd)
    assert init(run, odd)[0] == 0
