"""Rows of data files and hub data sets. Files are hostile input: sizes are bounded, and a bad row is only a bad row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Required, TypedDict

from popo_lightning.core.errors import SettingError, reason

MAX_ROW_BYTES = 4 * 2**20
MAX_ARRAY_BYTES = 2**30
ROWS_AT_A_TIME = 256
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


class Columns(TypedDict, total=False):
    """Maps columns of a source to fields. A field not named here is read from the column of the same name.

    A dotted name reaches into nested columns: reward_model.ground_truth, or final_answer.0 for the first of a list.

    Args:
        prompt: Text of the problem, or chat messages.
        answer: Gold answer. A mapping of names to columns, such as {numbers: nums, target: target}, makes a mapping of
            names to values. A bare number becomes text, as in JSON rows.
        id: Unique name of the problem; without it the row's number is used.
        level: Difficulty, for breakdowns.
        subject: Field, for breakdowns.
        images: One image or a list: paths, or images embedded in the data set.
    """

    prompt: str
    answer: str | dict[str, str]
    id: str
    level: str
    subject: str
    images: str


class Source(TypedDict, total=False):
    r"""Where rows come from. A typed dict, because a later config must replace a source, not fill its gaps.

    Args:
        path: Hub data set, file (.jsonl, .json, .parquet), glob, or a folder that the datasets library reads.
        config: Configuration of a hub data set.
        split: Split of a hub data set or folder; default "train".
        columns: Maps columns to fields.
        answer_after: Mark before the gold answer, such as "####" for GSM8K. The answer is the text after the last mark,
            without commas.
        answer_boxed: The gold answer is the content of the column's last \boxed.
        skip: Number of rows to leave out at the start.
        limit: Maximum number of rows after those.
    """

    path: Required[str]
    config: str | None
    split: str | None
    columns: Columns
    answer_after: str | None
    answer_boxed: bool
    skip: int
    limit: int | None


@dataclass(frozen=True)
class Row:
    """One row as read.

    Args:
        source: File or data set, for messages.
        number: Number of the row in the source, from 1.
        content: Columns and values; None if the row cannot be read.
        folder: Base folder of its relative paths.
        unreadable: Why the row cannot be read.
    """

    source: str
    number: int
    content: dict[str, Any] | None
    folder: Path
    unreadable: str = ""


def read_rows(source: Source, setting: str, folder: str | None) -> Iterator[Row]:
    """Yields the rows of a source, in order.

    Args:
        source: Source to read.
        setting: Name of the setting that gives the source, for messages.
        folder: Base folder of a relative path; None for the working directory.

    Raises:
        SettingError: The source does not exist, or cannot be read at all.
    """
    skip, limit = source.get("skip", 0), source.get("limit")
    if skip < 0 or (limit is not None and limit < 1):
        raise SettingError(f"{setting} has skip {skip} and limit {limit}; skip no fewer than 0 rows, take at least 1")
    path = source["path"]
    place = Path(folder or ".").expanduser() / Path(path).expanduser()
    files = _files(path, place, folder, setting)
    if files:
        for unused in ("config", "split"):
            if source.get(unused):
                raise SettingError(
                    f"{setting}.{unused} is '{source[unused]}' but its path '{path}' is a file; leave it out"
                )
        rows = (row for file in files for row in _file_rows(file, setting))
        yield from islice(rows, skip, None if limit is None else skip + limit)
    elif place.is_dir() or HUB_ID.fullmatch(path):
        yield from _dataset_rows(source, place, setting, skip, limit)
    else:
        raise SettingError(
            f"{setting}.path is '{path}', which is neither a file, a folder nor the id of a hub data set"
        )


def _files(path: str, place: Path, folder: str | None, setting: str) -> list[Path]:
    """Returns the files that a path stands for; none for a folder or a hub id."""
    if place.is_file():
        files = [place]
    elif re.search(r"[*?\[]", path):
        pattern = Path(path).expanduser()
        root = Path(pattern.anchor) if pattern.is_absolute() else Path(folder or ".").expanduser()
        found = root.glob(str(pattern.relative_to(root) if pattern.is_absolute() else pattern))
        files = sorted(file for file in found if file.is_file())
        if not files:
            raise SettingError(f"{setting}.path is '{path}', which matches no file; correct it, or data.task.folder")
    elif place.suffix in SUFFIXES or path.startswith(("/", ".", "~")):
        if place.is_dir():
            return []
        raise SettingError(
            f"{setting}.path is '{path}' but there is no {place}; correct it, or give the folder as data.task.folder"
        )
    else:
        return []
    for file in files:
        if file.suffix not in SUFFIXES:
            raise SettingError(f"{setting}.path is '{path}', and {file.name} is none of {', '.join(SUFFIXES)}")
    return files


def _file_rows(file: Path, setting: str) -> Iterator[Row]:
    if file.suffix == ".parquet":
        return _parquet_rows(file, setting)
    try:
        with file.open("rb") as stream:
            array = file.suffix == ".json" and stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except OSError as error:
        raise SettingError(f"{setting}.path gives {file}, which cannot be read: {reason(error)}") from error
    return _array_rows(file, setting) if array else _line_rows(file)


def _line_rows(file: Path) -> Iterator[Row]:
    with file.open("rb") as stream:
        for number, line in enumerate(_lines(stream), 1):
            if line is None:
                why = f"is longer than {MAX_ROW_BYTES // 2**20} MiB; keep images in files of their own"
                yield Row(str(file), number, None, file.parent, why)
            elif line.strip():
                yield _parsed(line, str(file), number, file.parent)


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Yields lines of bounded length, and None for a longer line, which is never held whole."""
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if len(line) <= MAX_ROW_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while (rest := stream.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield None


def _parsed(line: bytes, source: str, number: int, folder: Path) -> Row:
    try:
        content = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return Row(source, number, None, folder, f"is no JSON ({reason(error)}); correct or remove it")
    return _checked(content, source, number, folder)


def _checked(content: object, source: str, number: int, folder: Path) -> Row:
    if not isinstance(content, dict):
        return Row(source, number, None, folder, f"is a {type(content).__name__}, no object of columns; remove it")
    return Row(source, number, content, folder)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _array_rows(file: Path, setting: str) -> Iterator[Row]:
    """Yields the rows of a file that is one JSON array, which can only be read whole."""
    if file.stat().st_size > MAX_ARRAY_BYTES:
        raise SettingError(f"{setting}.path gives {file}, a JSON array over 1 GiB; write one object a line (.jsonl)")
    try:
        rows = json.loads(file.read_text("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SettingError(
            f"{setting}.path gives {file}, a JSON array that cannot be read ({reason(error)}); correct it, or write "
            "one object a line (.jsonl), where a bad row costs only itself"
        ) from error
    for number, content in enumerate(rows, 1):
        yield _checked(content, str(file), number, file.parent)


def _parquet_rows(file: Path, setting: str) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise _missing_library(setting, file) from error
    try:
        with parquet.ParquetFile(file) as opened:
            number = 0
            for batch in opened.iter_batches(ROWS_AT_A_TIME):
                for content in batch.to_pylist():
                    number += 1
                    yield Row(str(file), number, content, file.parent)
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise SettingError(f"{setting}.path gives {file}, which is no readable parquet: {reason(error)}") from error


def _dataset_rows(source: Source, place: Path, setting: str, skip: int, limit: int | None) -> Iterator[Row]:
    """Yields rows of a hub data set or a folder, with the datasets library. Code in a data set is never run."""
    path, config, split = source["path"], source.get("config"), source.get("split") or "train"
    try:
        import datasets
    except ImportError as error:
        raise _missing_library(setting, path) from error
    local = place.is_dir()
    try:
        if local and any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
            data = _saved_split(datasets.load_from_disk(str(place)), split)
        else:
            data = datasets.load_dataset(str(place) if local else path, config, split=split)
    except Exception as error:  # a library that downloads and parses may raise anything
        raise SettingError(_no_dataset(source, setting, local, error)) from error
    name = f"{path} ({', '.join(filter(None, (config, split)))})"
    last = len(data) if limit is None else min(len(data), skip + limit)
    number = min(skip, last)
    # Arrow rows keep images as bytes or paths; the library's own rows would decode each image.
    for table in data.select(range(number, last)).with_format("arrow").iter(ROWS_AT_A_TIME):
        for content in table.to_pylist():
            number += 1
            yield Row(name, number, content, place if local else Path())


def _saved_split(saved: Any, split: str) -> Any:
    """Returns a split of a folder written by save_to_disk, which holds several splits or one without a name."""
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise ValueError(f"its splits are {', '.join(saved)}")
    return saved[split]


def _no_dataset(source: Source, setting: str, local: bool, error: Exception) -> str:
    what = ", ".join(f"{key} '{source[key]}'" for key in ("path", "config", "split") if source.get(key))
    if local:
        remedy = "correct it, or name a file in the folder"
    elif isinstance(error, ConnectionError):
        remedy = (
            "go online once, set HF_HOME to a cache that has it, or read files: add the task's *_local.yaml and "
            "data.task.folder"
        )
    else:
        remedy = "correct it, or read files: add the task's *_local.yaml and data.task.folder"
    return f"{setting} is {what}, which cannot be loaded ({reason(error)}); {remedy}"


def _missing_library(setting: str, path: object) -> SettingError:
    return SettingError(f"{setting}.path is '{path}', which needs the datasets library; pip install datasets")
