"""``migrate``: what was written for other systems, as YAML of ours on stdout."""

from __future__ import annotations

import argparse

from bioinit.cli.said import EXITS

_EPILOG = """\
settings FILE  NeMo 1's dist_ckpt_* settings, as arguments of NeMo 2's MegatronStrategy and as
               sections of a recipe here
context CKPT   a checkpoint's saved config, as a recipe that starts the same model
recipe FILE    a run file of BioNeMo (bionemo_model_config: ...), as a recipe

For example:
  bioinit migrate settings nemo1.yaml > settings.yaml
  bioinit migrate context old/esm2_nemo2 > mine.yaml && bioinit plan recipe=./mine.yaml
  bioinit migrate recipe run.yaml --family esm2 > mine.yaml

Nothing that a file names is imported, and no weight is read.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the verb takes."""
    parser.add_argument("kind", choices=("settings", "context", "recipe"), help="see below")
    parser.add_argument("path", metavar="FILE|CKPT", help="what is to be migrated")
    parser.add_argument("--family", metavar="NAME", help="recipe: esm2 or biobert")
    parser.epilog = f"{_EPILOG}\n{EXITS}"


def run(given: argparse.Namespace) -> int:
    """Print what became of it."""
    from bioinit import migrate
    from bioinit.errors import ConfigError

    if given.family is not None and given.kind != "recipe":
        raise ConfigError(
            f"--family={given.family} goes with `migrate recipe`; a checkpoint and settings "
            "say themselves what they are. Leave it out."
        )
    if given.kind == "settings":
        print(migrate.migrate_settings(given.path).text, end="")
    elif given.kind == "context":
        print(migrate.migrate_context(given.path), end="")
    else:
        print(migrate.migrate_recipe(given.path, given.family), end="")
    return 0
