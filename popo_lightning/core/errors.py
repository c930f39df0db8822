"""Errors that the command line prints as one sentence: a user's mistake (exit code 2), and a run that diverged (1)."""


class SettingError(ValueError):
    """A setting, file or folder that cannot work.

    The message is one sentence that names the setting, its value and the remedy.
    """


DIVERGED_REMEDY = (
    "lower the learning rate of model.optimizer, set model.max_grad_norm, or warm up by model.lr_scheduler; "
    "--run.resume true takes up the newest checkpoint, --ckpt_path an earlier one"
)


class NotFiniteError(RuntimeError):
    """Training cannot continue because its numbers are not finite.

    The message is one sentence with the reason and the remedy.
    """


def reason(error: Exception) -> str:
    """Another library's explanation on one line of at most 300 characters, to stand inside a sentence."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) or not text:  # a key alone says nothing
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 300 else f"{text[:299]}…"


def own_refusal(error: BaseException) -> SettingError | None:
    """The refusal that an error is, or that it wraps, as jsonargparse does with what a nested class raises."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, SettingError):
        seen = seen.__cause__ or seen.__context__
    return seen
