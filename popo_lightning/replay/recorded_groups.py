"""Groups in a file of JSON lines. One run writes its samples; another reads the file without trusting it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from popo_lightning.core.errors import SettingError, reason
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.problems import Problem
from popo_lightning.core.ranks import part_of_rank, rank_and_size
from popo_lightning.core.response_rows import log_probs, rows_of, token_ids
from popo_lightning.replay.composer import Composer, Iteration


class RecordGroups(Composer):
    """GRPO that writes its effective groups to a file, which GRAFT reads as a peer's (docs/methods/graft.md).

    Each group is one JSON line: `problem` (its id), `iteration`, `group`, `prompt_ids`, and `responses`, each with
    `token_ids`, `behave_logp`, `parts`, `finish_reason` and `text`. Each of several ranks writes its own file. Lines
    are appended to an existing file. A resumed run writes a repeated iteration again; a reader counts it once.

    Args:
        path: File to write.
    """

    def __init__(self, path: str) -> None:
        if not path.strip():
            raise SettingError("RecordGroups.path is empty; name a file, such as peers.jsonl")
        self.path = path

    def compose(self, iteration: Iteration) -> list[Group]:
        """Writes the effective fresh groups to the file, and returns all fresh groups unchanged."""
        fresh = iteration.rollout()
        lines = [json.dumps(row_of(group), allow_nan=False) + "\n" for group in iteration.split(fresh)[0]]
        file = own_file(Path(self.path).expanduser(), *rank_and_size())
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab+") as added:
                if added.tell() and _last_byte(added) != b"\n":  # an earlier run died while it wrote
                    added.write(b"\n")
                added.write("".join(lines).encode("ascii"))
        except OSError as error:
            raise SettingError(
                f"RecordGroups.path is '{self.path}', which cannot be written ({reason(error)}); name another file"
            ) from error
        return fresh


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def own_file(path: Path, rank: int, ranks: int) -> Path:
    """Returns the file of one rank: the path itself for a single rank, else STEM.rank0-of-2.jsonl and so on."""
    return path if ranks == 1 else path.with_name(f"{path.stem}{part_of_rank(rank, ranks)}{path.suffix}")


def row_of(group: Group) -> dict[str, Any]:
    """Converts a group to plain JSON, without its images."""
    return {
        "problem": group.problem.id,
        "iteration": group.version,
        "group": group.id,
        "prompt_ids": group.prompt_ids.tolist(),
        "responses": [
            {
                "token_ids": one.token_ids.tolist(),
                "behave_logp": one.behave_logp.tolist(),
                "parts": one.parts,
                "finish_reason": one.finish_reason,
                "text": one.text,
            }
            for one in group.responses
        ],
    }


def recorded_groups(files: Sequence[str], setting: str) -> dict[str, list[Group]]:
    """Reads groups by problem, in the order of the files. Each has a unique id below 0, and version 0.

    A line replaces an earlier one of its file with the same problem, iteration and group.

    Args:
        files: Files of JSON lines, as RecordGroups writes them.
        setting: Name of the setting that lists the files.

    Raises:
        SettingError: A file cannot be read, or a line is not a group.
    """
    found: dict[tuple[Any, ...], Group] = {}
    read = 0
    for file in files:
        path = Path(file).expanduser()
        if not path.is_file():
            raise SettingError(f"{setting} names '{file}', which is no file; name one that RecordGroups has written")
        for number, row in rows_of(path):
            try:
                read += 1
                group = _group(row, -read)
                place = (str(path), group.problem.id, *(row.get(key, number) for key in ("iteration", "group")))
                found[place] = group
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
                raise SettingError(
                    f"{setting} names '{file}', whose line {number} is no recorded group ({reason(error)}); delete "
                    "that line, or name another file"
                ) from error
    by_problem: dict[str, list[Group]] = {}
    for group in found.values():
        by_problem.setdefault(group.problem.id, []).append(group)
    return by_problem


def _group(row: Mapping[str, Any], number: int) -> Group:
    problem, prompt = row["problem"], token_ids(row["prompt_ids"], "prompt_ids")
    if not isinstance(problem, str):
        raise ValueError("its problem is no text")
    if row.get("images"):
        raise ValueError("it answers a prompt with images")
    if not isinstance(row["responses"], list) or len(row["responses"]) < 2 or not len(prompt):
        raise ValueError("it has no prompt, or fewer than two responses")
    return Group(number, Problem(problem, "", None), prompt, [_response(each) for each in row["responses"]], 0)


def _response(row: Mapping[str, Any]) -> Response:
    ids = token_ids(row["token_ids"], "token_ids")
    if not len(ids) or not isinstance(row["behave_logp"], list):
        raise ValueError("a response without tokens or without log-probs")
    parts, end = dict(row["parts"]), row["finish_reason"]
    if not all(isinstance(part, str) and type(value) in (int, float) for part, value in parts.items()):
        raise ValueError("a reward that is no number")
    if not {"score", "acc"} <= parts.keys():
        raise ValueError("a response without score or acc")
    if not bool(torch.tensor(list(parts.values()), dtype=torch.float32).isfinite().all()):
        raise ValueError("a reward that is not finite in float32")
    if end not in ("stop", "length"):
        raise ValueError("a finish_reason other than stop and length")
    rewards = {part: float(value) for part, value in parts.items()}
    return Response(ids, log_probs(row["behave_logp"]), end, str(row.get("text", "")), rewards)
