"""NeMo-Run: the same job as a ``run.Partial``.

For example::

    import nemo_run as run
    from bioinit.integrations import nemo_run

    task = nemo_run.partial("auto/as_saved", ["model.initial_ckpt_path=/ckpt", "output_dir=/out"])
    run.run(task, executor=run.LocalExecutor())

The job travels as text and composes on the machine that the executor chose. NeMo-Run's local
executor starts the ``python`` it finds on ``PATH``: activate the environment bioinit is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bioinit.errors import ConfigError
from bioinit.integrations import run_recipe


def partial(recipe: str, overrides: Sequence[str] = ()) -> Any:
    """A ``run.Partial`` that composes and initializes where the executor runs it.

    Raises:
        ConfigError: NeMo-Run is not installed.
    """
    try:
        import nemo_run as run
    except ImportError as error:
        raise ConfigError(
            f"NeMo-Run is not installed ({error}). Install it: pip install 'bioinit[nemo-run]'."
        ) from error
    return run.Partial(run_recipe, recipe=recipe, overrides=list(overrides))
