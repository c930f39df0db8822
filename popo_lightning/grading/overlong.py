"""A penalty that grows linearly before the response limit is reached."""

from __future__ import annotations

from collections.abc import Sequence

from popo_lightning.core.bounds import above, at_least
from popo_lightning.core.errors import SettingError


class SoftOverlong:
    """Penalizes responses close to the token limit (DAPO, 2503.14476, equation 13).

    The penalty is 0 up to ``limit - buffer_tokens``, and then falls linearly to ``-most`` at the limit. The component
    "overlong" is the penalty, and "score" includes it; "acc" is unchanged.

    Args:
        buffer_tokens: Number of last tokens before the limit over which the penalty grows.
        most: Penalty of a response that reaches the limit.
    """

    def __init__(self, buffer_tokens: int, most: float = 1.0) -> None:
        self.buffer_tokens = at_least("data.overlong.buffer_tokens", buffer_tokens, 1, ", or data.overlong null")
        self.most = above("data.overlong.most", most, 0, "1.0")

    def check(self, limit: int) -> None:
        """Raises SettingError if the penalty would apply to every response."""
        if self.buffer_tokens >= limit:
            raise SettingError(
                f"data.overlong.buffer_tokens is {self.buffer_tokens} but data.max_new_tokens only {limit}; every "
                "response would be penalised, so use fewer"
            )

    def penalties(self, lengths: Sequence[int], limit: int) -> list[float]:
        """One number from -most to 0 for each response.

        Args:
            lengths: Number of tokens of each response.
            limit: Maximum number of tokens of a response.
        """
        free = limit - self.buffer_tokens
        return [-self.most * min(1.0, max(0, length - free) / self.buffer_tokens) for length in lengths]
