"""A tiny vision-language policy from scratch for drawn geometry: a Qwen2.5-VL that reads diagrams and often errs.

Like the Countdown policy it is an ordinary transformers folder, with a processor as well as the tokenizer.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from popo_lightning.core.errors import SettingError
from popo_lightning.core.warm_start import WarmStart
from popo_lightning.toys import formulas
from popo_lightning.toys.countdown import Step, write_steps
from popo_lightning.toys.countdown_policy import (
    IGNORED,
    answer_loss,
    save_model,
    symbol_tokenizer,
    train_supervised,
)
from popo_lightning.toys.diagrams import TOKEN_SIDE
from popo_lightning.toys.drawn_geometry import EASY_KINDS, KINDS, DrawnGeometry, Numbers
from popo_lightning.toys.formulas import Formula
from popo_lightning.toys.glyph_reader import Glyph, GlyphReader
from popo_lightning.toys.warm_start_settings import check_settings

RECIPE = 1  # part of the cache address: raise it when a change to this file or to the diagrams changes the weights
SPECIAL = ["<pad>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SYMBOLS = [*SPECIAL, *"0123456789+-*/=;?:", *sorted(set("xareaperimeter"))]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}:{%- endif -%}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}:{%- endif -%}"
)
IMAGE_PIXELS = (TOKEN_SIDE**2, 64 * TOKEN_SIDE**2)  # images with fewer or more are resized
HEAD = 32  # width of an attention head, which vLLM supports on a CPU

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A diagram, the question about it, and an answer to imitate."""

    question: str
    image: Any
    glyphs: list[Glyph]
    answer: str


# -- wrong answers -----------------------------------------------------------------------------------------------------

# The first entry of a kind is its usual mistake.
MISTAKES: dict[str, list[Formula]] = {
    "straight line": [formulas.complement, formulas.apex, formulas.twice],
    "isosceles triangle": [formulas.supplement, formulas.twice, formulas.complement],
    "third angle": [formulas.total, formulas.without_first, formulas.without_second, formulas.difference],
    "exterior angle": [formulas.third_angle, formulas.without_first, formulas.without_second, formulas.difference],
    "rectangle area": [formulas.around, formulas.total, formulas.half_product, formulas.difference],
    "rectangle perimeter": [formulas.total, formulas.product, formulas.half_product, formulas.difference],
    "triangle area": [formulas.product, formulas.around, formulas.total, formulas.difference],
    "hypotenuse": [formulas.total, formulas.sum_of_squares, formulas.product, formulas.difference],
    "leg": [formulas.difference, formulas.difference_of_squares, formulas.total, formulas.product],
}


def wrong_steps(kind: str, numbers: Numbers, usual: float, draw: random.Random) -> list[Step]:
    """Draws true equations over the numbers of a diagram that do not answer its question.

    Mistakes without whole results for these numbers are left out.
    """
    usual_first = [steps for mistake in MISTAKES[kind] if formulas.whole(steps := mistake(*numbers))]
    if len(usual_first) == 1 or draw.random() < usual:
        return usual_first[0]
    return draw.choice(usual_first[1:])


# -- the policy --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class GeometryWarmStart(WarmStart):
    """A small Qwen2.5-VL that reads the numbers of a diagram and calculates something with them.

    It is trained on true equations over the numbers of training problems. A fraction of them calculates what is asked.
    Reinforcement learning has to teach the rest: which calculation answers which diagram.

    Args:
        right: Fraction of the training examples that calculate what is asked.
        usual_mistake: Fraction of the other examples that make the same mistake for all diagrams of a kind.
        examples: Number of training examples, each newly drawn.
        hidden_size: Width of the language model; a multiple of 32, which is the width of a head.
        layers: Depth of the language model.
        intermediate_size: Width of its feed-forward layers.
        vision_hidden_size: Width of the vision tower; a multiple of 32, which is the width of a head.
        vision_layers: Depth of the vision tower.
        learning_rate: Peak AdamW learning rate, with a warm-up over 5% of the steps and cosine decay to zero.
        batch_size: Examples per step.
        seed: Seed of weights and examples.
        kinds: Same as data.task.kinds of DrawnGeometry.
        held_out_share: Same as data.task.held_out_share; held-out problems are never trained on.
    """

    right: float = 0.25
    usual_mistake: float = 0.5
    examples: int = 45_000
    hidden_size: int = 128
    layers: int = 3
    intermediate_size: int = 320
    vision_hidden_size: int = 64
    vision_layers: int = 2
    learning_rate: float = 2e-3
    batch_size: int = 64
    seed: int = 0
    kinds: Sequence[str] = EASY_KINDS
    held_out_share: float = 0.25

    name = "geometry-qwen2.5-vl"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vision_hidden_size"):
            width = getattr(self, name)
            if width % HEAD or width < HEAD:
                raise SettingError(f"model.warm_start.{name} is {width}; use a multiple of {HEAD}")
        check_settings(vars(self))

    def recipe(self) -> dict[str, object]:
        """Returns the settings and the recipe's number."""
        return {"recipe": RECIPE, **vars(self)}

    def build(self, folder: Path) -> None:
        """Trains on next-token prediction over the answers and saves the folder."""
        from transformers import Qwen2_5_VLForConditionalGeneration

        processor = _processor()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Qwen2_5_VLForConditionalGeneration(self.config()).float()
            self._train(model, processor)
        save_model(model, folder)
        processor.save_pretrained(folder)

    def config(self) -> Any:
        """Returns the Qwen2.5-VL's configuration, without building it."""
        from transformers import Qwen2_5_VLConfig

        place = {symbol: i for i, symbol in enumerate(SYMBOLS)}
        text = {
            "vocab_size": len(SYMBOLS),
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden_size // HEAD,
            "num_key_value_heads": self.hidden_size // HEAD,
            "max_position_embeddings": 256,
            # Half a head's width is divided among time, height and width, as in the real models.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "pad_token_id": place["<pad>"],
            "eos_token_id": place["<eos>"],
            "bos_token_id": None,
            "tie_word_embeddings": True,
        }
        vision = {
            "depth": self.vision_layers,
            "hidden_size": self.vision_hidden_size,
            "intermediate_size": 2 * self.vision_hidden_size,
            "num_heads": self.vision_hidden_size // HEAD,
            "out_hidden_size": self.hidden_size,
            "fullatt_block_indexes": list(range(self.vision_layers)),
        }
        return Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=place["<|image_pad|>"],
            video_token_id=place["<|video_pad|>"],
            vision_start_token_id=place["<|vision_start|>"],
            vision_end_token_id=place["<|vision_end|>"],
            tie_word_embeddings=True,
        )

    def _train(self, model: Any, processor: Any) -> None:
        reader = GlyphReader(self.hidden_size)
        model.model.visual.register_forward_hook(reader.watch)
        parameters = [*model.parameters(), *reader.parameters()]
        examples = self._examples()

        def loss() -> Tensor:
            batch = [next(examples) for _ in range(self.batch_size)]
            inputs, labels = _encode(batch, processor)
            answers = answer_loss(model(**inputs, use_cache=False).logits, labels)
            return answers + reader.loss([example.glyphs for example in batch], inputs["image_grid_thw"])

        steps = self.examples // self.batch_size
        train_supervised(loss, parameters, self.learning_rate, steps, "tiny vision-language policy")

    def _examples(self) -> Iterator[Example]:
        """Yields examples without end."""
        task = DrawnGeometry(self.kinds, held_out_share=self.held_out_share)
        train = [(kind, task.split(kind)[0]) for kind in task.kinds]
        draw = random.Random(f"geometry warm start {self.seed}")
        while True:
            kind, every_numbers = draw.choice(train)
            numbers, asked = draw.choice(every_numbers), KINDS[kind]
            if draw.random() < self.right:
                steps = asked.formula(*numbers)
            else:
                steps = wrong_steps(kind, numbers, self.usual_mistake, draw)
            written = asked.write(numbers)
            glyphs = asked.figure.glyphs(written)
            yield Example(asked.question, asked.figure.draw(written, draw), glyphs, write_steps(steps))


def _encode(examples: Sequence[Example], processor: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Returns (arguments of the model, labels). Labels are the answer and its end token, else IGNORED."""
    texts = [f"<|vision_start|><|image_pad|><|vision_end|>{e.question}:{e.answer}<eos>" for e in examples]
    images = [example.image for example in examples]
    inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for row, example in enumerate(examples):
        end = int(inputs["attention_mask"][row].sum())
        written = slice(end - len(example.answer) - 1, end)
        labels[row, written] = inputs["input_ids"][row, written]
    return inputs, labels


def _processor() -> Any:
    """Makes Qwen2.5-VL's processor, which does not resize small images, with one token per symbol."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = symbol_tokenizer(SYMBOLS, additional_special_tokens=SPECIAL[2:])
    size = dict(zip(("shortest_edge", "longest_edge"), IMAGE_PIXELS, strict=True))  # in pixels, despite the names
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )
