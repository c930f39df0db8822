"""Images from problem to gradient: engine and policy use one processor, and groups can be replayed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pictures import Pictures, asked, picture
from helpers.tiny_models import attached, fit, random_model, random_vision_model, weights_of

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.engines.base import EngineContext, RolloutEngine, Sampling
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.methods.popo import PrioritizedGroupReplay
from popo_lightning.model.loading import image_tokens
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.policy import PolicyModule
from popo_lightning.replay.buffer import GroupReplayBuffer

TOLERANCE = 1e-4


PROBLEMS = [
    asked("one", "<image>1+2", picture(84, 56, 1)),
    asked("text", "3*4"),
    asked("two", "1<image>2<image>3", picture(60, 100, 2), picture(28, 28, 3)),  # the first is resized
    asked("large", "<image>5", picture(300, 200, 4)),  # above the processor's limit
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_vision_model(tmp_path_factory.mktemp("vision"))


def policy_of(folder: Path, **settings: Any) -> PolicyModule:
    return attached(PolicyModule(path=str(folder), **settings))


def context(folder: Path, policy: PolicyModule, **settings: Any) -> EngineContext:
    forbidden = policy.forbidden_token_ids
    return EngineContext(
        folder, torch.device("cpu"), torch.float32, 0, 1, 80, forbidden, images_per_prompt=2, **settings
    )


def sample(
    engine: RolloutEngine, encoder: PromptEncoder, problems: Sequence[Problem], n: int = 4, seed: int = 3
) -> list[Group]:
    prompts = [encoder.encode(problem) for problem in problems]
    sampled = engine.generate(prompts, n, Sampling(12), seed)
    return [
        Group(i, problem, prompt.ids, responses, 0, prompt.images)
        for i, (problem, prompt, responses) in enumerate(zip(problems, prompts, sampled, strict=True))
    ]


def gap(policy: PolicyModule, groups: Sequence[Group]) -> float:
    minibatch = Minibatch(groups, 0, 0)
    recorded = [response.behave_logp for response in minibatch.responses]
    return max(float((a - b).abs().max()) for a, b in zip(policy.logprobs(minibatch), recorded, strict=True))


# -- prompts ---------------------------------------------------------------------------------------------------


def test_an_image_takes_a_token_for_each_28_pixels_square(folder: Path) -> None:
    encoder = PromptEncoder(folder, 100)
    mark = encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    prompts = [encoder.encode(problem) for problem in PROBLEMS]
    # 84x56 is 3x2 squares. 60x100 rounds to 56x112, which is 2x4. 300x200 shrinks below 16 squares, to 4x3.
    assert [int((prompt.ids == mark).sum()) for prompt in prompts] == [6, 0, 8 + 1, 12]
    assert [list(prompt.unexpanded_ids).count(mark) for prompt in prompts] == [1, 0, 2, 1]
    assert [len(prompt.ids) for prompt in prompts] == [encoder.length(problem) for problem in PROBLEMS]
    assert prompts[2].images["image_grid_thw"].tolist() == [[1, 8, 4], [1, 2, 2]]
    assert len(prompts[2].images["pixel_values"]) == 8 * 4 + 2 * 2
    assert prompts[1].images == {}
    texts = [encoder.tokenizer.decode(prompt.unexpanded_ids or prompt.ids) for prompt in prompts]
    assert texts[2] == "1<|vision_start|><|image_pad|><|vision_end|>2<|vision_start|><|image_pad|><|vision_end|>3:"
    assert texts[1] == "3*4:"


def test_a_begun_response_is_continued(folder: Path) -> None:
    begun = Problem("begun", [*PROBLEMS[1].prompt, {"role": "assistant", "content": "(2"}], None)  # type: ignore[misc]
    encoder = PromptEncoder(folder, 100)
    assert encoder.tokenizer.decode(encoder.encode(begun).ids) == "3*4(2"
    assert begun.response_prefix == "(2" and PROBLEMS[1].response_prefix == "" == Problem("", "x", None).response_prefix


def test_images_that_do_not_decode_are_left_out_and_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = picture(84, 84, 1)
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "whole.png").write_bytes(whole)
    bad = {
        "cut": str(tmp_path / "cut.png"),
        "missing": str(tmp_path / "missing.png"),
        "text": b"no image at all",
        "thin": picture(2000, 4),  # Qwen refuses ratios above 200
    }
    problems = [asked(name, "<image>", image) for name, image in bad.items()]
    good = asked("good", "<image>", str(tmp_path / "whole.png"))
    assert PromptEncoder(folder, 100).fitting([*problems, good]) == [good]
    assert all(f"'{name}'" in caplog.text for name in bad)
    caplog.clear()
    assert PromptEncoder(folder, 11).fitting([good]) == []
    assert "1 of 1 prompts are longer" in caplog.text


def test_text_with_image_tokens_of_its_own_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A data file may contain such tokens, for which there are no features."""
    own = "<|image_pad|>"
    problems = [asked("own text", f"1{own}2"), asked("own image", f"<image>{own}", picture(28, 28)), PROBLEMS[1]]
    assert PromptEncoder(folder, 100).fitting(problems) == [PROBLEMS[1]]
    assert "'own text'" in caplog.text and "'own image'" in caplog.text


def with_system(text: str) -> Problem:
    return Problem("told", [{"role": "system", "content": text}, {"role": "user", "content": "1+1"}], None)


def test_a_system_message_that_the_template_leaves_out_is_spoken_of_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user_only = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    for template, texts, said in (
        (user_only, ["Be brief."], 1),
        (user_only, ["  "], 0),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", [" Be brief. "], 0),
    ):
        encoder = PromptEncoder(folder, 100)
        encoder.tokenizer.chat_template = template
        for text in [*texts, *texts]:
            encoder.fitting([PROBLEMS[1], with_system(text)])
        assert caplog.text.count("leaves out the system message ('Be brief.')") == said
        caplog.clear()


def test_a_template_that_refuses_is_one_sentence(folder: Path) -> None:
    encoder = PromptEncoder(folder, 100)
    encoder.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(SettingError, match=r"chat template .*System role not supported.* data\.task\.system"):
        encoder.fitting([with_system("Be brief.")])
    with pytest.raises(SettingError, match=r"chat template .*use another model, or ask in plain text"):
        encoder.fitting(PROBLEMS[:2])
    encoder.tokenizer.chat_template = "{{ messages[0].content }}"  # drops the beginning of the response
    begun = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "<think>"}]
    with pytest.raises(SettingError, match=r"data\.task\.response_prefix"):
        encoder.fitting([Problem("begun", begun, None)])


def test_images_need_a_model_that_sees_and_a_template(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="has images but"):
        encoder = PromptEncoder(random_model("qwen2", tmp_path / "text"), 100)
        encoder.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        encoder.encode(PROBLEMS[0])
    with pytest.raises(SettingError, match="images and a plain prompt"):
        PromptEncoder(folder, 100).encode(Problem("plain", "<image>1", None, images=(picture(28, 28),)))
    with pytest.raises(SettingError, match=r"model\.freeze_vision"):
        policy_of(tmp_path / "text", freeze_vision=True)


# -- engines and policy ----------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[lambda: TransformersEngine(5), pytest.param(VLLMEngine, marks=pytest.mark.vllm)],
    ids=["transformers", "vllm"],
)
def pair(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[RolloutEngine, PolicyModule, PromptEncoder]]:
    policy = policy_of(folder)
    engine = request.param()
    pixels = (28 * 28, 28 * 28 * 6)
    engine.start(context(folder, policy, image_pixels=pixels))
    yield engine, policy, PromptEncoder(folder, 100, pixels)
    engine.stop()


def test_log_probs_agree_before_and_after_a_sync(pair: tuple[RolloutEngine, PolicyModule, PromptEncoder]) -> None:
    engine, policy, encoder = pair
    assert gap(policy, sample(engine, encoder, PROBLEMS)) < TOLERANCE
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += (
                0.1 * parameter.std().nan_to_num(0.0).clamp(0.05) * torch.randn(parameter.shape, generator=generator)
            )
    stale = sample(engine, encoder, PROBLEMS)
    assert gap(policy, stale) > 100 * TOLERANCE  # otherwise the next lines would test nothing
    engine.update_weights(policy.named_weights(), 1)
    groups = sample(engine, encoder, PROBLEMS)  # images that the engine has seen before
    assert gap(policy, groups) < TOLERANCE
    assert [len(group.images.get("pixel_values", ())) // 4 for group in groups] == [6, 0, 3 + 1, 6]  # the limits


def test_the_image_decides(pair: tuple[RolloutEngine, PolicyModule, PromptEncoder]) -> None:
    engine, policy, encoder = pair
    (group,) = sample(engine, encoder, PROBLEMS[:1])
    other = encoder.encode(asked("other", "<image>1+2", picture(84, 56, 9)))
    swapped = Group(0, group.problem, group.prompt_ids, group.responses, 0, other.images)
    assert gap(policy, [swapped]) > 100 * TOLERANCE


def test_image_tokens_are_never_sampled(pair: tuple[RolloutEngine, PolicyModule, PromptEncoder]) -> None:
    engine, policy, encoder = pair
    forbidden = image_tokens(policy.model.config)
    assert len(forbidden) == 4
    before = copy.deepcopy(policy.model.state_dict())
    with torch.no_grad():  # every hidden state favours some image token
        weight = policy.model.get_output_embeddings().weight
        weight[forbidden] = 30 * torch.randn(
            len(forbidden), weight.shape[1], generator=torch.Generator().manual_seed(2)
        )
    engine.update_weights(policy.named_weights(), 2)
    groups = sample(engine, encoder, PROBLEMS, n=16)
    tokens = {int(token) for group in groups for r in group.responses for token in r.token_ids}
    assert not tokens & set(forbidden) and len(tokens) > 5
    assert gap(policy, groups) < TOLERANCE  # the policy's distribution omits them too
    policy.model.load_state_dict(before)
    engine.update_weights(policy.named_weights(), 3)


@pytest.mark.slow
@pytest.mark.vllm
def test_processors_that_differ_are_noticed(folder: Path) -> None:
    class Small(VLLMEngine):
        def start(self, context: EngineContext) -> None:
            super().start(EngineContext(**vars(context) | {"image_pixels": (28 * 28, 28 * 28 * 2)}))

    engine, policy = Small(), policy_of(folder)
    engine.start(context(folder, policy))
    with pytest.raises(RuntimeError, match="their processors differ"):
        sample(engine, PromptEncoder(folder, 100), PROBLEMS[:1])
    engine.stop()


# -- training --------------------------------------------------------------------------------------------------


def run(folder: Path, to: Path, **settings: Any) -> Any:
    data = {"problems_per_iteration": 6, "max_new_tokens": 8, "task": Pictures()} | settings
    composer = PrioritizedGroupReplay(GroupReplayBuffer(32))
    return fit(folder, to, composer=composer, max_prompt_tokens=40, **data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [TransformersEngine(), pytest.param(VLLMEngine(), marks=pytest.mark.vllm)], ids=["transformers", "vllm"]
)
def test_popo_trains_on_images_and_replays_them(folder: Path, tmp_path: Path, engine: RolloutEngine) -> None:
    found = run(folder, tmp_path, engine=engine, group_size=2, lr=1e-3)
    engine.stop()
    assert sum(row["replay/groups"] for row in found.rows) > 0
    assert max(row["engine/logp_gap_max"] for row in found.rows) < TOLERANCE
    before, after = weights_of(policy_of(folder)), found.weights
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert any("visual" in name for name in moved) and any("language_model" in name for name in moved)


def test_a_checkpoint_knows_what_was_frozen(folder: Path) -> None:
    checkpoint: dict[str, Any] = {}
    frozen, whole = policy_of(folder, freeze_vision=True), policy_of(folder)
    frozen.on_save_checkpoint(checkpoint)
    for module in (frozen, whole):
        module.trainer.state.fn = "fit"  # type: ignore[assignment]
    frozen.on_load_checkpoint(checkpoint)
    with pytest.raises(SettingError, match=r"model\.freeze_vision is false, but the checkpoint's optimizer has fewer"):
        whole.on_load_checkpoint(checkpoint)


def test_a_frozen_tower_stays_as_it_was(folder: Path, tmp_path: Path) -> None:
    found = run(folder, tmp_path, iterations=1, model={"freeze_vision": True})
    before = weights_of(policy_of(folder))
    moved = {name for name, weight in found.weights.items() if not torch.equal(weight, before[name])}
    assert moved and not any("visual" in name for name in moved)


def test_a_minibatch_may_mix_images_and_text(folder: Path) -> None:
    policy = policy_of(folder)
    encoder = PromptEncoder(folder, 100)
    response = Response(torch.tensor([5, 6, 1]), torch.zeros(3), "stop")
    groups = []
    for i, problem in enumerate(PROBLEMS):
        prompt = encoder.encode(problem)
        groups.append(Group(i, problem, prompt.ids, [response], 0, prompt.images))
    alone = [policy.logprobs(Minibatch([group], 0, 0))[0] for group in groups]
    together = policy.logprobs(Minibatch(groups, 0, 0))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
