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
from popo_lightning.engines.stop_strings import StopStrings
from popo_lightning.model.loading import image_marks
from popo_lightning.model.prompts import Prompt

PREFILL_TOKENS = 2**16  # of prompts in one forward pass, padding included
FINISHED_SHARE = 0.0625  # of the rows, from which on it pays to take them out
UNUSED_SHARE = 0.25  # of the columns, from which on it pays to copy the others to the left
STEPS_UNREAD = 4  # on CUDA, between two looks at what has finished: a look waits for the device


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
    """What is known of R rows under way, on the model's device; count tokens of each are drawn.

    Args:
        number: (R,) places in the list of rows.
        first: (R,) position of the first response token.
        length: (R,) columns of the cache that the row fills; the same steps later all have grown alike.
        limit: (R,) most tokens.
        count: (R,) tokens drawn.
        last: (R,) the newest token.
        done: (R,) whether it has ended; it runs along until it is taken out.
        uniform: (R, C + 1) numbers that decide its draws. The last column is for rows that are done.
        token_ids: (R, C + 1) tokens.
        logps: (R, C + 1) their log-probs.
    """

    number: Tensor
    first: Tensor
    length: Tensor
    limit: Tensor
    count: Tensor
    last: Tensor
    done: Tensor
    uniform: Tensor
    token_ids: Tensor
    logps: Tensor

    def taken(self, rows: Tensor) -> Flight:
        """Some of the rows."""
        return Flight(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.number)


def joined(flights: Sequence[Flight]) -> Flight:
    """The rows of all."""
    return Flight(*(torch.cat([getattr(each, field.name) for each in flights]) for field in fields(Flight)))


class Decoder:
    """Samples rows of one call.

    Args:
        model: A causal language model in eval mode.
        prompts: Of the call.
        sampling: How to draw tokens.
        ends: (E,) tokens that end a response.
        forbidden: (F,) tokens that are never drawn.
        batch_size: Most rows side by side.
        stop: Strings that end a row; the caller cuts off the tokens after them.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        ends: Tensor,
        forbidden: Tensor,
        batch_size: int,
        stop: StopStrings | None = None,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.sampling = sampling
        self.ends = ends
        self.forbidden = forbidden
        self.batch_size = batch_size
        self.stop = stop
        self.device = ends.device
        self.steps_unread = STEPS_UNREAD if self.device.type == "cuda" else 1

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> Iterator[list[Finished]]:
        """Yields rows as they finish, in no particular order. Those of a prompt should lie side by side."""
        # longest prompts first: later rows are no wider than the present ones
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
        """Steps until enough rows are done to take them out, and says which."""
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
        """Rows whose text has reached a stop string are done; a few more tokens of them may be there."""
        last = flight.count[:, None] - stop.tail + torch.arange(stop.tail, device=self.device)
        tails = flight.token_ids.gather(1, last.clamp(min=0))  # of short rows the first token over and over
        for place in stop.among(tails.tolist()):
            ids = flight.token_ids[place, : flight.count[place]].tolist()
            flight.done[place] |= stop.cut(ids) is not None

    def _without_finished(self, flight: Flight) -> Flight:
        """The other rows, in the first places: the last ones go where finished ones were."""
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
        """Takes rows that are waiting, for the places that are free, as many at a time as one pass takes."""
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
            uniform=uniforms([row.seed for row in rows], columns).to(self.device),
            token_ids=torch.zeros(len(rows), columns, dtype=torch.long, device=self.device),
            logps=torch.zeros(len(rows), columns, device=self.device),
        )
        self._draw(flight, logits[of_prompt])
        return flight

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[Tensor, DynamicCache, Tensor]:
        """((P, V) logits of the first tokens, the prompts' cache, (P,) positions of the first tokens)."""
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
        """What the model's forward reads besides tokens; empty for text."""
        found = [prompt.images for prompt in prompts if prompt.images]
        if not found:
            return {}
        images = {name: torch.cat([one[name] for one in found]).to(ids.device) for name in found[0]}
        return images | {"mm_token_type_ids": image_marks(self.model.config, ids)}

    def _step(self, flight: Flight, padding: Tensor | None) -> None:
        """One token of every row; padding is (R,) columns that are not a row's."""
        mask = None
        if padding is not None:
            mask = torch.arange(self.cache.get_seq_length() + 1, device=self.device) >= padding[:, None]
        out = self.model(
            input_ids=flight.last[:, None],
            attention_mask=mask,
            position_ids=(flight.first + flight.count - 1)[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        flight.length += 1
        self._draw(flight, out.logits[:, -1].float())

    def _draw(self, flight: Flight, logits: Tensor) -> None:
        """Draws the next token of every row, and notes it for those that are not done."""
        column = flight.count.masked_fill(flight.done, flight.uniform.shape[1] - 1)[:, None]
        uniform = flight.uniform.gather(1, column).squeeze(1)
        flight.last, logp = draw(logits, uniform, self.sampling, self.forbidden)
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
