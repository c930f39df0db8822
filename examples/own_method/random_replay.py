"""A method of your own: replays random stored groups instead of the most recent ones."""

from popo_lightning.core.groups import Group
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.replay.composer import Composer, Iteration


class RandomReplay(Composer):
    """Replaces each ineffective group by a random stored effective one.

    Args:
        buffer: Stores effective groups.
    """

    state = ("buffer",)  # decides later compositions; a checkpoint saves it, so that a resumed run is the same run

    def __init__(self, buffer: GroupReplayBuffer) -> None:
        self.buffer = buffer

    def compose(self, iteration: Iteration) -> list[Group]:
        """Returns effective fresh groups, then replayed ones. The iteration's generator draws, so seeds repeat."""
        fresh = iteration.rollout()
        effective, ineffective = iteration.split(fresh)
        stored = self.buffer.usable(iteration.version, wanted=iteration.still_effective)
        replayed = iteration.random("replay").sample(stored, min(len(ineffective), len(stored)))
        self.buffer.used(replayed)  # counts towards the buffer's max_uses
        self.buffer.insert(effective, len(fresh))
        return effective + replayed
