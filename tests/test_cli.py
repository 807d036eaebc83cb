"""The command line as a person meets it: what it prints where, and its exit codes."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bioinit
from bioinit import cli
from bioinit.cli import said
from bioinit.version import __version__

VERBS = ("init", "plan", "inspect", "verify", "recipes")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny ESM-2 as transformers writes it."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    folder = tmp_path_factory.mktemp("checkpoint") / "epoch=0-step=9, last"
    config = transformers.EsmConfig(
        vocab_size=33,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        position_embedding_type="rotary",
        pad_token_id=1,
        mask_token_id=32,
        token_dropout=True,
        emb_layer_norm_before=False,
    )
    torch.manual_seed(0)
    transformers.EsmForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys):
    """Runs a command in this process; gives its exit code, stdout and stderr."""

    def command(*words: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as leave:
            code = leave.code
        out, err = capsys.readouterr()
        return code, out, err

    return command


def words(checkpoint: Path, *more: str) -> list[str]:
    return [
        "recipe=esm2/token_classification",
        f"model.initial_ckpt_path={checkpoint}",
        "model.num_labels=3",
        *more,
    ]


def process(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bioinit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


# --- help, version, usage


def test_help_and_version_import_nothing_heavy():
    for flag in ("--help", "--version"):
        code = (
            "import sys; from bioinit.cli import main\n"
            f"try: main(['{flag}'])\nexcept SystemExit: pass\n"
            "print(*sys.modules, file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        loaded = set(done.stderr.split())
        assert not loaded & {"torch", "numpy", "pydantic", "hydra", "omegaconf", "rich", "fiddle"}
        rooms = {name.split(".")[1] for name in loaded if name.startswith("bioinit.")}
        assert rooms == {"cli", "version"}


def test_help_names_every_verb_and_the_exit_codes(run):
    code, out, _ = run("--help")
    assert code == 0 and all(f"  {verb} " in out for verb in VERBS) and "130 interrupted" in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0 and f"usage: bioinit {verb}" in out


def test_version(run):
    assert run("--version")[:2] == (0, f"bioinit {__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["foo"], ["init", "--foo"], ["inspect"], ["--foo"]])
def test_wrong_usage_is_one_line_and_exit_2(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and not out and err.count("\n") == 1 and "--help" in err


# --- exit codes


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (["model.num_labls=3"], 2, "num_labels"),
        (["+model.num_labels=3"], 2, "Write model.num_labels=3"),
        (["model.hidden_dropout=0.5"], 3, "override_parent_fields"),
        (["model.initial_ckpt_skip_keys_with_these_prefixes=[clasifier]"], 3, "classifier"),
        (["model.initial_ckpt_path=/nowhere/at/all"], 5, "/nowhere/at/all"),
    ],
)
@pytest.mark.parametrize("verb", ["init", "plan"])
def test_a_failure_is_one_message_and_its_exit_code(run, checkpoint, verb, change, code, said):
    found, _, err = run(verb, *words(checkpoint, *change))
    assert found == code and said in err + _ and "Traceback" not in err


def test_a_corrupt_checkpoint_is_exit_4(run, checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(
        (checkpoint / "model.safetensors").read_bytes()[:99]
    )
    code, _, err = run("plan", *words(tmp_path))
    assert code == 4 and "model.safetensors" in err


def test_an_existing_output_is_exit_5_and_is_left_alone(run, checkpoint, tmp_path):
    (tmp_path / "precious").write_text("x")
    code, _, err = run("init", *words(checkpoint, f"output_dir={tmp_path}"))
    assert code == 5 and str(tmp_path) in err and "'precious'" in err
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_a_traceback_is_shown_only_when_asked_for(run, monkeypatch):
    monkeypatch.setenv("BIOINIT_DEBUG", "1")
    assert "Traceback" in run("plan", "recipe=absent")[2]
    monkeypatch.delenv("BIOINIT_DEBUG")
    assert "Traceback" not in run("plan", "recipe=absent")[2]


def test_a_bug_of_ours_says_that_it_is_one(run, monkeypatch):
    monkeypatch.setitem(cli.VERBS, "recipes", cli.VERBS["recipes"]._replace(run=lambda _: 1 // 0))
    code, _, err = run("recipes")
    assert code == 1 and "ZeroDivisionError" in err and "BIOINIT_DEBUG=1" in err


@pytest.mark.parametrize(
    ("kind", "code", "says"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")]
)
def test_a_signal_is_an_exit_code_and_leaves_nothing(checkpoint, tmp_path, kind, code, says):
    script = (
        "import os, signal, sys, bioinit.save as save\n"
        "from bioinit.cli import main\n"
        "digest = save._digest\n"
        "def late(file):\n"
        f"    os.kill(os.getpid(), signal.{kind}); return digest(file)\n"
        "save._digest = late\n"
        "code = main(sys.argv[1:])\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "sys.exit(code)\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, "init", *words(checkpoint, f"output_dir={out}")]
    # A runner in the background may have SIGINT ignored, and a child would inherit that.
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == code and says in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_command_runs_in_a_thread_too(run):
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["recipes"])))
    thread.start()
    thread.join()
    assert codes == [0]


NASTY = "w\x1b[2J\nx\u202ey"


def test_names_of_a_checkpoint_reach_the_terminal_spelled_out(run, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({NASTY: torch.zeros(1)}, tmp_path / "model.safetensors")
    code, out, _ = run("inspect", tmp_path, "--tensors")
    assert code == 0 and "w\\x1b[2J\\nx\\u202ey" in out and "\x1b" not in out


def test_a_message_keeps_its_lines_and_spells_out_the_rest(run, tmp_path):
    _, _, err = run("inspect", tmp_path / "a\x1b[2J\u202eb")
    assert "a\\x1b[2J\\u202eb" in err and "\x1b" not in err and "\u202e" not in err


def test_half_a_surrogate_pair_is_printed_as_json_spells_it(checkpoint, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "esm", "note": "\\ud800"}')
    for flag in ("--json", "--tensors"):
        command = [sys.executable, "-m", "bioinit", "inspect", str(tmp_path), flag]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "\\ud800" in done.stdout, done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(checkpoint):
    command = [sys.executable, "-m", "bioinit", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        err = child.stderr.read().decode()
    assert not err and child.returncode == 0


# --- init and plan


def test_init_writes_what_transformers_reads(run, checkpoint, tmp_path):
    out = tmp_path / "runs" / "a"
    code, printed, err = run("init", *words(checkpoint, f"output_dir={out}"))
    assert code == 0, err
    assert "loaded" in printed and "classifier" in printed and not err
    import transformers

    model = transformers.EsmForTokenClassification.from_pretrained(out)
    body = transformers.EsmForMaskedLM.from_pretrained(checkpoint).esm.state_dict()
    assert all(torch.equal(value, body[key]) for key, value in model.esm.state_dict().items())
    receipt = json.loads((out / "receipt.json").read_text())
    assert receipt["skip_prefixes"] == {"classifier": 2} and not receipt["problems"]
    assert run("verify", out)[0] == 0
    (out / "config.json").write_text("{}")
    code, _, err = run("verify", out)
    assert code == 4 and "config.json" in err


def test_init_without_an_output_says_that_nothing_was_written(run, checkpoint):
    code, _, err = run("init", *words(checkpoint))
    assert code == 0 and "nothing was written" in err


@pytest.mark.parametrize("verb", ["init", "plan"])
def test_json_is_one_document_and_nothing_else(run, checkpoint, verb, tmp_path):
    code, out, err = run(verb, *words(checkpoint, f"output_dir={tmp_path / 'x'}"), "--json")
    document = json.loads(out)
    assert code == 0 and not err
    assert all(file["sha256"] for file in document["files"]) is (verb == "init")
    assert document["checkpoint"]["path"] == str(checkpoint)
    assert {claim["claim"] for claim in document["tensors"]} >= {"loaded", "skipped"}


def test_a_plan_with_problems_is_still_printed(run, checkpoint):
    change = "model.initial_ckpt_skip_keys_with_these_prefixes=[]"
    code, out, _ = run("plan", *words(checkpoint, change), "--json")
    kinds = {problem["kind"] for problem in json.loads(out)["problems"]}
    assert code == 3 and "unclaimed" in kinds
    code, out, err = run("plan", *words(checkpoint, change))
    assert code == 3 and "classifier.weight" in out and "problem" in err


def test_flags_may_stand_anywhere(run, checkpoint):
    first, *rest = words(checkpoint)
    assert run("plan", first, "--json", *rest)[0] == 0


def test_cfg_job_prints_the_recipe_and_runs_nothing(run, checkpoint, tmp_path):
    out = tmp_path / "out"
    code, printed, _ = run("init", *words(checkpoint, f"output_dir={out}"), "--cfg", "job")
    assert code == 0 and not out.exists()
    mine = tmp_path / "mine.yaml"
    mine.write_text(printed)
    again = bioinit.compose(str(mine))
    assert again.model.initial_ckpt_path == str(checkpoint) and again.output_dir == str(out)


def test_multirun_writes_one_numbered_folder_a_job(run, checkpoint, tmp_path):
    sweep = words(checkpoint, f"output_dir={tmp_path}", "init.seed=1,2")
    sweep[0] = "recipe=esm2/token_classification,esm2/sequence_classification"
    code, out, err = run("init", *sweep, "--multirun", "--json")
    assert code == 0 and len(json.loads(out)) == 4
    assert "job 3: recipe=esm2/sequence_classification" in err
    names = [json.loads((tmp_path / str(n) / "config.json").read_text()) for n in range(4)]
    assert [name["architectures"][0][6:] for name in names] == [
        "TokenClassification",
        "TokenClassification",
        "SequenceClassification",
        "SequenceClassification",
    ]


def test_a_mistake_in_the_last_job_stops_the_first(run, checkpoint, tmp_path):
    sweep = words(checkpoint, f"output_dir={tmp_path}", "init.on_conflict=error,sometimes")
    code, _, err = run("init", *sweep, "--multirun")
    assert code == 2 and "sometimes" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["init", "plan"])
def test_a_job_that_fails_does_not_take_the_others_with_it(run, checkpoint, tmp_path, verb):
    sweep = words(checkpoint, f"output_dir={tmp_path}")
    sweep[0] = "recipe=bert/token_classification,esm2/token_classification"
    code, out, err = run(verb, *sweep, "--multirun", "--json")
    failed, done = json.loads(out)
    assert code == failed["exit_code"] == 2 and "not of the family 'bert'" in failed["error"]
    assert f"bioinit: job 0: {failed['error']}" in err
    assert done["tensors"] and not done["problems"]
    assert [p.name for p in tmp_path.iterdir()] == (["1"] if verb == "init" else [])


def test_the_first_code_that_is_not_0_is_that_of_all_jobs(run, checkpoint):
    prefixes = "model.initial_ckpt_skip_keys_with_these_prefixes=[classifier],[nothing]"
    sweep = words(checkpoint, prefixes)
    sweep[0] = "recipe=esm2/token_classification,bert/token_classification"
    code, out, err = run("init", *sweep, "--multirun")
    assert code == 3 and out.count("checkpoint  ") == 1 and "Traceback" not in err
    assert "job 1: the plan has" in err and "job 3: " in err


@pytest.mark.parametrize("verb", ["init", "plan"])
@pytest.mark.parametrize(("count", "said"), [(0, "placement.device=cpu"), (2, "cuda:1 or less")])
def test_a_device_that_is_not_there_stops_only_init(
    run, checkpoint, monkeypatch, verb, count, said
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    code, _, err = run(verb, *words(checkpoint, "placement.device=cuda:9"))
    assert code == (2 if verb == "init" else 0), err
    assert verb == "plan" or ("device='cuda:9'" in err and said in err)


def test_no_module_is_loaded_to_a_device_that_is_not_there(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", torch.device("cuda:0"), "meta", "gpu"):
        with pytest.raises(bioinit.ConfigError, match="device="):
            bioinit.load_weights(torch.nn.Linear(1, 1), checkpoint, device=device)


def test_the_bar_is_for_terminals_only(run, checkpoint, monkeypatch, capsys):
    assert run("init", *words(checkpoint))[2].count("\n") == 1
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with said.progress() as progress:
        progress(1, 2)
        progress(2, 2)
    assert "loading" in capsys.readouterr().err


# --- inspect and recipes


def test_inspect_tells_what_the_headers_say(run, checkpoint):
    code, out, err = run("inspect", checkpoint, "--json", "--tensors")
    document = json.loads(out)
    assert code == 0 and not err
    assert (document["format"], document["family"]) == ("safetensors", "esm2")
    assert document["tensors"] == len(document["tensor_list"])
    assert document["dtypes"]["float32"]["bytes"] == document["bytes"]
    assert document["context"]["model"] == "esm"
    code, out, _ = run("inspect", checkpoint)
    assert code == 0 and "safetensors" in out and "esm" in out


def test_recipes_lists_every_recipe_and_shows_one(run):
    code, out, _ = run("recipes")
    listed = [line.split()[0] for line in out.splitlines()]
    assert code == 0 and "esm2/token_classification" in listed and "auto/as_saved" in listed
    code, out, _ = run("recipes", "esm2/token_classification")
    assert code == 0 and "architecture: token_classification" in out
    assert run("recipes", "esm2/nothing")[0] == 2


def test_python_m_bioinit_is_the_same_command():
    done = process("recipes")
    assert done.returncode == 0 and "auto/as_saved" in done.stdout


def test_help_is_quick():
    """CPU time against ``python -c pass``; the least of several, since machines are noisy."""

    def seconds(*arguments: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, *arguments], capture_output=True)
        after = os.times()
        return (after.children_user + after.children_system) - (
            before.children_user + before.children_system
        )

    bare = min(seconds("-c", "pass") for _ in range(5))
    assert min(seconds("-m", "bioinit", "--help") for _ in range(5)) <= bare + 0.1


@pytest.mark.parametrize("way", [("-m", "bioinit"), ("-c", "from bioinit.cli import main; main()")])
def test_modules_that_lie_in_a_checkpoint_are_never_imported(tmp_path, way):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    for name in ("dill", "cuda", "pynvml", "torchcomms", "numcodecs", "transformers", "hydra"):
        (tmp_path / f"{name}.py").write_text("open('canary', 'w')\n")
    command = [sys.executable, "-P", *way] if way[0] == "-c" else [sys.executable, *way]
    for words in (("inspect", "."), ("recipes",), ("plan", "recipe=auto/as_saved")):
        done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
        assert "internal error" not in done.stderr
    assert not (tmp_path / "canary").exists()
