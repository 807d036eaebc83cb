"""Saved configs in YAML: tags that ask for objects, aliases that explode, values meaning others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile import contexts as write
from tests.hostile.corpus import REFUSED, Group

GROUP = Group("yamls")

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
BOMB = (
    "{"
    + ", ".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))])
    + "}"
)
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
        GROUP.add(
            f"{name}_{what}",
            lambda f, w=writer, t=form % tag: w(f, t),
            file=file,
            context=True,
            errors=REFUSED,
            says=r"tag|evil|python",
        )
    for what, value in BROKEN.items():
        # A list that holds itself, a number that is too long: an error too, as nothing writes them.
        GROUP.add(
            f"{name}_{what}", lambda f, w=writer, t=form % value: w(f, t), file=file, context=True
        )
    GROUP.add(
        f"{name}_is_not_utf8",
        lambda f, w=writer, t=form: w(f, (t % "1").encode() + b"#\xff"),
        file=file,
        context=True,
    )
    GROUP.add(
        f"{name}_of_4_mib",
        lambda f, w=writer, t=form: w(f, t % "1" + "#" * (4 << 20)),
        file=file,
        context=True,
    )
for name in ("model_yaml", "run_config", "model_config"):
    writer, file, _ = YAMLS[name]
    for what, text in {
        "is_empty": "",
        "is_a_list": "[1]",
        "is_a_number": "3",
        "has_two_documents": "a: 1\n---\nb: 2\n",
        "has_a_nul": "a: \0",
    }.items():
        GROUP.add(f"{name}_{what}", lambda f, w=writer, t=text: w(f, t), file=file, context=True)


def interpolated(name: str, text: str, **said: Any) -> None:
    GROUP.add(
        f"model_config_{name}",
        lambda f: write.model_config(f, f"num_layers: 2\n{text}"),
        **{"file": "model_config.yaml", "context": True, **said},
    )


interpolated("asks_the_environment", "x: ${oc.env:HOME}\ny: ${oc.eval:1}\n", kind="inert")
interpolated("means_itself", "x: ${x}\n", says="x")
interpolated("means_itself_in_a_circle", "x: ${y}\ny: ${x}\n", says="x")
interpolated(
    "grows_without_end",
    "".join(f"a{i}: ${{a{i + 1}}}${{a{i + 1}}}\n" for i in range(60)) + "a60: xx\n",
)
interpolated(
    "names_an_artifact_above",
    "tokenizer: {model: 'nemo:../../etc/passwd'}\n",
    errors=REFUSED,
    says="passwd",
)
interpolated(
    "names_an_absolute_artifact",
    "tokenizer: {model: 'nemo:/etc/passwd'}\n",
    errors=REFUSED,
    says="passwd",
)
interpolated("names_an_artifact_with_a_nul", 'tokenizer: {model: "nemo:a\\0b"}\n', errors=REFUSED)
