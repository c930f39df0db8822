"""How far a run is: iterations done, and minibatches of the one under way."""

from __future__ import annotations


def progress(begun: int, steps: int, left: int) -> tuple[int, int]:
    """Iterations whose minibatches are all done, and minibatches done of the next one.

    Args:
        begun: Iterations that have begun.
        steps: Minibatches of an iteration.
        left: Of those, the ones that the latest iteration has still to take.
    """
    return (begun - 1, steps - left) if left else (begun, 0)
