"""What a policy's own methods, and callbacks, read of it: its settings, its parts, and the metrics of an iteration."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.warm_start import WarmStart
from popo_lightning.model.critic import Critic
from popo_lightning.model.lora import Lora
from popo_lightning.objectives.advantages import Advantage
from popo_lightning.objectives.objective import Objective


class PolicyAttributes(L.LightningModule):
    """The attributes of a policy. :class:`PolicyModel` and :class:`PolicyModule` create them.

    Attributes:
        model: The transformers model, once configure_model has run.
        iteration_metrics: Metrics of the last iteration. The Monitor callback writes them, other callbacks read them.
    """

    model: Any
    path: str | None
    warm_start: WarmStart | None
    objective: Objective
    advantage: Advantage
    critic: Critic | None
    lora: Lora | None
    weight_dtype: torch.dtype
    attention: str | None
    freeze_vision: bool
    gradient_checkpointing: bool
    compile_layers: bool
    micro_batch_tokens: int
    shared_prompts: bool
    temperature: float
    reward_key: str
    iteration_metrics: dict[str, float]
    _reference: list[nn.Module]

    @property
    def reference(self) -> nn.Module:
        """The frozen first policy, as a model of its own. There is none with LoRA, or if nothing compares with it."""
        return self._reference[0]

    def advantages(self, minibatch: Minibatch) -> list[Tensor]:
        """Returns the advantage of every row; :class:`PolicyModule` has it."""
        raise NotImplementedError
