"""What a policy is asked. Free of torch, so that grading processes start in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One task item.

    Args:
        id: Unique within its task; decides train or held-out and keeps a problem from filling one batch twice.
        prompt: Text used exactly as it is, or chat messages for the tokenizer's template.
        answer: Whatever the task's verifier needs, in plain JSON types (it travels to the grading processes).
        info: Level, subject and the like, for breakdowns; plain JSON types.
    """

    id: str
    prompt: str | list[dict[str, Any]]
    answer: Any
    info: dict[str, Any] = field(default_factory=dict)
