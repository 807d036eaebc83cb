"""NeMo-Run: the same job as a ``run.Partial``, and executors that start it with torchrun.

For example::

    import nemo_run as run
    from bioinit.integrations import nemo_run

    task = nemo_run.partial("auto/as_saved", ["model.initial_ckpt_path=/ckpt", "output_dir=/out"])
    run.run(task, executor=nemo_run.local_executor(2))

The job travels as text and composes on the machine that the executor chose. NeMo-Run's local
executor starts the ``torchrun`` it finds on ``PATH``: activate the environment bioinit is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bioinit.errors import ConfigError
from bioinit.integrations import run_recipe
from bioinit.recipe.sources import find

__all__ = ["local_executor", "partial", "recipe", "slurm_executor"]


def partial(recipe: str, overrides: Sequence[str] = ()) -> Any:
    """A ``run.Partial`` that composes and initializes where the executor runs it.

    Raises:
        ConfigError: NeMo-Run is not installed.
    """
    return _library().Partial(run_recipe, recipe=recipe, overrides=list(overrides))


def recipe(name: str) -> Callable[..., Any]:
    """The recipe ``name`` as a factory of NeMo-Run: call it with overrides for a ``run.Partial``.

    All of ours are registered for ``nemorun bioinit init --factory NAME``, with ``_`` for ``/``:
    ``esm2_token_classification``.

    Raises:
        ConfigError: there is no such recipe, or NeMo-Run is not installed.
    """
    _library()
    from bioinit.integrations.nemo_run.commands import factory

    return factory(find(name).name)


def local_executor(processes: int = 1, **more: Any) -> Any:
    """A ``run.LocalExecutor`` that starts so many processes here with torchrun.

    Args:
        processes: how many; ``ntasks_per_node`` of NeMo-Run.
        **more: any other field of ``run.LocalExecutor``.

    Raises:
        ConfigError: NeMo-Run is not installed.
    """
    run = _library()
    return run.LocalExecutor(**{"ntasks_per_node": processes, "launcher": "torchrun", **more})


def slurm_executor(
    account: str,
    partition: str | None = None,
    *,
    nodes: int = 1,
    gpus_per_node: int | None = 8,
    **more: Any,
) -> Any:
    """A ``run.SlurmExecutor`` that starts torchrun on each node, with one process for each GPU.

    Nodes are taken whole, and no code is packed: the job is text, and bioinit stands in the image
    or the environment that ``more`` names.

    Args:
        account: who pays.
        partition: the queue.
        nodes: how many machines.
        gpus_per_node: how many GPUs each has; None asks for none, and ``ntasks_per_node`` in
            ``more`` says how many processes.
        **more: any other field of ``run.SlurmExecutor``: ``time``, ``tunnel``, ``container_image``.

    Raises:
        ConfigError: NeMo-Run is not installed.
    """
    run = _library()
    fields = {
        "ntasks_per_node": gpus_per_node or 1,
        "launcher": "torchrun",
        "packager": run.Packager(),
        "exclusive": True,
        "mem": "0",
    }
    return run.SlurmExecutor(
        account=account,
        partition=partition,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        **{**fields, **more},
    )


def _library() -> Any:
    try:
        import nemo_run
    except ImportError as error:
        raise ConfigError(
            f"NeMo-Run is not installed ({error}). Install it: pip install 'bioinit[nemo-run]'."
        ) from error
    return nemo_run
