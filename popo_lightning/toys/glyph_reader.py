"""An auxiliary task for a vision tower that learns to read from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from popo_lightning.toys.diagrams import GLYPHS

Glyph = tuple[str, int, int]  # symbol, column and row in patches


class GlyphReader(torch.nn.Module):
    """Trains the vision tower to distinguish the symbols. It is discarded after the warm start.

    It predicts the symbol in each of the four patches of a token from the tower's output. Without it, vision tower and
    language model wait for each other: for hundreds of steps the language model learns to ignore the image.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.names = torch.nn.Linear(width, 4 * (1 + len(GLYPHS)))

    def watch(self, tower: torch.nn.Module, inputs: Any, output: Any) -> None:
        """Keeps the tower's output; used as a forward hook."""
        self.seen = output.pooler_output

    def loss(self, glyphs: Sequence[Sequence[Glyph]], grids: Tensor) -> Tensor:
        """Returns the cross-entropy over the patches of the last images; glyphs are (symbol, column, row) per image."""
        targets = []
        for written, (_, rows, columns) in zip(glyphs, grids.tolist(), strict=True):
            patches = torch.zeros(rows, columns, dtype=torch.long)
            for symbol, column, row in written:
                patches[row, column] = 1 + list(GLYPHS).index(symbol)
            targets.append(patches.view(rows // 2, 2, columns // 2, 2).transpose(1, 2).flatten())
        scores = self.names(self.seen).view(-1, 1 + len(GLYPHS))
        weights = torch.ones(1 + len(GLYPHS)).index_fill(0, torch.tensor(0), 0.1)  # most patches are empty
        return cross_entropy(scores, torch.cat(targets), weights)
