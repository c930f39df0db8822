"""Detects that an optimizer step broke the policy: no response is right any more, though its weights are finite."""

from __future__ import annotations

from popo_lightning.core.kept_state import KeepsState

WINDOW = 10  # iterations before the break that are averaged
MAX_WRONG = 0.5  # limit of their mean share of all-wrong groups: above it, several such iterations may be chance


class BrokenPolicyDetector(KeepsState):
    """Detects a broken policy from the share of fresh groups without a right response.

    Args:
        patience: Consecutive iterations without any right response that show a broken policy.

    Attributes:
        since: First of the present iterations without a right response; None if the last iteration had one.
    """

    state = ("since", "_before", "_wrong", "_told")

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.since: int | None = None
        self._before: list[float] = []
        self._wrong = 0
        self._told = False

    def see(self, all_wrong_share: float | None, iteration: int) -> bool:
        """Notes an iteration, and returns whether to warn now.

        Args:
            all_wrong_share: `rollout/all_wrong_share`; None if nothing was sampled.
            iteration: Number of the iteration, counted from 1.
        """
        if all_wrong_share is None:
            return False
        if all_wrong_share < 1:
            self._before = [*self._before, *[1.0] * self._wrong, all_wrong_share][-WINDOW:]
            self.since, self._wrong, self._told = None, 0, False
            return False
        self.since, self._wrong = self.since or iteration, self._wrong + 1
        if self._told or not self.certain:
            return False
        self._told = True
        return True

    @property
    def before(self) -> float:
        """Mean share of groups without a right response before the break."""
        return sum(self._before) / len(self._before) if self._before else 1.0

    @property
    def suspected(self) -> bool:
        """Whether the last iteration had no right response although most groups had one before."""
        return self.since is not None and self.before < MAX_WRONG

    @property
    def certain(self) -> bool:
        """Whether so many consecutive iterations had none that it is not chance."""
        return self.suspected and self._wrong >= self.patience

    def sound_iterations(self, behind: int) -> int:
        """Number of iterations after which the policy was certainly not broken yet.

        Args:
            behind: Largest number of iterations by which the sampling weights are older than the newest.
        """
        assert self.since is not None
        return self.since - 2 - behind  # iteration n samples with the weights of iteration n - 1
