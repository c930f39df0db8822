"""What one response token costs: advantage, behaviour weight, trust region, regularizers and their sum.

Three policies keep one name everywhere: *behave* sampled the tokens, *prox* is the centre of the trust region, and
*policy* is being trained (its log-probs are plainly `logp`). Every rule is a pure function of tensors plus a small
class that only holds its settings, so that YAML can name it by `class_path`.
"""

from popo_lightning.objectives.advantages import Advantage, GroupNormalised, group_normalised
from popo_lightning.objectives.objective import Objective, ObjectiveInputs, TokenStatistics
from popo_lightning.objectives.regularizers import KL, EntropyBonus, Regularizer, entropy_bonus, kl_estimate, kl_loss
from popo_lightning.objectives.trust_regions import PPOClip, TrustRegion, TrustRegionOutput, ppo_clip
from popo_lightning.objectives.weights import BehaveWeight, Decoupled, One, decoupled_weight, log_ratio

__all__ = [
    "KL",
    "Advantage",
    "BehaveWeight",
    "Decoupled",
    "EntropyBonus",
    "GroupNormalised",
    "Objective",
    "ObjectiveInputs",
    "One",
    "PPOClip",
    "Regularizer",
    "TokenStatistics",
    "TrustRegion",
    "TrustRegionOutput",
    "decoupled_weight",
    "entropy_bonus",
    "group_normalised",
    "kl_estimate",
    "kl_loss",
    "log_ratio",
    "ppo_clip",
]
