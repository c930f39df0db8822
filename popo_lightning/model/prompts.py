"""Converts problems to prompt tokens and image tensors, once, for both engine and policy."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from popo_lightning.core.errors import SettingError, reason
from popo_lightning.core.problems import IMAGE_MARK, Problem
from popo_lightning.model.files import check_model_files
from popo_lightning.model.loading import config_of, sees_images

THINK_TAG = "<think>"

SHOWN = 5  # maximum number of warnings about unreadable problems
SHOWN_CHARACTERS = 80

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt as engine and policy read it.

    Args:
        ids: (P,) tokens as the policy reads them: an image takes as many as it has features.
        images: The vision tower's inputs, by the argument names of the model's forward; empty for text.
        unexpanded_ids: The same tokens, but with one token per image, which vLLM expands by itself. Empty for text.
        pil_images: The images before the processor, for vLLM.
        prefix_len: Number of last tokens of ids that begin the response, and count towards its limit.
        opened: Text of the response that the end of the prompt contains, such as "<think>" and a new line, for
            verifiers.
    """

    ids: Tensor
    images: dict[str, Tensor] = field(default_factory=dict)
    unexpanded_ids: Sequence[int] = ()
    pil_images: Sequence[Any] = ()
    prefix_len: int = 0
    opened: str = ""


class PromptEncoder:
    """The tokenizer of a model folder, and its processor if there are images.

    Args:
        folder: Model folder or hub id.
        max_tokens: Maximum prompt length, images included.
        image_pixels: Minimum and maximum pixels of an image, which is resized to fit; None keeps the processor's own.

    Raises:
        SettingError: The folder has no tokenizer, or one without an end token.
    """

    def __init__(self, folder: str | Path, max_tokens: int, image_pixels: tuple[int, int] | None = None) -> None:
        from transformers import AutoTokenizer

        check_model_files(folder)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # a damaged file may raise anything
            raise SettingError(f"model.path is '{folder}', from which no tokenizer loads: {reason(error)}") from error
        if self.tokenizer.eos_token_id is None:
            raise SettingError(
                f"the tokenizer of model.path '{folder}' has no eos token, so a response could never end; set "
                "eos_token in its tokenizer_config.json"
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # any token will do, because nothing reads padding
        self.folder = folder
        self.max_tokens = max_tokens
        self.image_pixels = image_pixels
        self._image_tokens = _image_tokens(folder)
        self._encoded: dict[str, Prompt] = {}
        self._system_checked = False

    @cached_property
    def processor(self) -> Any:
        """The processor of a vision-language model, with the pixel limits of this run."""
        from transformers import AutoProcessor

        try:
            processor: Any = AutoProcessor.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise SettingError(
                f"model.path is '{self.folder}', from which no image processor loads: {reason(error)}"
            ) from error
        if getattr(processor, "image_processor", None) is None:
            raise SettingError(
                f"data.task has images but model.path '{self.folder}' is a text model; use a vision-language model "
                "such as Qwen/Qwen2.5-VL-3B-Instruct"
            )
        if self.image_pixels is not None:
            least, most = self.image_pixels
            processor.image_processor.size = {"shortest_edge": least, "longest_edge": most}
        return processor

    # -- one problem -------------------------------------------------------------------------------------------

    def encode(self, problem: Problem) -> Prompt:
        """Encodes one problem. Text prompts are cached; images are not, because they would fill the memory."""
        if problem.images:
            return self._with_images(problem)
        if problem.id not in self._encoded:
            if isinstance(problem.prompt, str):
                text = problem.prompt
                ids = self.tokenizer(text)["input_ids"]
            else:
                text = self._chat(problem.prompt)
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise SettingError(f"problem '{problem.id}' of data.task has an empty prompt; leave it out")
            self._encoded[problem.id] = Prompt(torch.tensor(ids, dtype=torch.long), opened=_opened(problem, text))
        return self._encoded[problem.id]

    def _with_images(self, problem: Problem) -> Prompt:
        text = self._image_text(problem)
        pil_images = [open_image(image) for image in problem.images]
        encoded = self.processor(text=[text], images=pil_images, return_tensors="pt", return_mm_token_type_ids=False)
        unexpanded = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        images = {name: encoded[name] for name in self.processor.image_processor.model_input_names}
        return Prompt(encoded["input_ids"][0], images, unexpanded, pil_images, opened=_opened(problem, text))

    def _image_text(self, problem: Problem) -> str:
        if isinstance(problem.prompt, str):
            raise SettingError(
                f"problem '{problem.id}' of data.task has images and a plain prompt; ask in chat messages, whose "
                "template says where an image goes"
            )
        return self._chat([_parts(message) for message in problem.prompt])

    def _chat(self, messages: list[dict[str, Any]]) -> str:
        if self.tokenizer.chat_template is None:
            raise SettingError(
                f"the tokenizer of model.path '{self.folder}' has no chat template but the task asks in messages; "
                "use an instruct model, or set data.task.chat to false, which DatasetTask and ReasoningGymTask have"
            )
        begun = messages[-1]["role"] == "assistant"
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
            )
        except (ValueError, TemplateError) as error:
            raise SettingError(
                f"the chat template of model.path '{self.folder}' refuses what the task asks ({reason(error)}); "
                f"{_remedy(messages)}"
            ) from error
        return text

    # -- many --------------------------------------------------------------------------------------------------

    def fitting(self, problems: Sequence[Problem]) -> list[Problem]:
        """Returns the problems with short enough prompts and readable images. The others are counted, never cut."""
        kept, unreadable = [], []
        for problem in problems:
            try:
                length = self.length(problem)
            except (OSError, ValueError, SyntaxError) as error:  # what PIL and the processor's resizing raise
                if isinstance(error, SettingError):
                    raise
                unreadable.append(f"problem '{problem.id}': {reason(error)}")
                continue
            if length <= self.max_tokens:
                kept.append(problem)
        for sentence in unreadable[:SHOWN]:
            log.warning("left out, because it cannot be read: %s", sentence)
        if len(unreadable) > SHOWN:
            log.warning("and %d more that cannot be read", len(unreadable) - SHOWN)
        if too_long := len(problems) - len(kept) - len(unreadable):
            log.warning(
                "%d of %d prompts are longer than data.max_prompt_tokens (%d) and left out",
                too_long,
                len(problems),
                self.max_tokens,
            )
        self._warn_of_a_lost_system_message(kept)
        return kept

    def _warn_of_a_lost_system_message(self, problems: Sequence[Problem]) -> None:
        """Warns once if the chat template silently leaves out the system message, as some do."""
        asked = next((problem for problem in problems if _system(problem).strip()), None)
        if asked is None or self._system_checked:
            return
        self._system_checked = True
        text = self._image_text(asked) if asked.images else self._chat(list(asked.prompt))  # type: ignore[arg-type]
        if _system(asked).strip() not in text:
            log.warning(
                "the chat template of model.path '%s' leaves out the system message ('%s'), so the policy never reads "
                "it; write it into the question (data.task.template), or set data.task.system to null",
                self.folder,
                _system(asked)[:SHOWN_CHARACTERS],
            )

    def length(self, problem: Problem) -> int:
        """Returns the number of prompt tokens. Images are decoded, so that none fails later, but not processed."""
        if not problem.images:
            ids = self.encode(problem).ids
            self._check_image_tokens(ids.tolist(), 0)
            return len(ids)
        ids = self.tokenizer(self._image_text(problem), add_special_tokens=False)["input_ids"]
        self._check_image_tokens(ids, len(problem.images))
        images = self.processor.image_processor
        patches = 0
        for image in problem.images:
            width, height = open_image(image).size
            patches += images.get_number_of_image_patches(height, width) // images.merge_size**2
        return len(ids) - len(problem.images) + patches

    def _check_image_tokens(self, ids: Sequence[int], images: int) -> None:
        """Raises ValueError if a problem's text contains image tokens itself, which have no features."""
        if self._image_tokens and sum(token in self._image_tokens for token in ids) != images:
            raise ValueError("its text contains the model's own image tokens")


def _system(problem: Problem) -> str:
    """Returns the system message of a problem that is asked in messages, or an empty string."""
    if isinstance(problem.prompt, str) or problem.prompt[0]["role"] != "system":
        return ""
    content = problem.prompt[0]["content"]
    return content if isinstance(content, str) else ""


def _remedy(messages: Sequence[dict[str, Any]]) -> str:
    """Names the settings behind those messages of a problem that not all templates take."""
    settings = {"data.task.system": messages[0]["role"] == "system"}
    settings |= {"data.task.response_prefix": messages[-1]["role"] == "assistant"}
    there = [setting for setting, is_there in settings.items() if is_there]
    if not there:
        return "use another model, or ask in plain text (data.task.chat false)"
    return f"leave out {' or '.join(there)}, or what the rows have of it, which not all templates take"


def _opened(problem: Problem, text: str) -> str:
    """Returns the opening think tag and the space after it, if a chat template or plain prompt ends with them."""
    if problem.response_prefix:
        return ""
    bare = text.rstrip()
    return THINK_TAG + text[len(bare) :] if bare.endswith(THINK_TAG) else ""


def _image_tokens(folder: str | Path) -> list[int]:
    """Returns the tokens that stand for images or videos in a model's prompts; none for a text model."""
    config = config_of(folder)
    tokens = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    return [token for token in tokens if isinstance(token, int)] if sees_images(config) else []


def open_image(image: str | bytes) -> Any:
    """Opens an image in RGB from a path or from encoded bytes. Raises PIL's errors for an unreadable image."""
    from PIL import Image

    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
        return picture.convert("RGB")


def _parts(message: dict[str, Any]) -> dict[str, Any]:
    """Splits a message's text at image marks, as chat templates of vision-language models expect it."""
    if not isinstance(message["content"], str) or IMAGE_MARK not in message["content"]:
        return message
    parts: list[dict[str, str]] = []
    for place, text in enumerate(message["content"].split(IMAGE_MARK)):
        parts += [{"type": "image"}] * (place > 0)
        parts += [{"type": "text", "text": text}] * bool(text)
    return {**message, "content": parts}
