"""Scores logged responses under a checkpoint, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L

from popo_lightning.cli.estimate.trajectories import Trajectories, graded_responses
from popo_lightning.cli.export.base_model import base_model
from popo_lightning.cli.export.saved_policy import SavedPolicy
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.policy import PolicyModule

AT_A_TIME = 64  # problems per minibatch
COMPARED = 16  # responses whose text is compared
ACCURACY = "acc"


class Judged:
    """The policy of a checkpoint, which gives log-probs at any temperature.

    Args:
        saved: The checkpoint.
        base: Model that the run began with, if the run's settings no longer name it.

    Raises:
        SettingError: The checkpoint cannot be loaded.
    """

    def __init__(self, saved: SavedPolicy, base: str | None = None) -> None:
        from transformers import AutoTokenizer

        given: dict[str, Any] = {} if base is None else {"path": base}
        self.policy = PolicyModule.load_from_checkpoint(saved.checkpoint, **given)
        self.policy.trainer = L.Trainer(
            accelerator="auto",
            devices=1,
            precision=saved.setting("trainer.precision", "32-true"),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        self.policy.to(self.policy.trainer.strategy.root_device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base_model(saved, base).folder)
        self.vocabulary = int(self.policy.model.get_output_embeddings().weight.shape[0])

    def check(self, groups: Sequence[Group]) -> None:
        """Refuses responses in another tokenizer's tokens, whose log-probs would be those of other text.

        Raises:
            SettingError: The responses have other tokens.
        """
        written = [response for group in groups for response in group.responses if len(response.token_ids)]
        largest = max([0, *(int(response.token_ids.max()) for response in written)])
        first = written[:COMPARED]
        texts = [self.tokenizer.decode(r.token_ids, skip_special_tokens=True).strip() for r in first]
        same = sum(text.startswith(r.text.strip()) for text, r in zip(texts, first, strict=True))
        if largest >= self.vocabulary or 2 * same < len(first):
            raise SettingError(
                "the responses were written in other tokens than the checkpoint's; name a run by --from that began "
                "with the same tokenizer"
            )

    def trajectories(
        self, groups: Sequence[Group], temperature: float, component: str = ACCURACY
    ) -> list[Trajectories]:
        """The responses to each problem, with log-probs under both policies.

        Args:
            groups: One group per problem.
            temperature: Temperature at which the policy is judged.
            component: Reward component.
        """
        self.policy.temperature = temperature
        found: list[Trajectories] = []
        for begin in range(0, len(groups), AT_A_TIME):
            some = list(groups[begin : begin + AT_A_TIME])
            logp = iter(self.policy.logprobs(Minibatch(some, 0, 0)))
            for group in some:
                target = [next(logp).double().numpy() for _ in group.responses]
                behave = [response.behave_logp.double().numpy() for response in group.responses]
                found.append(graded_responses(target, behave, [_reward(r, component) for r in group.responses]))
        return found


def _reward(response: Response, name: str) -> float:
    """The component; 0 where grading failed, which gives score and acc alone."""
    parts = response.parts
    if name not in parts and response.failure is None:
        raise SettingError(f"--reward is '{name}', which the responses do not have; use {' or '.join(sorted(parts))}")
    return parts.get(name, 0.0)
