"""The control plane: lighthouse, replica groups, submission, monitor and drills. Never imports torch.

From Python (a notebook, a pipeline), from the repository's root::

    from launcher import submit

    run = submit("configs/llama3.1-8b.toml", replicas=4, profile="h100")
    run.jobs[0].state        # submitit jobs, one for each replica group
    run.wait(timeout=3600)   # True when it has finished
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["find", "submit"]

if TYPE_CHECKING:
    from launcher.jobs import find, submit


def __getattr__(name: str) -> Any:
    # The command line must not pay for submitit's import.
    if name in __all__:
        from launcher import jobs

        return getattr(jobs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
