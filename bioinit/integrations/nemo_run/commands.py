"""What ``nemorun`` finds of ours, by the entry point ``nemo_run.cli``.

    nemorun bioinit init --factory esm2_token_classification run.executor=torchrun ...

Imported by NeMo-Run, it registers the verb, a factory for each recipe, and the executor
``torchrun``.
"""

# No annotation here may be text: NeMo-Run reads them as they stand.

import sys
from collections.abc import Callable
from typing import Any

from bioinit.initialize import Initialized
from bioinit.integrations import run_recipe
from bioinit.integrations.nemo_run import local_executor
from bioinit.recipe.sources import names

__all__ = ["factory", "init", "torchrun"]


def init(recipe: str, overrides: list[str] = []) -> Initialized:  # noqa: B006
    """Compose a recipe and initialize its model."""
    return run_recipe(recipe, overrides)


def torchrun(processes: int = 1) -> Any:
    """Processes on this machine; ``run.executor.ntasks_per_node`` says how many."""
    return local_executor(processes).to_config()


def factory(recipe: str) -> Callable[..., Any]:
    """A factory of NeMo-Run for the job that starts from ``recipe``."""
    import nemo_run as run

    def made(overrides: list[str] = []) -> Any:  # noqa: B006
        return run.Partial(init, recipe=recipe, overrides=list(overrides))

    made.__name__ = made.__qualname__ = recipe.replace("/", "_")
    made.__doc__ = f"The recipe {recipe}."
    registered: Callable[..., Any] = run.cli.factory(made, target=init)
    return registered


def _register() -> None:
    import nemo_run as run

    run.cli.entrypoint(init, namespace="bioinit", help="Start a fine-tune from a recipe.")
    run.cli.factory(torchrun, target=run.LocalExecutor)
    for name in names():
        factory(name)


if "nemo_run" in sys.modules:  # it is slow to import, and whoever wants this has done so
    _register()
