"""Choices that make no sense together are one sentence and exit code 2; every method's own choices make sense."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_models import method, popo

CRITIC = ["--model.critic", "popo_lightning.model.critic.Critic", "--model.advantage", "GAE"]
LAG = ["--data.engine", "helpers.engines.Apart", "--data.async_level", "1"]
HOOK = "popo_lightning.methods.remix.Reincarnation"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            [*method("ppo_ewma"), "--model.behave_weight.correct_fresh", "false"],
            "is TruncatedIS without correct_fresh",
        ),
        ([*method("ppo_ewma"), "--model.behave_weight", "NoCorrection"], "is NoCorrection without correct_fresh"),
        ([*method("ppo_ewma"), "--proximal.center_of_mass", "-1"], "ProximalAverage.center_of_mass is -1"),
        (["--parameter_hook", HOOK], "parameter_hook is Reincarnation"),
        ([*method("pi_old"), "--data.weight_sync_interval", "4"], "data.weight_sync_interval is 4"),
        ([*method("pi_old"), *LAG], "data.async_level is 1, so responses come from older weights"),
        ([*method("bapo_buffer"), *LAG], "data.async_level is 1 and data.weight_sync_interval 2"),
        ([*method("rapid"), *LAG], "data.composer is RAPID"),
        ([*method("greso"), *LAG], "data.sampler is GRESO"),
        ([*method("popo"), *LAG, "--data.composer.buffer.max_age", "1"], "composer.buffer.max_age is 1"),
        (["--data.async_level", "1"], "data.async_level is 1, but data.engine is TransformersEngine"),
        ([*method("max_at_k"), "--model.advantage.k", "5"], "model.advantage.k is 5, more than the 4"),
        ([*method("ppo"), "--model.advantage", "GroupNormalized"], "model.critic is set but"),
        ([*method("tree_opo"), "--model.reward_key", "acc"], "data.composer.reward_key is 'score'"),
        ([*method("spear"), *CRITIC], "data.composer is SPEAR"),
        ([*method("behave_aligned"), "--model.behave_weight", "TruncatedIS"], "BehaveAligned"),
    ],
)
def test_refused(
    settings: list[str], sentence: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        popo("fit", "--config", config, *settings, "--run.folder", tmp_path / "run")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("popo: ") and sentence in line
    assert not (tmp_path / "run" / "checkpoints").exists()
