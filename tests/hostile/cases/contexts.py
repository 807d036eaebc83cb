"""Saved configs: JSON, YAML and pickled arguments that would like to be more than data."""

import json
import os
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
        f"l{i}": {
            "type": pyref("builtins", "list"),
            "items": [["Index(index=0)", ref(f"l{i + 1}")]],
            "metadata": None,
        }
        for i in range(levels)
    }
    return document(config=config("a", "B", x=ref("l0")), **cells, **{f"l{levels}": leaf(1)})


fiddle("is_empty", b"")
fiddle("is_no_json", b'{"root": ')
fiddle("is_not_utf8", b'{"root": "\xff"}')
fiddle("is_a_list", [])
fiddle("is_nested_100000_deep", nested(100_000))
fiddle("is_nested_200_deep", nested(200))
fiddle(
    "has_a_key_twice", b'{"root": 1, "root": 2, "objects": {}, "version": "0.0.1"}', says="twice"
)
fiddle("has_a_number_of_5000_digits", b'{"root": ' + b"9" * 5000 + b"}")
fiddle("has_no_objects", {"root": ref("x"), "version": "0.0.1"})
fiddle("objects_are_a_list", {"root": ref("x"), "objects": [], "version": "0.0.1"})
fiddle("version_is_unknown", {**document(), "version": "9.9"}, errors=REFUSED, says="9.9")
fiddle("root_is_missing", {**document(), "root": ref("nowhere")}, says="nowhere")
fiddle("root_is_a_number", {**document(), "root": 3})
fiddle("root_is_a_call_of_os_system", {**document(), "root": pyref("os", "system")})
fiddle("reference_to_itself", document(config=ref("config")), says="config")
fiddle(
    "references_in_a_circle", document(config=config("a", "B", x=ref("model"))), says="circle|model"
)
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
fiddle(
    "key_that_is_an_expression",
    document(
        config=config(
            "a",
            "B",
            x={
                "type": pyref("builtins", "dict"),
                "metadata": None,
                "items": [["Key(key=__import__('os').system('touch CANARY'))", 1]],
            },
        )
    ),
)
fiddle(
    "key_that_is_a_large_power",
    document(
        config=config(
            "a",
            "B",
            x={
                "type": pyref("builtins", "dict"),
                "metadata": None,
                "items": [["Key(key=9**9**9**9)", 1]],
            },
        )
    ),
)
fiddle(
    "key_nested_900_deep",
    document(
        config=config(
            "a",
            "B",
            x={
                "type": pyref("builtins", "dict"),
                "metadata": None,
                "items": [["Key(key=" + "(" * 450 + ")" * 450 + ")", 1]],
            },
        )
    ),
)
fiddle(
    "key_with_an_odd_escape",
    document(
        config=config(
            "a",
            "B",
            x={
                "type": pyref("builtins", "dict"),
                "metadata": None,
                "items": [[r"Key(key='\d\q')", 1]],
            },
        )
    ),
    kind="either",
)
fiddle(
    "keys_are_too_few",
    document(
        config=config(
            "a",
            "B",
            x={
                "type": pyref("builtins", "dict"),
                "items": [["Key(key='a')", 1], ["Key(key='b')", 2]],
                "metadata": {"type": pyref("builtins", "tuple"), "items": [], "metadata": None},
            },
        )
    ),
)
fiddle(
    "bytes_of_a_number",
    document(
        config=config(
            "a", "B", x={"type": pyref("builtins", "bytes"), "items": [["x", 3]], "metadata": None}
        )
    ),
)
fiddle(
    "a_hundred_thousand_fields",
    document(config=config("a", "B", **{f"f{i}": i for i in range(100_000)})),
    kind="either",
)
fiddle(
    "names_an_artifact_above",
    document(
        config=config(
            "nemo.lightning.io.artifact.file", "FileArtifact", attr=leaf("../../../etc/passwd")
        )
    ),
    errors=REFUSED,
    says="passwd",
)
fiddle(
    "names_an_absolute_artifact",
    document(
        config=config(
            "a",
            "B",
            x=config("nemo.lightning.io.artifact.file", "FileArtifact", attr=leaf("/etc/passwd")),
        )
    ),
    errors=REFUSED,
    says="passwd",
)
fiddle(
    "names_an_artifact_with_a_nul",
    document(
        config=config(
            "a", "B", x=config("nemo.lightning.io.artifact.file", "FileArtifact", attr=leaf("a\0b"))
        )
    ),
    errors=REFUSED,
)
fiddle(
    "names_a_tokenizer_above",
    document(
        config=config(
            "a",
            "B",
            x=config(
                "nemo.x.SentencePieceTokenizer",
                "SentencePieceTokenizer",
                model_path=leaf("../../secret"),
            ),
        )
    ),
    errors=REFUSED,
    says="secret",
)


@GROUP.bad(file="io.json", context=True)
def io_json_of_a_gibibyte(folder):
    write.io_json(folder, document())
    os.truncate(folder / "context" / "io.json", 1 << 30)


for target in ("os.system", "builtins.eval", "antigravity.fly", "subprocess.Popen", "nemo.evil.X"):
    module, _, function = target.rpartition(".")
    evil = config(module, function, command=leaf("touch CANARY"), args=leaf("1+1"))
    fiddle(f"config_of_{target}", document(config=evil), kind="inert")
    fiddle(
        f"function_{target}",
        document(config=config("a", "B", f=pyref(module, function))),
        kind="inert",
    )
    said = f"model: {{_target_: {target}, _args_: ['touch CANARY'], _call_: true, num_layers: 2}}\n"
    GROUP.add(
        f"run_config_target_{target}",
        lambda f, s=said: write.run_config(f, s),
        kind="inert",
        context=True,
    )
    said = f"_target_: {target}\n_args_: ['touch CANARY']\nconfig: {{_target_: {target}, a: 1}}\n"
    GROUP.add(
        f"model_yaml_target_{target}",
        lambda f, s=said: write.model_yaml(f, s),
        kind="inert",
        context=True,
    )
    said = {"model_type": "bert", "_target_": target, "x": {"_target_": target, "_args_": ["x"]}}
    GROUP.add(
        f"config_json_target_{target}",
        lambda f, s=said: write.config_json(f, s),
        kind="inert",
        context=True,
    )
    said = f"target: {target}\nnum_layers: 2\nx: {{_target_: {target}}}\n"
    GROUP.add(
        f"model_config_target_{target}",
        lambda f, s=said: write.model_config(f, s),
        kind="inert",
        context=True,
    )
    said = {**write.ARGS, "_target_": target, "x": {"_target_": target}}
    GROUP.add(
        f"common_args_target_{target}",
        lambda f, s=said: write.common_args(f, s),
        kind="inert",
        context=True,
    )


def hub(name: str, content: Any = None, **said: Any) -> None:
    GROUP.add(
        f"config_json_{name}",
        lambda f: write.config_json(f, content),
        **{"file": "config.json", "context": True, **said},
    )


hub("is_empty", b"")
hub("is_no_json", b"{")
hub("is_a_list", [1])
hub("is_not_utf8", b'{"a": "\xff"}')
hub("is_nested_100000_deep", nested(100_000))
hub("has_a_key_twice", b'{"model_type": "bert", "model_type": "llama"}', says="model_type")
hub("has_a_number_of_5000_digits", b'{"a": ' + b"9" * 5000 + b"}")
hub(
    "is_quantized",
    context=False,
    content={"model_type": "bert", "quantization_config": {"quant_method": "x"}},
    errors=REFUSED,
    file="",
    says="quantiz",
)
hub(
    "is_quantized_further_in",
    context=False,
    content={"text_config": {"quantization_config": {"quant_method": "x"}}},
    errors=REFUSED,
    file="",
    says="quantiz",
)
hub(
    "brings_code",
    context=False,
    content={"auto_map": {"AutoModel": "evil--repo.x"}},
    errors=REFUSED,
    file="",
    says="auto_map",
)
hub(
    "brings_code_further_in",
    context=False,
    content={"a": [{"auto_map": {"AutoModel": "evil.x"}}]},
    errors=REFUSED,
    file="",
    says="auto_map",
)


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
