"""Choices that contradict each other give one sentence and exit code 2. Every method's own choices are accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_models import method, popo

CRITIC = ["--model.critic", "popo_lightning.model.critic.Critic", "--model.advantage", "GAE"]
LAG = ["--data.engine", "helpers.engines.Apart", "--data.async_level", "1"]
OFF_POLICY = ["--model.advantage.off_policy", "true", "--model.behave_weight", "NoCorrection"]
COPIES = ["--model.critic.target", "{every: 2, polyak: 1.0}", "--data.minibatches", "2", "--data.ppo_epochs", "3"]
OVERLONG = ["--data.overlong", "{buffer_tokens: 4}"]
MAX_AT_K = ["--model.advantage", "MaxAtK", "--model.advantage.k", "2", "--model.advantage.off_policy", "true"]
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
        (
            [*method("max_at_k"), "--model.advantage.k", "5", "--model.advantage.baseline", "none"],
            "model.advantage.k is 5, more than the 4",
        ),
        (
            [*method("max_at_k"), "--model.advantage.k", "4", "--model.advantage.baseline", "centered"],
            "model.advantage.k is 4 with baseline centered, which needs 5, more than the 4",
        ),
        ([*method("ppo"), "--model.advantage", "GroupNormalized"], "model.critic is set but"),
        ([*method("tree_opo"), "--model.reward_key", "acc"], "data.composer.reward_key is 'score'"),
        ([*method("greso"), "--model.reward_key", "acc"], "data.sampler.reward_key is 'score'"),
        ([*method("greso"), "--data.effective_key", "acc"], "data.sampler.reward_key is 'score'"),
        ([*method("dapo"), "--model.reward_key", "acc", *OVERLONG], "data.overlong is set"),
        ([*method("grpo_spread"), "--data.limits.kl", "0.02"], "data.temperature_spread is 0."),
        ([*method("spear"), *CRITIC], "data.composer is SPEAR"),
        (
            [*method("spear"), *MAX_AT_K, "--model.trust_region", "PPOClip", "--data.weight_sync_interval", "2"],
            "data.weight_sync_interval is 2, so responses come from older weights",
        ),
        (
            [*method("grpo"), "--data.temperature_spread", "0.2"],
            "data.temperature_spread is 0.2, so fresh rows are sampled at temperatures other than prox's",
        ),
        (
            [*method("rapid"), "--data.temperature_spread", "0.2"],
            "model.behave_weight is NoCorrection without correct_fresh",
        ),
        ([*method("grpo_spread"), "--proximal.recompute_fresh", "false"], "proximal is ProximalSnapshot, which takes"),
        ([*method("grpo_spread"), "--data.temperature_spread", "1"], "data.temperature_spread is 1.0; use 0 for none"),
        ([*method("grpo_spread"), "--data.temperature_spread", "-0.1"], "data.temperature_spread is -0.1; use 0"),
        (["--data.behave", "trainer", "--data.weight_sync_interval", "4"], "data.behave is trainer, the policy's own"),
        (
            [*method("grpo_spread"), "--data.behave", "trainer", "--data.temperature_spread", "0"],
            "data.behave is trainer, so that prox and behave of fresh rows are the same, but",
        ),
        ([*method("spear"), "--data.limits.length", "5"], "data.composer is SPEAR, which fixes the advantages"),
        ([*method("max_at_k"), *OFF_POLICY, "--data.limits.length", "5"], "with off_policy, whose advantages hold"),
        (["--data.limits.score", "0.5"], "the cost of data.limits.score is 'score', the component that is trained on"),
        (["--data.limits.length", "-1"], "data.limits.length.bound is -1"),
        (["--data.limits.length", "10"], "data.limits.length.bound is 10, which no response exceeds"),
        (["--data.limits", "{length: {bound: 5, lr: -1}}"], "data.limits.length.lr is -1"),
        (["--data.limits.length.bound", "5"], "give its settings together"),
        ([*method("behave_aligned"), "--model.behave_weight", "TruncatedIS"], "BehaveAligned"),
        ([*method("ppo_target"), "--model.advantage.lam", "1"], "a target critic has no effect at lam 1"),
        ([*method("ppo_target"), *COPIES], "so that its copy is the critic whenever values are read"),
        ([*method("ppo_categorical"), "--model.critic.value_clip", "0.5"], "model.critic.value_clip is 0.5, but"),
        ([*method("ppo_categorical"), *OVERLONG], "with low 0, but the penalty of data.overlong takes 'score' down to"),
        (
            [*method("ppo_gaussian"), "--model.advantage.whiten", "true"],
            "sigma_floor is 0.05 and model.advantage.whiten",
        ),
        ([*method("popo"), "--data.composer.fresh_continuations", "0.05"], "but model.critic is null, which alone"),
        ([*method("popo_mad_td"), *LAG], "data.composer is PrioritizedGroupReplay, which counts on responses"),
        (
            [*method("opa_dpo"), "--data.composer", "OnPolicy"],
            "model.trust_region is OPADPO, which compares pairs, but",
        ),
        ([*method("grpo"), "--data.composer", "Pairs"], "data.composer is Pairs, which makes pairs of responses, but"),
        (
            [*method("sera"), "--monitor.estimate_buffer", "true"],
            "monitor.estimate_buffer is true, but data.composer is",
        ),
        (
            [*method("popo"), "--monitor.estimate_buffer", "true", "--data.weight_sync_interval", "2"],
            "monitor.estimate_buffer is true, but data.weight_sync_interval is 2",
        ),
        (
            [*method("sera"), "--data.composer.bootstrap", "0.5", "--model.trust_region.opa", "0.1"],
            "data.composer.bootstrap is 0.5, which makes pairs without a verifier",
        ),
        ([*method("sera"), "--data.limits.length", "5"], "data.composer is SeRA, which fixes the advantages"),
        ([*method("sera"), *CRITIC], "data.composer is SeRA, which fixes the advantages"),
        (
            [*method("online_dpo"), "--model.aggregation", "TokenMean"],
            "model.aggregation is TokenMean, but PairLoss sums",
        ),
        (
            [*method("online_dpo"), "--model.behave_weight", "TruncatedIS"],
            "PairLoss compares responses whoever sampled",
        ),
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
