"""Builds objects that a run's settings name, as the command line does, but without the run's other settings."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from popo_lightning.cli.parser_sentences import Command, explained
from popo_lightning.core.errors import SettingError, reason

Kind = TypeVar("Kind")


def built(kind: type[Kind], settings: Any, name: str) -> Kind:
    """Builds an object whose class settings name by class_path and init_args.

    Args:
        kind: Class that the object must have.
        settings: Settings of the object.
        name: Name of the setting, for error messages.

    Raises:
        SettingError: The class does not exist here, or takes other settings now.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=kind)
    return _instantiated(parser, {"it": settings}, name).it


def arguments_built(kind: type[Any], settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments of a class, with the objects that settings name in them. Arguments left out keep their defaults.

    Args:
        kind: The class.
        settings: Settings as in a config file.
        name: Name of the setting, for error messages.

    Raises:
        SettingError: A class in the settings does not exist here, or takes other settings now.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "it", instantiate=False)
    found = vars(_instantiated(parser, {"it": settings}, name).it)
    return {argument: value for argument, value in found.items() if argument in settings}


def _instantiated(parser: Any, settings: dict[str, Any], name: str) -> Any:
    from jsonargparse import ArgumentError

    try:
        return parser.instantiate_classes(parser.parse_string(json.dumps(settings)))
    except (ArgumentError, ValueError, ImportError, AttributeError, TypeError) as error:
        if isinstance(error, SettingError):
            raise
        if isinstance(error.__cause__, SettingError):
            raise error.__cause__ from error
        why = explained(str(error), Command("popo")) or reason(error)
        raise SettingError(
            f"{name} of the run cannot be built here ({why}); start popo in the folder that has its classes"
        ) from error
