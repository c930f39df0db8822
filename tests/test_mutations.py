"""Does test_objectives.py notice a wrong formula? Each mutation below must make at least one of its tests fail."""

import importlib
import pkgutil
import runpy
import shutil
import sys
from pathlib import Path

import pytest

import popo_lightning
import popo_lightning.objectives

HERE = Path(__file__).parent
SOURCE = Path(popo_lightning.objectives.__file__).parent

PROX, BEHAVE = "prox_logp.detach()", "behave_logp.detach()"

# What is wrong, file, text in it (exactly once), replacement.
MUTATIONS = [
    ("biased std", "advantages", "correction=1", "correction=0"),
    ("std tested instead of spread", "advantages", "spread > SPREAD_TOLERANCE", "spread >= 0"),
    ("eps dropped", "advantages", "correction=1) + eps", "correction=1)"),
    ("mean not subtracted", "advantages", "rewards - rewards.mean(dim=-1, keepdim=True)", "rewards * 1.0"),
    ("exp before mask", "inputs", "torch.where(mask.bool(), a - b, 0.0)", "((a - b) * mask)"),
    ("log-ratio not clamped", "inputs", ".clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)", ""),
    ("prox and behave swapped", "weights", f"{PROX}, {BEHAVE}", f"{BEHAVE}, {PROX}"),
    ("weight keeps gradient", "weights", f"{PROX}, {BEHAVE}", "prox_logp, behave_logp"),
    ("cap None drops the weight", "weights", "raw if cap is None", "torch.ones_like(raw) if cap is None"),
    ("cap ignored", "weights", "raw.clamp(max=cap)", "raw"),
    ("fresh rows corrected", "weights", "if not self.correct_fresh", "if self.correct_fresh"),
    ("pi_old still corrects", "weights", "torch.ones_like(raw), raw", "raw, raw"),
    ("sign of the loss", "trust_regions", "unclipped = -ratio", "unclipped = ratio"),
    ("no clip", "trust_regions", "torch.maximum(unclipped, bounded)", "unclipped"),
    ("optimistic clip", "trust_regions", "torch.maximum(", "torch.minimum("),
    ("bounds swapped", "trust_regions", "clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)"),
    ("dual clip on A > 0", "trust_regions", "(advantages < 0)", "(advantages > 0)"),
    ("dual clip not counted", "trust_regions", "clipped | over", "clipped"),
    ("prox keeps gradient", "trust_regions", "prox_logp.detach()", "prox_logp"),
    ("padding keeps its advantage", "trust_regions", "torch.where(mask, advantages, 0.0)", "advantages * mask"),
    ("KL the other way", "regularizers", "log_ratio(ref_logp.detach(), logp", "-log_ratio(ref_logp.detach(), logp"),
    ("k1 keeps its own gradient", "regularizers", "k2 + (loss - k2).detach()", "loss"),
    ("KL not weighted", "regularizers", "weight * loss", "loss"),
    ("k3 unbounded", "regularizers", ".clamp(max=K3_BOUND)", ""),
    ("entropy punished", "regularizers", "-torch.where(mask.bool(), entropy", "torch.where(mask.bool(), entropy"),
    ("no behaviour weight", "objective", "weight * region.loss", "region.loss"),
    ("mean over a padded block", "objective", ".sum(dim=-1)\n        loss", ".mean(dim=-1)\n        loss"),
    (
        "mean of the rows' means",
        "objective",
        "self.aggregation.row_weights(mask.sum(dim=-1)) * row_loss",
        "row_loss / mask.sum(dim=-1)",
    ),
    ("mean of micro-batch means", "objective", ".sum() / denominator", ".sum() / mask.sum()"),
    ("regularizers forgotten", "objective", "tuple(regularizers or ())", "()"),
    ("statistics keep the graph", "objective", "region.ratio.detach()", "region.ratio"),
]


def failing_tests(monkeypatch: pytest.MonkeyPatch, package: Path) -> list[str]:
    """Run test_objectives.py in this process with `package` in the place of popo_lightning.objectives."""
    for module in pkgutil.iter_modules([str(SOURCE)]):
        name = f"popo_lightning.objectives.{module.name}"
        importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "popo_lightning.objectives")
    monkeypatch.setattr(popo_lightning, "objectives", popo_lightning.objectives)  # to put the true one back
    monkeypatch.setattr(popo_lightning, "__path__", [str(package.parent), *popo_lightning.__path__])
    importlib.invalidate_caches()
    tests = {k: v for k, v in runpy.run_path(str(HERE / "test_objectives.py")).items() if k.startswith("test_")}
    used = tests["test_objective_by_hand"].__globals__["Objective"].__init__.__code__.co_filename
    assert used.startswith(str(package)), "the copy was not imported"
    failures = []
    for name, test in tests.items():
        try:
            test()
        except (Exception, pytest.fail.Exception):  # however a test fails, it has noticed
            failures.append(name)
    return failures


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [*(m[1:] for m in MUTATIONS), ("objective", "", "")],
    ids=[*(m[0] for m in MUTATIONS), "unchanged"],
)
def test_mutation_is_noticed(file: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "objectives"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / f"{file}.py"
    text = path.read_text()
    if not old:  # unchanged source: the harness itself must not make tests fail
        assert failing_tests(monkeypatch, package) == []
        return
    assert text.count(old) == 1, f"{old!r} must stand exactly once in {file}.py: bring this list up to date"
    path.write_text(text.replace(old, new))
    failures = failing_tests(monkeypatch, package)
    print(f"noticed by {len(failures)}: {', '.join(failures)}")
    assert failures
