"""Decodes rows of responses step by step: finished rows leave the batch and waiting rows replace them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from popo_lightning.core.errors import DIVERGED_REMEDY, NotFiniteError
from popo_lightning.engines.base import Sampling
from popo_lightning.engines.row_cache import RowCache
from popo_lightning.engines.sampling import draw, uniforms
from popo_lightning.engines.step_attention import step_mask, takes_whole_masks
from popo_lightning.engines.stop_strings import StopStrings
from popo_lightning.model.loading import mm_token_type_ids
from popo_lightning.model.prompts import Prompt

PREFILL_TOKENS = 2**16  # prompt tokens in one forward pass, padding included
FINISHED_SHARE = 0.0625  # fraction of the rows at which removing them pays
UNUSED_SHARE = 0.25  # fraction of the columns at which shifting the others to the left pays
STEPS_UNREAD = 4  # on CUDA, steps between checks for finished rows; a check waits for the device


@dataclass(frozen=True)
class Row:
    """One response to generate.

    Args:
        place: Index of its prompt in the call.
        seed: Seed of its draws.
        limit: Maximum number of tokens.
    """

    place: int
    seed: int
    limit: int


@dataclass(frozen=True)
class Finished:
    """One response as sampled: its row, token ids, their log-probs, and "stop" or "length"."""

    row: Row
    token_ids: list[int]
    logps: list[float]
    reason: str


@dataclass
class Flight:
    """State of R rows in progress, on the model's device. Each row has `count` tokens so far.

    Args:
        number: (R,) indices in the list of rows.
        first: (R,) position of the first response token.
        length: (R,) columns of the cache that the row fills; each step adds one to every row.
        limit: (R,) maximum number of tokens.
        count: (R,) tokens drawn.
        last: (R,) newest token.
        done: (R,) whether the row has ended; it stays in the batch until it is removed.
        temperature: (R,) float32 temperature of each row; 0 if all have the call's.
        uniform: (R, C + 1) numbers in [0, 1) for the row's draws. The last column is for rows that are done.
        token_ids: (R, C + 1) tokens drawn.
        logps: (R, C + 1) their log-probs.
    """

    number: Tensor
    first: Tensor
    length: Tensor
    limit: Tensor
    count: Tensor
    last: Tensor
    done: Tensor
    temperature: Tensor
    uniform: Tensor
    token_ids: Tensor
    logps: Tensor

    def taken(self, rows: Tensor) -> Flight:
        """Selects rows."""
        return Flight(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.number)


def joined(flights: Sequence[Flight]) -> Flight:
    """Joins the rows of several flights."""
    return Flight(*(torch.cat([getattr(each, field.name) for each in flights]) for field in fields(Flight)))


@dataclass(eq=False)
class Decoder:
    """Samples the rows of one call.

    Args:
        model: A causal language model in eval mode.
        prompts: Prompts of the call.
        sampling: How to draw tokens.
        ends: (E,) tokens that end a response.
        forbidden: (F,) tokens that are never drawn.
        batch_size: Maximum number of rows in the batch.
        stop: Strings that end a row; the caller cuts off the tokens after them.
    """

    model: Any
    prompts: Sequence[Prompt]
    sampling: Sampling
    ends: Tensor
    forbidden: Tensor
    batch_size: int
    stop: StopStrings | None = None

    def __post_init__(self) -> None:
        self.device = self.ends.device
        self.whole_masks = takes_whole_masks(self.model)
        self.steps_unread = STEPS_UNREAD if self.device.type == "cuda" else 1

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> Iterator[list[Finished]]:
        """Yields rows as they finish, in any order. Rows of the same prompt should be adjacent."""
        # longest prompts first, so that later rows are no wider than the present ones
        self.rows = sorted(rows, key=lambda row: -len(self.prompts[row.place].ids))
        self.cache = RowCache(min(self.batch_size, len(self.rows)))
        waiting = deque(range(len(self.rows)))
        flights = [self._begin(chunk) for chunk in self._next_chunks(waiting, self.batch_size)]
        while flights:
            flight = joined(flights)
            finished = self._advance(flight)
            yield self._collect(flight.taken(finished))
            flight = self._without_finished(flight)
            flights = [flight] if len(flight) else []
            free = self.batch_size - len(flight)
            flights += [self._begin(chunk) for chunk in self._next_chunks(waiting, free)]

    def _advance(self, flight: Flight) -> Tensor:
        """Steps until enough rows are done to remove them, and returns their indices."""
        lengths, columns = flight.length.tolist(), self.cache.get_seq_length()
        padding = columns - flight.length if min(lengths) < columns else None
        enough = max(1, FINISHED_SHARE * len(flight))
        while len(finished := flight.done.nonzero()[:, 0]) < enough:
            for _ in range(self.steps_unread):
                self._step(flight, padding)
            if self.stop:
                self._end_at_strings(flight, self.stop)
        return finished

    def _end_at_strings(self, flight: Flight, stop: StopStrings) -> None:
        """Marks rows whose text has reached a stop string as done; they may have a few more tokens."""
        last = flight.count[:, None] - stop.tail + torch.arange(stop.tail, device=self.device)
        tails = flight.token_ids.gather(1, last.clamp(min=0))  # short rows repeat their first token
        for place in stop.among(tails.tolist()):
            ids = flight.token_ids[place, : flight.count[place]].tolist()
            flight.done[place] |= stop.cut(ids) is not None

    def _without_finished(self, flight: Flight) -> Flight:
        """Removes finished rows; the last rows move to their places."""
        done = flight.done.tolist()
        left = done.count(False)
        targets = [place for place in range(left) if done[place]]
        sources = [place for place in range(left, len(done)) if not done[place]]
        order = list(range(left))
        for target, source in zip(targets, sources, strict=True):
            order[target] = source
        flight = flight.taken(self._tensor(order))
        if not left:
            self.cache = RowCache(self.cache.layers[0].places)
            return flight
        unused = self.cache.get_seq_length() - int(flight.length.max())
        dropped = unused if unused > UNUSED_SHARE * self.cache.get_seq_length() else 0
        self.cache.keep(left, self._tensor(sources), self._tensor(targets), dropped)
        return flight

    def _next_chunks(self, waiting: deque[int], free: int) -> Iterator[list[int]]:
        """Takes waiting rows for the free places, in chunks that fit one forward pass."""
        while free and waiting:
            widest = len(self.prompts[self.rows[waiting[0]].place].ids)
            chunk: list[int] = []
            places: set[int] = set()
            while waiting and len(chunk) < free:
                places.add(self.rows[waiting[0]].place)
                if chunk and len(places) * widest > PREFILL_TOKENS:
                    break
                chunk.append(waiting.popleft())
            free -= len(chunk)
            yield chunk

    def _begin(self, numbers: Sequence[int]) -> Flight:
        """Computes each prompt once, gives every row a copy of its cache and draws the row's first token."""
        rows = [self.rows[number] for number in numbers]
        places = list(dict.fromkeys(row.place for row in rows))
        logits, prefilled, first = self._prefill([self.prompts[place] for place in places])
        of_prompt = self._tensor([places.index(row.place) for row in rows])
        lengths = [len(self.prompts[row.place].ids) for row in rows]
        self.cache.put(prefilled, of_prompt, max(lengths))
        columns = self.sampling.max_new_tokens + 1
        flight = Flight(
            number=self._tensor(numbers),
            first=first[of_prompt],
            length=self._tensor(lengths),
            limit=self._tensor([row.limit for row in rows]),
            count=torch.zeros_like(of_prompt),
            last=torch.zeros_like(of_prompt),
            done=torch.zeros(len(rows), dtype=torch.bool, device=self.device),
            temperature=torch.tensor([self.sampling.temperature_of(r.seed) or 0.0 for r in rows], device=self.device),
            uniform=uniforms([row.seed for row in rows], columns).to(self.device),
            token_ids=torch.zeros(len(rows), columns, dtype=torch.long, device=self.device),
            logps=torch.zeros(len(rows), columns, device=self.device),
        )
        self._draw(flight, logits[of_prompt])
        return flight

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[Tensor, DynamicCache, Tensor]:
        """Returns ((P, V) logits of the first tokens, the prompts' cache, (P,) positions of the first tokens)."""
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):  # left-padded: every row ends where its response begins
            ids[row, longest - len(prompt.ids) :] = prompt.ids
            mask[row, longest - len(prompt.ids) :] = 1
        padded = not bool(mask.all())
        positions = (mask.cumsum(1) - 1).clamp_(min=0).to(self.device)
        ids, mask = ids.to(self.device), mask.to(self.device)
        images = self._images(prompts, ids)
        if images:  # (3, P, L): time, height and width
            without_pixels = {name: tensor for name, tensor in images.items() if name != "pixel_values"}
            positions, _ = self.model.base_model.get_rope_index(ids, attention_mask=mask, **without_pixels)
        cache = DynamicCache()
        out = self.model(
            input_ids=ids,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **images,
        )
        return out.logits[:, -1].float(), cache, positions.reshape(-1, len(prompts), longest).amax((0, 2)) + 1

    def _images(self, prompts: Sequence[Prompt], ids: Tensor) -> dict[str, Tensor]:
        """Inputs of the model's forward besides tokens; empty for text."""
        found = [prompt.images for prompt in prompts if prompt.images]
        if not found:
            return {}
        images = {name: torch.cat([one[name] for one in found]).to(ids.device) for name in found[0]}
        return images | {"mm_token_type_ids": mm_token_type_ids(self.model.config, ids)}

    def _step(self, flight: Flight, padding: Tensor | None) -> None:
        """Generates one token of every row. padding is the (R,) number of columns before each row begins."""
        columns = self.cache.get_seq_length() + 1
        out = self.model(
            input_ids=flight.last[:, None],
            attention_mask=None if padding is None else step_mask(columns, padding, self.whole_masks),
            position_ids=(flight.first + flight.count - 1)[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        flight.length += 1
        self._draw(flight, out.logits[:, -1].float())

    def _draw(self, flight: Flight, logits: Tensor) -> None:
        """Draws the next token of every row, and records it for rows that are not done."""
        column = flight.count.masked_fill(flight.done, flight.uniform.shape[1] - 1)[:, None]
        uniform = flight.uniform.gather(1, column).squeeze(1)
        flight.last, logp = draw(logits, uniform, self.sampling, self.forbidden, flight.temperature)
        flight.token_ids.scatter_(1, column, flight.last[:, None])
        flight.logps.scatter_(1, column, logp[:, None])
        flight.count += ~flight.done
        flight.done |= torch.isin(flight.last, self.ends) | (flight.count >= flight.limit)

    def _collect(self, flight: Flight) -> list[Finished]:
        counts = flight.count.tolist()
        token_ids, logps = flight.token_ids.cpu(), flight.logps.cpu()
        ended = torch.isin(token_ids, self.ends.cpu())
        found = []
        for row, (number, count) in enumerate(zip(flight.number.tolist(), counts, strict=True)):
            if not bool(logps[row, :count].isfinite().all()):
                raise NotFiniteError(
                    f"the engine's model gives logits that are no numbers: its weights diverged; {DIVERGED_REMEDY}"
                )
            reason = "stop" if ended[row, count - 1] else "length"
            ids, logp = token_ids[row, :count].tolist(), logps[row, :count].tolist()
            found.append(Finished(self.rows[number], ids, logp, reason))
        return found

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)
