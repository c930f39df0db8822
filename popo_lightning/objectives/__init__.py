"""What one response token costs: advantage, behaviour weight, trust region, regularizers and their sum.

Three policies keep one name everywhere: *behave* sampled the tokens, *prox* is the centre of the trust region, and
*policy* is being trained (its log-probs are plainly `logp`). Every rule is a pure function of tensors plus a small
class that only holds its settings, so that YAML can name it by `class_path`.
"""

from popo_lightning.objectives.adaptive_regions import BalancedClip, ScaledWidth
from popo_lightning.objectives.advantages import (
    Advantage,
    DropSurplusNegatives,
    ExponentialWeight,
    GroupNormalised,
    LeaveOneOut,
    ShiftedBaseline,
    SoftBaseline,
    group_normalised,
)
from popo_lightning.objectives.aggregations import Aggregation, SequenceMean, SequenceSum, TokenMean
from popo_lightning.objectives.behave_regions import M2PO, BehaveAligned, FilteredBehaveAligned
from popo_lightning.objectives.detached_regions import CISPO, REC, CappedImportance
from popo_lightning.objectives.generalised_advantage import GAE, gae, moments, whiten
from popo_lightning.objectives.inputs import MinibatchTokens, ObjectiveInputs, log_ratio
from popo_lightning.objectives.max_at_k import BestMinusSecond, MaxAtK
from popo_lightning.objectives.objective import Objective, TokenStatistics
from popo_lightning.objectives.regularizers import (
    KL,
    ConvexKL,
    EntropyBonus,
    Regularizer,
    SquaredLogRatio,
    entropy_bonus,
    kl_estimate,
    kl_loss,
)
from popo_lightning.objectives.sequence_regions import GSPO
from popo_lightning.objectives.tree_baselines import TreeBaseline
from popo_lightning.objectives.trust_regions import PPOClip, TrustRegion, TrustRegionOutput, Unbounded, ppo_clip
from popo_lightning.objectives.weights import (
    BehaveWeight,
    Decoupled,
    Masked,
    One,
    SequenceWeight,
    Smoothed,
    decoupled_weight,
)

__all__ = [
    "CISPO",
    "GAE",
    "GSPO",
    "KL",
    "M2PO",
    "REC",
    "Advantage",
    "Aggregation",
    "BalancedClip",
    "BehaveAligned",
    "BehaveWeight",
    "BestMinusSecond",
    "CappedImportance",
    "ConvexKL",
    "Decoupled",
    "DropSurplusNegatives",
    "EntropyBonus",
    "ExponentialWeight",
    "FilteredBehaveAligned",
    "GroupNormalised",
    "LeaveOneOut",
    "Masked",
    "MaxAtK",
    "MinibatchTokens",
    "Objective",
    "ObjectiveInputs",
    "One",
    "PPOClip",
    "Regularizer",
    "ScaledWidth",
    "SequenceMean",
    "SequenceSum",
    "SequenceWeight",
    "ShiftedBaseline",
    "Smoothed",
    "SoftBaseline",
    "SquaredLogRatio",
    "TokenMean",
    "TokenStatistics",
    "TreeBaseline",
    "TrustRegion",
    "TrustRegionOutput",
    "Unbounded",
    "decoupled_weight",
    "entropy_bonus",
    "gae",
    "group_normalised",
    "kl_estimate",
    "kl_loss",
    "log_ratio",
    "moments",
    "ppo_clip",
    "whiten",
]
