"""Problems, which a policy is asked. Free of torch, so that grading processes start in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

IMAGE_MARK = "<image>"
"""Stands for an image in the text of a prompt."""


class SavedWhole:
    """Base of objects that a checkpoint holds as they are; reading one back checks its fields like a new one's."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, **state)


@dataclass(frozen=True)
class Problem(SavedWhole):
    """One task item.

    Args:
        id: Unique within its task. It decides between train and held-out, and keeps a problem from filling one batch
            twice.
        prompt: Text used exactly as given, or chat messages for the tokenizer's template. A last assistant message is
            the beginning of the response, which the policy continues. ``<image>`` in a message stands for an image.
        answer: The verifier's reference, in plain JSON types, because it is sent to the grading processes.
        info: Level, subject and similar fields, for breakdowns; plain JSON types.
        images: Path, or encoded bytes (PNG, JPEG), of each image, in the order of their marks in the prompt.
    """

    id: str
    prompt: str | list[dict[str, Any]]
    answer: Any
    info: dict[str, Any] = field(default_factory=dict)
    images: tuple[str | bytes, ...] = ()

    @property
    def question(self) -> str:
        """Text of the prompt; of chat messages, the last one of the user."""
        if isinstance(self.prompt, str):
            return self.prompt
        return next((str(one["content"]) for one in reversed(self.prompt) if one["role"] == "user"), "")

    @property
    def response_prefix(self) -> str:
        """Beginning of the response that the prompt gives; verifiers read it together with what the policy wrote."""
        if isinstance(self.prompt, str) or self.prompt[-1]["role"] != "assistant":
            return ""
        prefix: str = self.prompt[-1]["content"]
        return prefix
