"""Asks a saved policy a question as its run asked, and grades the answers as its run graded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from popo_lightning.cli.export.adapted_policy import policy_model
from popo_lightning.cli.export.base_model import BaseModel, base_model, weights_folder
from popo_lightning.cli.export.built_classes import built
from popo_lightning.cli.export.saved_policy import SavedPolicy
from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import Task
from popo_lightning.core.timing import PhaseClock
from popo_lightning.engines.base import EngineContext, RolloutEngine, Sampling
from popo_lightning.engines.transformers import TransformersEngine
from popo_lightning.engines.vllm.engine import VLLMEngine
from popo_lightning.grading.pool import GradingPool
from popo_lightning.model.loading import image_tokens, sees_images
from popo_lightning.model.prompts import PromptEncoder
from popo_lightning.model.saved_weights import as_saved, saved_buffers
from popo_lightning.rollout.generation import RolloutGenerator

ENGINES = {"transformers": TransformersEngine, "vllm": VLLMEngine}
NEW_TOKENS, PROMPT_TOKENS = 1024, 1024  # data's defaults, for a run with unknown settings


@dataclass(frozen=True)
class Question:
    """A question, and how its answers are sampled.

    Args:
        text: Question, without what the task puts around it.
        images: Paths of images.
        gold: Right answer; None leaves the answers ungraded.
        n: Number of answers.
        temperature: Sampling temperature; 0 is greedy.
        max_new_tokens: Response limit in tokens; None uses the run's.
        seed: Seed of the draws.
    """

    text: str
    images: Sequence[str] = ()
    gold: str | None = None
    n: int = 4
    temperature: float = 1.0
    max_new_tokens: int | None = None
    seed: int = 1


def answers(
    saved: SavedPolicy, question: Question, engine: str = "transformers", base: str | None = None
) -> list[Response]:
    """Samples answers of a saved policy, and grades them if there is a right one.

    Args:
        saved: The policy.
        question: The question.
        engine: Name of the engine, "transformers" or "vllm".
        base: Model that the run began with, if it is no longer where the run found it.

    Raises:
        SettingError: The task cannot ask the question, or the engine cannot sample here.
    """
    if saved.record is None:
        raise SettingError(f"the checkpoint '{saved.checkpoint}' does not say how its run asked; name a run's folder")
    for image in question.images:
        if not Path(image).is_file():
            raise SettingError(f"--image is '{image}', which is no file; name a picture")
    task = built(Task, saved.setting("data.task"), "data.task")  # type: ignore[type-abstract]
    problem = task.ask(question.text, [str(Path(image).absolute()) for image in question.images], question.gold)
    began = base_model(saved, base)
    encoder = PromptEncoder(began.folder, PROMPT_TOKENS, saved.setting("data.image_pixels"))
    limit = question.max_new_tokens or int(saved.setting("data.max_new_tokens", NEW_TOKENS))
    stop = saved.setting("data.stop")
    sampling = Sampling(limit, question.temperature, stop=tuple(task.stop if stop is None else stop))
    sampler = _started(saved, began, encoder, problem, sampling, engine)
    pool = GradingPool(task.verify, 1, float(saved.setting("data.grading_timeout", 5.0)))
    try:
        generator = RolloutGenerator(encoder, sampler, pool, PhaseClock(), 0, 1, torch.float32, None)
        ask = generator.ungraded if question.gold is None else generator.make
        (group,) = ask([problem], question.n if question.temperature else 1, sampling, question.seed)
        return group.responses
    finally:
        pool.close()
        sampler.stop()


def _started(
    saved: SavedPolicy, began: BaseModel, encoder: PromptEncoder, problem: Problem, sampling: Sampling, name: str
) -> RolloutEngine:
    """Starts an engine with the policy's weights, and with room for the prompt and its answers."""
    config = began.config()
    length = _length(encoder, problem)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = length + sampling.max_new_tokens
    if positions and longest > positions:
        raise SettingError(
            f"PROMPT has {length} tokens and --max_new_tokens is {sampling.max_new_tokens}, more than the {positions} "
            "positions of the policy; lower --max_new_tokens, or ask something shorter"
        )
    model = policy_model(saved, began)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "vllm" and find_spec("vllm") is None:
        raise SettingError("--engine is vllm, which is not installed here; leave it out, which is transformers")
    engine = _engine(saved, name)
    engine.check(device)
    context = EngineContext(
        folder=weights_folder(began),
        device=device,
        dtype=model.dtype,
        rank=0,
        world_size=1,
        max_tokens=longest,
        forbidden_token_ids=image_tokens(config) if sees_images(config) else (),
        image_pixels=saved.setting("data.image_pixels"),
        images_per_prompt=len(problem.images),
        as_saved=partial(as_saved, model),
    )
    engine.start(context)
    tied = set(model.all_tied_weights_keys or {})
    weights = [(name, weight.detach()) for name, weight in model.named_parameters() if name not in tied]
    engine.update_weights([*weights, *saved_buffers(model)], saved.iterations)
    return engine


def _length(encoder: PromptEncoder, problem: Problem) -> int:
    try:
        return encoder.length(problem)
    except SettingError:
        raise
    except (OSError, ValueError, SyntaxError) as error:  # from PIL and the processor's resizing
        raise SettingError(f"PROMPT or --image cannot be read: {error}") from error


def _engine(saved: SavedPolicy, name: str) -> RolloutEngine:
    """An engine of the named kind, with the run's settings if the run used the same kind."""
    kind = ENGINES[name]
    own = saved.setting("data.engine", {})
    if str(own.get("class_path", "")).rpartition(".")[2] == kind.__name__:
        return built(RolloutEngine, own, "data.engine")  # type: ignore[type-abstract]
    return kind()
