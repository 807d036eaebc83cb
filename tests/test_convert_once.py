"""``init.convert=once``: converted by one of many, known by content and rules, used from there."""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

import bioinit
from bioinit import cache, families, ranks
from bioinit.cache import content, use
from bioinit.convert import decided as decided_room
from bioinit.convert.decided import Writing
from bioinit.errors import ConfigError, CorruptCheckpoint, PlanError, StorageError
from bioinit.initialize import once
from bioinit.ranks import joined
from bioinit.ranks.watch import Pace
from bioinit.record import build
from tests.forks import calls_of, ended, killed_after, started

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
CONFIG = transformers.LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as hf and as NeMo 2 keep it."""
    folder = tmp_path_factory.mktemp("worlds")
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(folder / "hf")
    (folder / "hf/tokenizer.json").write_text("{}")
    bioinit.convert(folder / "hf", folder / "nemo2", "nemo2")
    return folder


@pytest.fixture
def nemo(worlds: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(worlds / "nemo2", tmp_path / "nemo2"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(cache.HOME, str(tmp_path / "home"))
    # Files of a test are young; what is right with them is tested in test_cache.py.
    monkeypatch.setattr(content, "RECENT_NS", 0)
    yield tmp_path / "home"
    for path in list(use._held):
        use.end(path)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where something was converted to, from now on."""
    seen: list[Path] = []
    into = Writing.into

    def counted(self: Writing, folder: Path, *given: Any) -> dict[str, Any]:
        seen.append(folder)
        return into(self, folder, *given)

    monkeypatch.setattr(Writing, "into", counted)
    return seen


def record(path: Path, *overrides: str) -> Any:
    said = [f"model.initial_ckpt_path={path}", "init.convert=once", *overrides]
    return bioinit.compose("llama/causal_lm", said)


def values(done: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in done.model.state_dict().items()}


def asking(path: Path) -> Callable[[], Any]:
    """What a start does about ``path`` before it builds a model."""
    given = record(path)
    run = build(given)
    family = families.load("llama")

    def ask() -> Any:
        with once.opened(str(path), given, run, lambda: family, ranks.ALONE) as found:
            return found.checkpoint.path

    return ask


def changed_byte(file: Path, of: bytes = b"") -> None:
    """Another byte, and the same size and time of writing: the first ``of``, or in the middle."""
    before = os.stat(file)
    data = bytearray(file.read_bytes())
    data[data.index(of) if of else len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_it_is_converted_once_and_is_the_model_that_was_stored(
    worlds: Path, nemo: Path, conversions: list[Path], tmp_path: Path
):
    first = bioinit.initialize(record(nemo))
    second = bioinit.initialize(record(nemo, f"output_dir={tmp_path / 'out'}"))
    assert len(conversions) == 1
    plain = values(bioinit.initialize(record(worlds / "hf")))
    assert all(torch.equal(plain[name], value) for name, value in values(second).items())
    document = first.plan.to_json()
    assert document["checkpoint"]["dialect"] == "hf"
    assert document["checkpoint"]["path"].startswith(str(cache.home()))
    assert document["converted_from"]["path"] == str(nemo)
    assert document["converted_from"]["dialect"] == "nemo2"
    assert "converted once to hf from" in first.plan.render()
    receipt = json.loads((tmp_path / "out/receipt.json").read_text())
    assert receipt["converted_from"]["path"] == str(nemo)
    assert (tmp_path / "out/tokenizer.json").exists()


def test_the_second_start_reads_no_byte_of_the_source_but_headers(
    nemo: Path, monkeypatch: pytest.MonkeyPatch
):
    bioinit.initialize(record(nemo))

    def read(paths: Any) -> list[Any]:
        assert not paths
        return []

    monkeypatch.setattr(content, "_hashed", read)
    monkeypatch.setattr(Writing, "into", None)
    assert bioinit.initialize(record(nemo)).plan.to_json()["converted_from"]


@pytest.mark.parametrize("how", ["moved", "copied", "touched"])
def test_another_name_or_another_time_is_the_same_checkpoint(
    how: str, nemo: Path, conversions: list[Path]
):
    ask = asking(nemo)
    kept = ask()
    if how == "touched":
        for file in nemo.rglob("*"):
            os.utime(file)
        assert ask() == kept
    else:
        other = nemo.with_name("other")
        (shutil.move if how == "moved" else shutil.copytree)(str(nemo), str(other))
        assert asking(other)() == kept
    assert len(conversions) == 1


def test_a_changed_byte_of_any_file_is_another_checkpoint(nemo: Path, conversions: list[Path]):
    ask = asking(nemo)
    kept = ask()
    weights = next((nemo / "weights").glob("*.distcp"))
    changed_byte(weights)
    assert ask() != kept
    (nemo / "context/nemo_tokenizer/tokenizer.json").write_text("[]")
    found = ask()
    assert (found / "tokenizer.json").read_text() == "[]"
    assert len(conversions) == len(cache.entries()) == 3
    (nemo / "README.md").write_text("nothing that anybody reads")
    assert ask() == found


def test_what_was_begun_with_other_bytes_is_not_gone_on_with(worlds: Path, nemo: Path):
    weights = next((nemo / "weights").glob("*.distcp"))
    expected = values(bioinit.initialize(record(worlds / "hf")))
    row = expected["model.embed_tokens.weight"][0].numpy().tobytes()

    def killed() -> None:
        def dies(*given: Any) -> None:
            changed_byte(weights, row)
            write(*given)
            os.kill(os.getpid(), 9)

        write, decided_room._write = decided_room._write, dies  # type: ignore[assignment]
        asking(nemo)()

    assert ended(started(killed)) == -9
    assert [entry.state for entry in cache.entries()] == ["unfinished"]
    changed_byte(weights, bytes([row[0] ^ 1]) + row[1:])  # and is what it was
    whole = values(bioinit.initialize(record(nemo)))
    assert all(torch.equal(value, whole[name]) for name, value in expected.items())


@pytest.mark.parametrize("when", ["known", "read"])
def test_a_source_that_is_written_meanwhile_is_an_error_and_nothing_is_kept(
    when: str, nemo: Path, monkeypatch: pytest.MonkeyPatch, home: Path
):
    weights = next((nemo / "weights").glob("*.distcp"))
    if when == "known":  # after its digest, before the conversion
        content_of = cache.content_of

        def late(paths: Any) -> Any:
            found = content_of(paths)
            changed_byte(weights)
            return found

        monkeypatch.setattr(cache, "content_of", late)
    else:
        into = Writing.into

        def during(self: Writing, *given: Any) -> Any:
            receipt = into(self, *given)
            changed_byte(weights)
            return receipt

        monkeypatch.setattr(Writing, "into", during)
    with pytest.raises(CorruptCheckpoint, match=r"distcp changed"):
        asking(nemo)()
    assert cache.entries() == []


def test_a_source_that_changed_between_its_headers_and_its_digest_is_an_error(
    nemo: Path, monkeypatch: pytest.MonkeyPatch
):
    content_of = cache.content_of

    def early(paths: Any) -> Any:
        (nemo / "context/io.json").write_text("{}")
        return content_of(paths)

    monkeypatch.setattr(cache, "content_of", early)
    with pytest.raises(CorruptCheckpoint, match=r"io.json changed since it was opened"):
        asking(nemo)()


def test_a_changed_rule_is_noticed_and_one_of_another_model_is_not(
    nemo: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
):
    ask = asking(nemo)
    kept = ask()
    family = families.load("llama")
    dialect = family.dialects["hf"]

    def with_rules(change: Callable[[Any], Any]) -> None:
        def rules(*given: Any) -> list[Any]:
            return [change(rule) for rule in dialect.rules(*given)]

        changed = dataclasses.replace(dialect, rules=rules)
        monkeypatch.setitem(family.dialects, "hf", changed)  # type: ignore[arg-type]

    def swapped(rule: Any) -> Any:
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        for word, now in other.items():
            if word in rule.pattern_text:
                return dataclasses.replace(rule, pattern_text=rule.pattern_text.replace(word, now))
        return rule

    with_rules(lambda rule: dataclasses.replace(rule, note="said otherwise"))
    assert ask() == kept
    with_rules(swapped)
    assert ask() != kept and len(conversions) == 2
    monkeypatch.setattr(sys.modules["bioinit.convert.work"], "__version__", "99")
    assert ask() != kept and len(conversions) == 3


def test_what_is_in_the_models_own_dialect_is_used_as_it_is(worlds: Path, home: Path):
    done = bioinit.initialize(record(worlds / "hf"))
    document = done.plan.to_json()
    assert document["checkpoint"]["path"] == str(worlds / "hf") and not home.exists()
    assert "converted_from" not in document
    assert any("in the model's own dialect (hf)" in note for note in done.plan.notes)


def test_the_family_of_everything_starts_from_another_world_by_its_converted_model(nemo: Path):
    given = ["init.convert=once", f"model.initial_ckpt_path={nemo}"]
    done = bioinit.initialize(bioinit.compose("auto/as_saved", given))
    assert type(done.model).__name__ == "LlamaForCausalLM"


def test_a_plan_converts_nothing_and_says_what_a_start_will_do(
    nemo: Path, conversions: list[Path], home: Path
):
    first = bioinit.plan(record(nemo))
    assert not conversions and not home.exists() and not first.problems
    assert first.to_json()["checkpoint"]["path"] == str(nemo)
    assert any("a start converts it to hf first" in note for note in first.notes)
    bioinit.initialize(record(nemo))
    assert bioinit.plan(record(nemo)).to_json()["converted_from"]["path"] == str(nemo)


def test_what_is_not_asked_for_is_not_converted(nemo: Path, home: Path):
    done = bioinit.initialize(record(nemo, "init.convert=false"))
    assert done.plan.to_json()["checkpoint"]["dialect"] == "nemo2" and not home.exists()


def test_the_source_is_not_overwritten_though_nobody_reads_it(nemo: Path):
    bioinit.initialize(record(nemo))
    with pytest.raises(StorageError, match="the checkpoint"):
        bioinit.initialize(record(nemo, f"output_dir={nemo}", "output.overwrite=true"))
    assert (nemo / "weights").is_dir()


def test_what_nobody_states_is_asked_for_in_words_of_the_run(nemo: Path):
    shutil.rmtree(nemo / "context")
    with pytest.raises(ConfigError, match=r"^init.convert=once: ") as error:
        bioinit.initialize(record(nemo))
    assert cache.entries() == []
    values = {"activation_func": "silu", "rope_type": "default"}
    asked = re.findall(r"model\.(\w+)=VALUE", str(error.value))
    said = [f"model.{name}={values.get(name, 'false')}" for name in asked]
    sizes = "num_layers=2 hidden_size=16 ffn_hidden_size=24 vocab_size=40 num_attention_heads=4"
    said += [f"model.{size}" for size in [*sizes.split(), "num_query_groups=2"]]
    assert asked and bioinit.initialize(record(nemo, *said)).plan.to_json()["converted_from"]


def test_what_the_conversion_refuses_is_said_with_a_cure(
    nemo: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*given: Any, **options: Any) -> None:
        raise PlanError("the conversion has 1 problem.", ())

    monkeypatch.setattr(once, "decide", refuse)
    with pytest.raises(PlanError, match=r"once: the conversion.*bioinit convert SRC DST --to hf"):
        bioinit.initialize(record(nemo))


def test_a_disk_that_is_full_is_said_with_a_cure_and_nothing_is_kept(nemo: Path, tmp_path: Path):
    ask = asking(nemo)

    def small() -> str:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        with pytest.raises(StorageError) as error:
            ask()
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return str(error.value)

    assert ended(started(small, tmp_path / "said")) == 0
    said = (tmp_path / "said").read_text()
    assert "Raise the limit on file sizes" in said and "`bioinit cache prune` makes room" in said
    assert cache.entries() == [] and ask().is_dir()


# Many processes, kills


def test_eight_starts_at_once_convert_once(
    nemo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    into = Writing.into

    def slowly(self: Writing, *given: Any) -> Any:
        with open(tmp_path / "converted", "a") as file:
            file.write("once\n")
        time.sleep(0.2)
        return into(self, *given)

    monkeypatch.setattr(Writing, "into", slowly)

    def start() -> float:
        done = bioinit.initialize(record(nemo))
        return float(sum(value.double().sum() for value in values(done).values()))

    processes = [started(start, tmp_path / f"said-{number}") for number in range(8)]
    codes = [ended(process) for process in processes]
    said = [(tmp_path / f"said-{number}").read_text() for number in range(8)]
    assert codes == [0] * 8, said
    assert (tmp_path / "converted").read_text() == "once\n" and len(set(said)) == 1


def test_a_kill_at_any_of_fifty_points_of_a_conversion_leaves_nothing_that_looks_finished(
    nemo: Path, home: Path
):
    given = record(nemo)
    with families.open_checkpoint(nemo) as source:
        decided = once._decided(source, given, build(given), families.load("llama"), "hf")
        survives(home, lambda: once._ask(decided, True, ranks.ALONE, None).path)


def survives(home: Path, ask: Callable[[], Path]) -> None:
    expected = {path.name: path.read_bytes() for path in ask().iterdir() if path.suffix != ".json"}
    use.end(ask())
    shutil.rmtree(home)
    total = calls_of(ask)
    rng = random.Random(11)
    codes, states = [], set()
    for number in range(50):
        if number % 3 == 0:  # the others go on with what the last ones left
            shutil.rmtree(home, ignore_errors=True)
        codes.append(ended(started(killed_after(rng.randrange(total), ask))))
        for entry in cache.entries():
            states.add(entry.state)
            assert entry.state == "unfinished" or not cache.verify(entry)
    assert set(codes) <= {-9, 0} and codes.count(-9) > 20 and "damaged" not in states
    assert "unfinished" in states
    kept = ask()
    assert {name: (kept / name).read_bytes() for name in expected} == expected


# Ranks


def among(size: int, ask: Callable[[Any], Any], pace: Pace) -> list[Any]:
    store, found = HashStore(), [None] * size

    def run(rank: int) -> None:
        try:
            with joined(store, rank, size, "once", pace) as world:
                found[rank] = once._among(world, lambda: ask(world))
        except BaseException as error:
            found[rank] = error

    running = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    return found


PACE = Pace(tick=0.05, settle=0.05, lost=0.6, join=5.0, heard=2.0, interrupt=60, grace=60)


@pytest.mark.parametrize("hosts", [1, 2])
def test_one_rank_of_each_host_converts_and_the_others_wait_longer_than_a_lost_rank_may_be_silent(
    hosts: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        ranks.World,
        "hosts",
        property(lambda world: tuple("ab"[rank % hosts] for rank in range(world.size))),
    )
    made, asked = [], []

    def fill(folder: Path) -> None:
        made.append(folder)
        time.sleep(1.0)
        (folder / "x").touch()

    def ask(world: Any) -> Any:
        asked.append(world.rank)
        made_of = {"content": "1", "rules": "2"}
        path = cache.keep(None, made_of, fill, waiting=world.check)
        return once._Kept(path, made_of)

    found = among(4, ask, PACE)
    assert len({kept.path for kept in found}) == 1, found
    assert len(made) == 1 and sorted(asked) == [*range(hosts)]


def test_ranks_whose_sources_differ_are_told_and_none_goes_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks.World, "hosts", property(lambda world: tuple("abcd"[: world.size])))

    def ask(world: Any) -> Any:
        return once._Kept(Path("x"), {"content": str(world.rank), "rules": "2"})

    found = among(2, ask, PACE)
    assert all(isinstance(error, ConfigError) for error in found)
    assert "what init.convert=once reads: content" in str(found[0])


def test_what_fails_on_the_rank_that_converts_ends_all(monkeypatch: pytest.MonkeyPatch):
    def ask(world: Any) -> Any:
        raise PlanError("the conversion has 1 problem", ())

    found = among(3, ask, PACE)
    assert [type(error) for error in found] == [PlanError] * 3
    assert "the conversion has 1 problem" in str(found[2])
