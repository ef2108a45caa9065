"""LocalSGD and DiLoCo among replica groups that come and go.

Between two syncs every group trains by itself. What torchft 2026.10.26 and torchtitan 0.2.2 leave
open there, for a group that starts while others train:

- it would train a whole period of its own first, and throw that away at its first sync, where it
  heals; of two groups, the other one waits for it all that time. Also when a run starts, all groups
  but one lose their first period. Here a group meets the others before its first step;
- models without torchtitan's ``fragment_fn`` (all but ``llama3_ft``) are never cut into fragments, in
  silence; see ``spec.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torchft.local_sgd import DiLoCo, LocalSGD
from torchtitan.tools.logging import logger

#: Seconds between two signs of a group's own progress, at least: a stall is 8 s and more.
SIGN_EVERY = 2.0
#: Steps of the first period whose time tells how long it will be (the first one compiles).
MEASURED_STEPS = 3


class SemiSync:
    """The semi-sync method of one rank: LocalSGD or DiLoCo of torchft."""

    def __init__(self, method: LocalSGD | DiLoCo, manager: Any) -> None:
        self._method = method
        self._manager = manager
        self._synced: Any = None
        """The fragment that was synced last."""

    @property
    def every(self) -> int:
        """Steps between two syncs."""
        return int(self._method._sync_every)

    def join(self, too_late: Callable[[], None]) -> bool:
        """Meet the other groups, before the first step of this one.

        At the start of a run that is a sync of nothing. Later, the group waits here until the others
        come to their next sync, heals from one of them, and takes part in it.

        Args:
            too_late: called before a run is begun with no peer that has trained.

        Returns:
            Whether it has healed from a peer that had trained, and stands now where that peer stood:
            after the optimizer's step, before the scheduler's.
        """
        while True:
            self._manager.start_quorum()
            before = self._manager.current_step()
            if before == 0:
                too_late()
            if isinstance(self._method, DiLoCo):
                self._join_fragment(at_once=before == 0)
            else:
                self._method._perform_sync()
                self._method._local_step = 0
            # A group that could not heal would train a period for nothing: it asks again.
            if before > 0 or self._manager.current_step() > 0:
                return before > 0

    def _join_fragment(self, at_once: bool) -> None:
        """What the others do at this moment: send a fragment, and take it now or some steps later."""
        method = self._method
        fragment = method._fragments[method._current_fragment()]
        fragment.prepare_sync()
        if at_once or method._fragment_sync_delay == 0:
            fragment.perform_sync()
            method._local_step = 0
        else:
            method._local_step = method._sync_every - method._fragment_sync_delay

    def shared(self, model_parts: list[Any]) -> list[Any]:
        """The weights that all groups have in common right after a sync.

        LocalSGD: the model's. DiLoCo: the global ones of the fragment that was synced; the others, and
        with ``fragment_update_alpha`` also that one, hold what the group has learnt by itself.
        """
        if not isinstance(self._method, DiLoCo):
            return [parameter for part in model_parts for parameter in part.parameters()]
        fragments = self._method._fragments
        synced = fragments[(self._manager.current_step() - 1) % len(fragments)]
        return list(synced.original_parameters.values())


class Pace:
    """Tells of a group's own steps, for those who would take a long period for a hang."""

    def __init__(self, record: Callable[..., None], quorum_timeout: float) -> None:
        """``quorum_timeout``: seconds after which a group that waits for the others gives up."""
        self._record = record
        self._quorum_timeout = quorum_timeout
        self._told = float("-inf")
        self._steps = 0
        self._since = 0.0

    def joining(self) -> None:
        """The group begins to wait for the others, to join them."""
        self._record("progress", joining=True)

    def step(self, titan_step: int, every: int) -> None:
        """A step of its own is over; a sync may follow."""
        now = time.monotonic()
        if now - self._told >= SIGN_EVERY or self._steps < MEASURED_STEPS:
            self._told = now
            self._record("progress", titan_step=titan_step)
        self._steps += 1
        if self._steps == 1:
            self._since = now
        elif self._steps == MEASURED_STEPS:
            self._compare((now - self._since) / (MEASURED_STEPS - 1) * every)

    def _compare(self, period: float) -> None:
        if period * 1.5 > self._quorum_timeout:
            logger.warning(
                f"two syncs are about {period:.0f} s apart, and a group that waits for one gives up after "
                f"{self._quorum_timeout:.0f} s: set TORCHFT_QUORUM_TIMEOUT_SEC to "
                f"{2 * period:.0f} or more"
            )


def attached(original: Callable[..., Any]) -> Callable[..., Any]:
    """torchtitan's ``maybe_semi_sync_training``, which also tells the trainer's manager what it has
    made (``semi_sync``), and of every step of the optimizer, before a sync (``on_step``)."""

    def build(ft_config: Any, ft_manager: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(ft_config, ft_manager, *args, **kwargs)
        if isinstance(made, LocalSGD | DiLoCo):
            ft_manager.semi_sync = SemiSync(made, ft_manager.manager)
            # Before those of the method, which are added when it is entered.
            made._local_optimizer.register_step_post_hook(lambda *_: ft_manager.on_step())
        return made

    return build
