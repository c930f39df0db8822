"""Errors that the command line prints as one sentence: a user's mistake (exit code 2), and a run that diverged (1)."""


class SettingError(ValueError):
    """A setting, file or folder that cannot work.

    The message is one sentence that names the setting, its value and the remedy.
    """


DIVERGED_REMEDY = (
    "lower the learning rate of model.optimizer, set model.max_grad_norm, or warm up by model.lr_scheduler"
)


class NothingSavedError(RuntimeError):
    """A run that is over, and of which no checkpoint could be written.

    The message is one sentence with the reason and the remedy.
    """


class NotFiniteError(RuntimeError):
    """Training cannot continue because its numbers are not finite.

    The message is one sentence with the reason and the remedy.
    """


def reason(error: Exception, most: int = 300) -> str:
    """Another library's explanation on one line, to stand inside a sentence.

    Args:
        error: That it gives.
        most: Characters of the line; what does not fit is left out from the end of a word on.
    """
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) or not text:  # a key alone says nothing
        text = f"{type(error).__name__} {text}".strip()
    return shortened(text, most)


def shortened(text: str, most: int) -> str:
    """A line's beginning of whole words, with … where something is left out; a longer word is cut."""
    if len(text) <= most:
        return text
    words = text[: most - 1].rpartition(" ")[0].rstrip(" ,;:.(")
    return f"{words} …" if words else f"{text[: most - 1]}…"


def own_refusal(error: BaseException) -> SettingError | None:
    """The refusal that an error is, or that it wraps, as jsonargparse does with what a nested class raises."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, SettingError):
        seen = seen.__cause__ or seen.__context__
    return seen
