"""Problems to prompt tokens, once, for engine and policy alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from popo_lightning.errors import SettingError, reason
from popo_lightning.problems import Problem

log = logging.getLogger(__name__)


class PromptEncoder:
    """The tokenizer of a model folder.

    Args:
        folder: Model folder or hub id.
        max_tokens: Longest prompt.

    Raises:
        SettingError: No tokenizer there, or one without padding or end token.
    """

    def __init__(self, folder: str | Path, max_tokens: int) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise SettingError(f"model.path is '{folder}', from which no tokenizer loads: {reason(error)}") from error
        for token, use in (("eos", "a response could never end"), ("pad", "it cannot be told from text")):
            if getattr(self.tokenizer, f"{token}_token_id") is None:
                raise SettingError(
                    f"the tokenizer of model.path '{folder}' has no {token} token, so {use}; set {token}_token in its "
                    "tokenizer_config.json"
                )
        self.folder = folder
        self.max_tokens = max_tokens
        self._encoded: dict[str, Tensor] = {}

    def encode(self, problem: Problem) -> Tensor:
        """(P,) token ids, kept for the next time."""
        if problem.id not in self._encoded:
            if isinstance(problem.prompt, str):
                ids = self.tokenizer(problem.prompt)["input_ids"]
            else:
                ids = self._chat(problem.prompt)
            if not ids:
                raise SettingError(f"problem '{problem.id}' of data.task has an empty prompt; leave it out")
            self._encoded[problem.id] = torch.tensor(ids, dtype=torch.long)
        return self._encoded[problem.id]

    def _chat(self, messages: list[dict[str, Any]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise SettingError(
                f"the tokenizer of model.path '{self.folder}' has no chat template but the task asks in messages; "
                "use an instruct model or a task with plain prompts"
            )
        ids: list[int] = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        return ids

    def fitting(self, problems: Sequence[Problem]) -> list[Problem]:
        """Problems whose prompt is short enough; the others are counted in the log."""
        kept = [problem for problem in problems if len(self.encode(problem)) <= self.max_tokens]
        if len(kept) < len(problems):
            log.warning("%d of %d prompts are too long and left out", len(problems) - len(kept), len(problems))
        return kept
