"""The one error a user's mistake raises: caught by the command line, printed as one sentence, exit code 2."""


class SettingError(ValueError):
    """A setting, file or folder that cannot work.

    The message is one sentence that names the setting, its value and the remedy.
    """


def reason(error: Exception) -> str:
    """Another library's explanation on one line of at most 300 characters, to stand inside a sentence."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) or not text:  # a key alone says nothing
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 300 else f"{text[:299]}…"
