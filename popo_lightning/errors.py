"""The one error a user's mistake raises: caught by the command line, printed as one sentence, exit code 2."""


class SettingError(ValueError):
    """A setting, file or folder that cannot work.

    The message is one sentence that names the setting, its value and the remedy.
    """
