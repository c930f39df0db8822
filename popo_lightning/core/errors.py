"""Errors printed as one sentence: a user's mistake (exit code 2), and a run that cannot go on or saved nothing (1)."""

import errno
import traceback
from collections.abc import Iterator
from pathlib import Path


class SettingError(ValueError):
    """A setting, file or folder cannot work.

    The message is one sentence that names the setting, its value and the remedy.
    """


DIVERGED_REMEDY = (
    "lower the learning rate of model.optimizer, set model.max_grad_norm, or warm up by model.lr_scheduler"
)


class NothingSavedError(RuntimeError):
    """A run has ended, and none of its checkpoints could be written.

    The message is one sentence with the reason and the remedy.
    """


class NotFiniteError(RuntimeError):
    """Training cannot continue because its numbers are not finite.

    The message is one sentence with the reason and the remedy.
    """


class EngineGapError(RuntimeError):
    """Training cannot continue because the engine does not sample from the policy.

    The message is one sentence with the reason and the remedy.
    """


def reason(error: Exception, most: int = 300) -> str:
    """Puts another library's explanation on one line, for use inside a sentence.

    Args:
        error: Error with the explanation.
        most: Maximum number of characters; the words that do not fit are left out.
    """
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) or not text:  # a key alone says nothing
        text = f"{type(error).__name__} {text}".strip()
    return shortened(text, most)


def shortened(text: str, most: int) -> str:
    """Cuts a line after a whole word and adds … if it is too long; a single longer word is cut."""
    if len(text) <= most:
        return text
    words = text[: most - 1].rpartition(" ")[0].rstrip(" ,;:.(")
    return f"{words} …" if words else f"{text[: most - 1]}…"


def own_refusal(error: BaseException) -> SettingError | None:
    """The SettingError that an error is or wraps, or None. jsonargparse wraps what a nested class raises."""
    return next((each for each in causes(error) if isinstance(each, SettingError)), None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it wraps or followed, the latest first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def disk_refusal(error: OSError) -> str | None:
    """The sentence for a disk that is full, or for a run's folder that was removed; None for other errors.

    Args:
        error: Error of a run that writes. The attribute ``gone`` of it, or of one that it followed, is the run's folder
            if that was removed.
    """
    gone = next((each.gone for each in causes(error) if hasattr(each, "gone")), None)
    if gone is not None:
        return f"the run's folder '{gone}' is gone; restore it and resume by --run.resume true, or begin anew"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    where = f" for '{error.filename}'" if isinstance(error.filename, str) else _place(error)
    return f"the disk has no room{where} ({error.strerror}); make room, and resume by --run.resume true"


def _place(error: OSError) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f", at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
