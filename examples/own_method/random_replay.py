"""A method of one's own: replay of random stored groups in the place of the most recent ones."""

from popo_lightning.core.groups import Group
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.replay.composer import Composer, Iteration


class RandomReplay(Composer):
    """The place of each ineffective group goes to a random stored effective one.

    Args:
        buffer: Where effective groups wait.
    """

    state = ("buffer",)  # what decides later compositions; a checkpoint keeps it, so that a resumed run is the same run

    def __init__(self, buffer: GroupReplayBuffer) -> None:
        self.buffer = buffer

    def compose(self, iteration: Iteration) -> list[Group]:
        """Effective fresh groups, then replayed ones. A generator of this iteration decides, so that seeds repeat."""
        fresh = iteration.rollout()
        effective, ineffective = iteration.split(fresh)
        stored = self.buffer.usable(iteration.version)
        replayed = iteration.random("replay").sample(stored, min(len(ineffective), len(stored)))
        self.buffer.used(replayed)  # counts towards the buffer's max_uses
        self.buffer.insert(effective, len(fresh))
        return effective + replayed
