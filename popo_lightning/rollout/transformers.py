"""Plain transformers generation: slower than vLLM, needs nothing else, and is the reference to check it against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from popo_lightning.groups import Response
from popo_lightning.model_folder import image_marks, load_model
from popo_lightning.prompts import Prompt
from popo_lightning.rollout.engine import (
    EngineContext,
    NamedTensors,
    RolloutEngine,
    Sampling,
    end_token_ids,
    responses_of,
    seeded,
)


class TransformersEngine(RolloutEngine):
    """Samples with a second copy of the model and its key-value cache.

    Args:
        batch_size: Responses generated side by side.
    """

    def __init__(self, batch_size: int = 512) -> None:
        self.batch_size = batch_size

    def start(self, context: EngineContext) -> None:
        """Loads the model and its tokenizer."""
        from transformers import AutoTokenizer

        self._context = context
        self._model = load_model(context.folder, context.dtype).to(context.device).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(context.folder)
        ends = end_token_ids(context.folder) or [self._tokenizer.eos_token_id]
        self._ends = torch.tensor(ends, device=context.device)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        """See :class:`RolloutEngine`."""
        flat = [prompt for prompt in prompts for _ in range(n)]
        responses: list[Response] = []
        with seeded(seed, self._context.device):
            for start in range(0, len(flat), self.batch_size):
                responses += self._generate_batch(flat[start : start + self.batch_size], sampling)
        return [responses[i * n : (i + 1) * n] for i in range(len(prompts))]

    def _generate_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Response]:
        device = self._context.device
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):  # left-padded: every row ends where its response begins
            ids[row, longest - len(prompt.ids) :] = prompt.ids
            mask[row, longest - len(prompt.ids) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        images = self._images(prompts, ids)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if images:  # (3, R, L): time, height and width
            positions, _ = self._model.base_model.get_rope_index(
                ids, attention_mask=mask, **{n: t for n, t in images.items() if n != "pixel_values"}
            )
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        limits = torch.tensor([sampling.max_new_tokens - prompt.begun for prompt in prompts])
        cache, tokens, logps = None, [], []
        for _ in range(int(limits.max())):
            out = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **images,
            )
            cache, images = out.past_key_values, {}
            token, logp = self._draw(out.logits[:, -1].float(), sampling)
            tokens.append(token)
            logps.append(logp)
            done = done | torch.isin(token, self._ends)
            if bool(done.all()):
                break
            ids = token[:, None]
            mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
            positions = positions[..., -1:] + 1
        return self._collect(torch.stack(tokens, 1).cpu(), torch.stack(logps, 1).cpu(), limits)

    def _images(self, prompts: Sequence[Prompt], ids: Tensor) -> dict[str, Tensor]:
        """What the model's forward reads besides tokens; empty for text."""
        found = [prompt.images for prompt in prompts if prompt.images]
        if not found:
            return {}
        images = {name: torch.cat([one[name] for one in found]).to(ids.device) for name in found[0]}
        return images | {"mm_token_type_ids": image_marks(self._model.config, ids)}

    def _draw(self, logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """(token, its log-prob) of each row."""
        if self._context.forbidden_token_ids:
            logits[:, list(self._context.forbidden_token_ids)] = -torch.inf
        if sampling.temperature == 0:
            logp = logits.log_softmax(-1)
            token = logp.argmax(-1)
        else:
            logp = _cut_tail(logits / sampling.temperature, sampling).log_softmax(-1)
            token = torch.multinomial(logp.exp(), 1).squeeze(-1)
        return token, logp.gather(-1, token[:, None]).squeeze(-1)

    def _collect(self, tokens: Tensor, logps: Tensor, limits: Tensor) -> list[Response]:
        """Each row up to and including its first end token, and no longer than its limit."""
        is_end = torch.isin(tokens, self._ends.cpu()) & (torch.arange(tokens.shape[1]) < limits[:, None])
        lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, limits.clamp(max=tokens.shape[1]))
        reasons = ["stop" if ended else "length" for ended in is_end.any(1).tolist()]
        rows = zip(tokens.tolist(), logps.tolist(), lengths.tolist(), reasons, strict=True)
        return responses_of(self._tokenizer, [(ids[:n], logp[:n], reason) for ids, logp, n, reason in rows])

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """Copies every named tensor over the model's own."""
        own = self._model.state_dict()
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)
        self.version = version

    def stop(self) -> None:
        """Drops the model."""
        if hasattr(self, "_model"):
            del self._model


def _cut_tail(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits with the tokens outside top_k and top_p at -inf."""
    if sampling.top_k:
        smallest = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass ahead of each token
        outside = before >= sampling.top_p
        logits = logits.masked_fill(outside.scatter(-1, places, outside), -torch.inf)
    return logits
