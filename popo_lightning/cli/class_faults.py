"""Describes a fault in a class or module that a setting names, in one sentence with the setting and the place."""

from __future__ import annotations

import inspect
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from traceback import print_exception, walk_tb
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from popo_lightning.cli.shipped_configs import shown_path
from popo_lightning.core.did_you_mean import object_at
from popo_lightning.core.errors import SettingError, reason

PACKAGE = Path(__file__).parent.parent
LIBRARIES = tuple({Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
KNOWN = ("popo_lightning", "lightning", "torch")
# Errors with which a known class refuses its settings; other code reports these, without a place.
REFUSALS = (MisconfigurationException, ImportError, TypeError, ValueError)
DEBUG = "JSONARGPARSE_DEBUG"  # environment variable of jsonargparse for debugging
TRACEBACK = f"{DEBUG}=true in the environment shows the traceback"


class ClassFaultError(SettingError):
    """Raised if a user's class or its module raised an error, which is the cause."""


class Maker:
    """Makes the objects that settings name, and reports the setting whose class raised an error.

    Args:
        config: Settings as parsed.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.refusal: SettingError | None = None  # the last one; jsonargparse may wrap it beyond recognition

    def __call__(self, kind: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Makes the object; jsonargparse calls this as its instantiator.

        Args:
            kind: Class, or function that returns an object.
            args: Positional arguments of `kind`.
            kwargs: Keyword arguments of `kind`.

        Raises:
            ClassFaultError: It raised an error that is not a known class's refusal of its settings.
        """
        try:
            return kind(*args, **kwargs)
        except SettingError as error:
            self.refusal = error
            raise
        except (Exception, SystemExit) as error:
            if _top(kind.__module__) in KNOWN and isinstance(error, REFUSALS):
                raise
            path = f"{kind.__module__}.{kind.__qualname__}"
            setting = next(settings_of(self.config, kind), "a setting")
            self.refusal = ClassFaultError(
                f"{setting} is {path}, whose constructor raised {said(error)}{_at(error, kind)}; give it other "
                f"settings, or correct it ({TRACEBACK})"
            )
            raise self.refusal from error


def show_traceback(refusal: SettingError) -> None:
    """Prints the traceback of a fault in a class or module if jsonargparse's debug variable is set."""
    if isinstance(refusal, ClassFaultError) and os.environ.get(DEBUG, "").lower() == "true":
        print_exception(refusal.__cause__)


def settings_of(config: Any, kind: Callable[..., Any], above: str = "") -> Iterator[str]:
    """Yields the names of the settings whose class_path names a class.

    Args:
        config: Settings as parsed.
        kind: The class.
        above: Name of the setting that holds `config`.
    """
    if isinstance(config, list | tuple):
        for place, value in enumerate(config):
            yield from settings_of(value, kind, f"{above}[{place}]")
        return
    items = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    if isinstance(path := items.get("class_path"), str) and _found(path) is kind:
        yield above
    for name, value in items.items():
        inner = above if name == "init_args" else f"{above}.{name}".lstrip(".")
        yield from settings_of(value, kind, inner)


def import_fault(error: BaseException) -> ClassFaultError | None:
    """The error that a module raised while it was imported for a class_path, or None for any other error.

    Args:
        error: Error that jsonargparse raised.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    paths = [frame.f_locals.get("name") for frame in frames if frame.f_code.co_name == "import_object"]
    if not paths:
        return None
    owners = [getattr(frame.f_locals.get("self"), "dest", None) for frame in frames]
    names = [name for name in dict.fromkeys(owners) if isinstance(name, str) and name != "subcommand"]
    setting = ".".join(names) or "a setting"
    return ClassFaultError(
        f"{setting} is {paths[-1]}, whose module raised {said(error)}{_at(error, None)} when it was imported; correct "
        f"it ({TRACEBACK})"
    )


def said(error: BaseException) -> str:
    """The kind of an error and its message, on one line."""
    name, text = type(error).__name__, reason(error)  # type: ignore[arg-type]
    if isinstance(error, SyntaxError):
        text = error.msg
    return name if text == name else text if text.startswith(f"{name} ") else f"{name}: {text}"


def _at(error: BaseException, kind: Callable[..., Any] | None) -> str:
    """The innermost place in the user's code, else in the package of the class, as " at FILE:LINE"; else ""."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f" at {shown_path(Path(error.filename))}:{error.lineno}"
    places = [(Path(frame.f_code.co_filename), line, frame.f_globals) for frame, line in walk_tb(error.__traceback__)]
    own = [place for place in places if _is_users(place[0])]
    if not own and kind is not None:
        own = [place for place in places if _top(place[2].get("__name__", "")) == _top(kind.__module__)]
    return f" at {shown_path(own[-1][0])}:{own[-1][1]}" if own else ""


def _is_users(file: Path) -> bool:
    known = file.is_relative_to(PACKAGE) or any(file.is_relative_to(folder) for folder in LIBRARIES)
    return not known and file.is_absolute()


def _top(module: str) -> str:
    return module.partition(".")[0]


def _found(path: str) -> Any:
    try:
        return inspect.unwrap(object_at(path))
    except (ImportError, AttributeError, ValueError):
        return None
