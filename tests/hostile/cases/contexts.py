"""Saved configs: JSON, YAML and pickled arguments that would like to be more than data."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile import contexts as write
from tests.hostile.contexts import config, document, leaf, pyref, ref
from tests.hostile.corpus import REFUSED, Group, canary
from tests.hostile.craft import Call

GROUP = Group("contexts")


def fiddle(name: str, content: Any, **said: Any) -> None:
    said = {"file": "io.json", "context": True, **said}
    GROUP.add(f"io_json_{name}", lambda folder: write.io_json(folder, content), **said)


def nested(depth: int, inner: str = "1") -> bytes:
    return (b'{"a":' * depth) + inner.encode() + b"}" * depth


def entry(**changes: Any) -> dict[str, Any]:
    """A document whose config is changed."""
    return document(config={**config("a", "B", x=leaf(1)), **changes})


def doubling(levels: int) -> dict[str, Any]:
    """A table that unfolds to 2 to the power of ``levels`` values."""
    cells = {
        f"l{i}": {
            "type": pyref("builtins", "list"),
            "items": [["Index(index=0)", ref(f"l{i + 1}")], ["Index(index=1)", ref(f"l{i + 1}")]],
            "metadata": None,
        }
        for i in range(levels)
    }
    return document(config=config("a", "B", x=ref("l0")), **cells, **{f"l{levels}": leaf(1)})


def chain(levels: int) -> dict[str, Any]:
    """A table of references that lead one to the next."""
    cells = {
        f"l{i}": {"type": pyref("builtins", "list"), "items": [["Index(index=0)", ref(f"l{i + 1}")]],
                  "metadata": None}
        for i in range(levels)
    }  # fmt: skip
    return document(config=config("a", "B", x=ref("l0")), **cells, **{f"l{levels}": leaf(1)})


fiddle("is_empty", b"")
fiddle("is_no_json", b'{"root": ')
fiddle("is_not_utf8", b'{"root": "\xff"}')
fiddle("is_a_list", [])
fiddle("is_nested_100000_deep", nested(100_000))
fiddle("is_nested_200_deep", nested(200))
fiddle("has_a_key_twice", b'{"root": 1, "root": 2, "objects": {}, "version": "0.0.1"}', says="twice")
fiddle("has_a_number_of_5000_digits", b'{"root": ' + b"9" * 5000 + b"}")
fiddle("has_no_objects", {"root": ref("x"), "version": "0.0.1"})
fiddle("objects_are_a_list", {"root": ref("x"), "objects": [], "version": "0.0.1"})
fiddle("version_is_unknown", {**document(), "version": "9.9"}, errors=REFUSED, says="9.9")
fiddle("root_is_missing", {**document(), "root": ref("nowhere")}, says="nowhere")
fiddle("root_is_a_number", {**document(), "root": 3})
fiddle("root_is_a_call_of_os_system", {**document(), "root": pyref("os", "system")})
fiddle("reference_to_itself", document(config=ref("config")), says="config")
fiddle("references_in_a_circle", document(config=config("a", "B", x=ref("model"))), says="circle|model")
fiddle("reference_to_nothing", document(config=config("a", "B", x=ref("gone"))), says="gone")
fiddle("reference_that_is_a_list", document(config=config("a", "B", x=ref([1]))))  # type: ignore[arg-type]
fiddle("references_that_double_60_times", doubling(60))
fiddle("references_50000_deep", chain(50_000))
fiddle("type_is_unknown", document(config={"type": "evil", "value": 1}), says="evil")
fiddle("type_is_missing", document(config={"items": []}))
fiddle("pyref_without_a_name", document(config={"type": {"type": "pyref"}, "items": []}))
fiddle("pyref_of_numbers", document(config={"type": pyref(1, 2), "items": []}))  # type: ignore[arg-type]
fiddle("items_are_a_dict", entry(items={"x": 1}))
fiddle("items_are_missing", entry(items=None))
fiddle("item_is_no_pair", entry(items=[["Attr(name='x')"]]))
fiddle("field_stands_twice", entry(items=[["Attr(name='x')", 1], ["Attr(name='x')", 2]]), says="x")
fiddle("field_is_a_target", entry(items=[["Attr(name='_target_')", "os.system"]]), says="_target_")
fiddle("leaf_is_a_list", document(config=config("a", "B", x={"type": "leaf", "value": [1]})))
fiddle("key_that_is_an_expression", document(config=config("a", "B", x={
    "type": pyref("builtins", "dict"), "metadata": None,
    "items": [["Key(key=__import__('os').system('touch CANARY'))", 1]]})))  # fmt: skip
fiddle("key_that_is_a_large_power", document(config=config("a", "B", x={
    "type": pyref("builtins", "dict"), "metadata": None, "items": [["Key(key=9**9**9**9)", 1]]})))  # fmt: skip
fiddle("key_nested_900_deep", document(config=config("a", "B", x={
    "type": pyref("builtins", "dict"), "metadata": None,
    "items": [["Key(key=" + "(" * 450 + ")" * 450 + ")", 1]]})))  # fmt: skip
fiddle("key_with_an_odd_escape", document(config=config("a", "B", x={
    "type": pyref("builtins", "dict"), "metadata": None, "items": [[r"Key(key='\d\q')", 1]]})),
    kind="either")  # fmt: skip
fiddle("keys_are_too_few", document(config=config("a", "B", x={
    "type": pyref("builtins", "dict"), "items": [["Key(key='a')", 1], ["Key(key='b')", 2]],
    "metadata": {"type": pyref("builtins", "tuple"), "items": [], "metadata": None}})))  # fmt: skip
fiddle("bytes_of_a_number", document(config=config("a", "B", x={
    "type": pyref("builtins", "bytes"), "items": [["x", 3]], "metadata": None})))  # fmt: skip
fiddle("a_hundred_thousand_fields", document(config=config("a", "B", **{
    f"f{i}": i for i in range(100_000)})), kind="either")  # fmt: skip
fiddle("names_an_artifact_above", document(config=config(
    "nemo.lightning.io.artifact.file", "FileArtifact", attr=leaf("../../../etc/passwd"))),
    errors=REFUSED, says="passwd")  # fmt: skip
fiddle("names_an_absolute_artifact", document(config=config("a", "B", x=config(
    "nemo.lightning.io.artifact.file", "FileArtifact", attr=leaf("/etc/passwd")))),
    errors=REFUSED, says="passwd")  # fmt: skip
fiddle("names_an_artifact_with_a_nul", document(config=config("a", "B", x=config(
    "nemo.lightning.io.artifact.file", "FileArtifact", attr=leaf("a\0b")))), errors=REFUSED)  # fmt: skip
fiddle("names_a_tokenizer_above", document(config=config("a", "B", x=config(
    "nemo.x.SentencePieceTokenizer", "SentencePieceTokenizer", model_path=leaf("../../secret")))),
    errors=REFUSED, says="secret")  # fmt: skip



@GROUP.bad(file="io.json", context=True)
def io_json_of_a_gibibyte(folder):
    write.io_json(folder, document())
    os.truncate(folder / "context" / "io.json", 1 << 30)


for target in ("os.system", "builtins.eval", "antigravity.fly", "subprocess.Popen", "nemo.evil.X"):
    module, _, function = target.rpartition(".")
    evil = config(module, function, command=leaf("touch CANARY"), args=leaf("1+1"))
    fiddle(f"config_of_{target}", document(config=evil), kind="inert")
    fiddle(f"function_{target}", document(config=config("a", "B", f=pyref(module, function))),
           kind="inert")  # fmt: skip
    said = f"model: {{_target_: {target}, _args_: ['touch CANARY'], _call_: true, num_layers: 2}}\n"
    GROUP.add(f"run_config_target_{target}", lambda f, s=said: write.run_config(f, s), kind="inert",
              context=True)  # fmt: skip
    said = f"_target_: {target}\n_args_: ['touch CANARY']\nconfig: {{_target_: {target}, a: 1}}\n"
    GROUP.add(f"model_yaml_target_{target}", lambda f, s=said: write.model_yaml(f, s),
              kind="inert", context=True)  # fmt: skip
    said = {"model_type": "bert", "_target_": target, "x": {"_target_": target, "_args_": ["x"]}}
    GROUP.add(f"config_json_target_{target}", lambda f, s=said: write.config_json(f, s),
              kind="inert", context=True)  # fmt: skip
    said = f"target: {target}\nnum_layers: 2\nx: {{_target_: {target}}}\n"
    GROUP.add(f"model_config_target_{target}", lambda f, s=said: write.model_config(f, s),
              kind="inert", context=True)  # fmt: skip
    said = {**write.ARGS, "_target_": target, "x": {"_target_": target}}
    GROUP.add(f"common_args_target_{target}", lambda f, s=said: write.common_args(f, s),
              kind="inert", context=True)  # fmt: skip

YAMLS: dict[str, tuple[Callable[[Path, Any], None], str, str]] = {
    "model_yaml": (write.model_yaml, "model.yaml", "config: {num_layers: 2, x: %s}\n"),
    "run_config": (write.run_config, "run_config.yaml", "model: {num_layers: 2, x: %s}\n"),
    "model_config": (write.model_config, "model_config.yaml", "num_layers: 2\nx: %s\n"),
    "neox_yml": (write.neox_yml, "model.yml", write.NEOX[:-1] + ', "x": %s}\n'),
}
TAGS = {
    "calls_os_system": "!!python/object/apply:os.system ['touch CANARY']",
    "calls_eval": "!!python/object/apply:builtins.eval ['1+1']",
    "makes_an_object": "!!python/object:subprocess.Popen {args: [touch, CANARY]}",
    "makes_a_new_object": "!!python/object/new:os.system ['touch CANARY']",
    "names_a_function": "!!python/name:os.system ''",
    "names_a_module": "!!python/module:antigravity ''",
    "has_a_private_tag": "!evil [1]",
    "has_a_verbatim_tag": "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch CANARY']",
}
BOMB = "{" + ", ".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
) + "}"  # fmt: skip
BROKEN = {
    "alias_bomb": BOMB,
    "alias_of_nothing": "*nothing",
    "alias_of_itself": "&a [*a]",
    "merge_of_itself": "&a {<<: *a}",
    "nested_5000_deep": "[" * 5000 + "]" * 5000,
    "nested_without_end": "[" * 5000,
    "key_stands_twice": "{a: 1, a: 2}",
    "key_is_a_list": "{? [1, 2] : 3}",
    "number_of_a_million_digits": "9" * 900_000,
    "text_without_end": '"abc',
    "tab_in_the_margin": "\n\t- 1",
}
for name, (writer, file, form) in YAMLS.items():
    for what, tag in TAGS.items():
        GROUP.add(f"{name}_{what}", lambda f, w=writer, t=form % tag: w(f, t), file=file,
                  context=True, errors=REFUSED, says=r"tag|evil|python")  # fmt: skip
    for what, value in BROKEN.items():
        # A list that holds itself, a number that is too long: an error too, as nothing writes them.
        GROUP.add(f"{name}_{what}", lambda f, w=writer, t=form % value: w(f, t), file=file,
                  context=True)  # fmt: skip
    GROUP.add(f"{name}_is_not_utf8", lambda f, w=writer, t=form: w(f, (t % "1").encode() + b"#\xff"),
              file=file, context=True)  # fmt: skip
    GROUP.add(f"{name}_of_4_mib", lambda f, w=writer, t=form: w(f, t % "1" + "#" * (4 << 20)),
              file=file, context=True)  # fmt: skip
for name in ("model_yaml", "run_config", "model_config"):
    writer, file, _ = YAMLS[name]
    for what, text in {"is_empty": "", "is_a_list": "[1]", "is_a_number": "3",
                       "has_two_documents": "a: 1\n---\nb: 2\n", "has_a_nul": "a: \0"}.items():  # fmt: skip
        GROUP.add(f"{name}_{what}", lambda f, w=writer, t=text: w(f, t), file=file, context=True)


def interpolated(name: str, text: str, **said: Any) -> None:
    GROUP.add(f"model_config_{name}", lambda f: write.model_config(f, f"num_layers: 2\n{text}"),
              **{"file": "model_config.yaml", "context": True, **said})  # fmt: skip


interpolated("asks_the_environment", "x: ${oc.env:HOME}\ny: ${oc.eval:1}\n", kind="inert")
interpolated("means_itself", "x: ${x}\n", says="x")
interpolated("means_itself_in_a_circle", "x: ${y}\ny: ${x}\n", says="x")
interpolated("grows_without_end", "".join(
    f"a{i}: ${{a{i + 1}}}${{a{i + 1}}}\n" for i in range(60)) + "a60: xx\n")  # fmt: skip
interpolated("names_an_artifact_above", "tokenizer: {model: 'nemo:../../etc/passwd'}\n",
             errors=REFUSED, says="passwd")  # fmt: skip
interpolated("names_an_absolute_artifact", "tokenizer: {model: 'nemo:/etc/passwd'}\n",
             errors=REFUSED, says="passwd")  # fmt: skip
interpolated("names_an_artifact_with_a_nul", 'tokenizer: {model: "nemo:a\\0b"}\n', errors=REFUSED)


def hub(name: str, content: Any = None, **said: Any) -> None:
    GROUP.add(f"config_json_{name}", lambda f: write.config_json(f, content),
              **{"file": "config.json", "context": True, **said})  # fmt: skip


hub("is_empty", b"")
hub("is_no_json", b"{")
hub("is_a_list", [1])
hub("is_not_utf8", b'{"a": "\xff"}')
hub("is_nested_100000_deep", nested(100_000))
hub("has_a_key_twice", b'{"model_type": "bert", "model_type": "llama"}', says="model_type")
hub("has_a_number_of_5000_digits", b'{"a": ' + b"9" * 5000 + b"}")
hub("is_quantized", context=False, content= {"model_type": "bert", "quantization_config": {"quant_method": "x"}},
    errors=REFUSED, file="", says="quantiz")  # fmt: skip
hub("is_quantized_further_in", context=False, content= {"text_config": {"quantization_config": {"quant_method": "x"}}},
    errors=REFUSED, file="", says="quantiz")  # fmt: skip
hub("brings_code", context=False, content= {"auto_map": {"AutoModel": "evil--repo.x"}}, errors=REFUSED, file="",
    says="auto_map")  # fmt: skip
hub("brings_code_further_in", context=False, content= {"a": [{"auto_map": {"AutoModel": "evil.x"}}]}, errors=REFUSED,
    file="", says="auto_map")  # fmt: skip


@GROUP.inert(context=True)
def common_args_of_classes_that_nobody_knows(folder):
    write.common_args(folder, {**write.ARGS, "x": Call(os.system, f"touch {canary(folder)}")})


@GROUP.bad(says="several|leads|two|says", context=True)
def neox_yml_two_files_contradict_each_other(folder):
    write.neox_yml(folder, write.NEOX)
    other = json.loads(write.NEOX) | {"num_layers": 99}
    (folder / "configs" / "other.yml").write_text(json.dumps(other))


@GROUP.bad(errors=REFUSED, says="adapter")
def an_adapter_without_its_base(folder):
    write.io_json(folder, document())
    (folder / "weights" / "adapter_metadata.json").write_text('{"model_ckpt_path": "/etc/passwd"}')


for name, writer in write.write_contexts().items():
    GROUP.add(f"good_{name}", writer, kind="good", context=True)
