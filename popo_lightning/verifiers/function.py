"""A plain function as a reward: found in a file or module, and called with the arguments that its parameters name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickle
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any, NoReturn

from popo_lightning.core.did_you_mean import did_you_mean
from popo_lightning.core.errors import SettingError, reason

TEXTS = ("text", "response")
"""Parameters that get the policy's response."""

GIVEN = (*TEXTS, "answer", "prompt")
"""Names that are never columns."""

SETTING = "data.task.verifier"
MAIN = "__main__"
FORM = "name it as FILE.py:FUNCTION or MODULE:FUNCTION"


class RewardFunction:
    """One function, found by its address.

    A function of a running script or notebook, `__main__:NAME`, is sent to the grading processes by value, which needs
    cloudpickle. Any other function is imported there.

    Args:
        address: Address of the function, such as `my_rewards.py:shout` or `my_rewards:shout`.

    Attributes:
        name: Name of the function.
        required: Names of the parameters that must be given.
        optional: Names of the parameters with a default.
        takes_all: Whether the function has `**columns`.

    Raises:
        SettingError: The file or function does not exist, cannot be imported, or cannot be called.
    """

    def __init__(self, address: str) -> None:
        self.address = address = str(address)  # a plain str, not the settings' type
        self.place, _, self.name = address.rpartition(":")
        if not self.place or not self.name.isidentifier():
            self._refuse(f"which names no function; {FORM}")
        if self.is_file():
            self.place = str(Path(self.place).absolute())  # a grader may start in another folder
        self.by_value = b""
        self._function: Callable[..., Any]
        self._find()
        self._read_signature()
        if self.place == MAIN:
            self._send_by_value()

    def is_file(self) -> bool:
        """Returns whether the address names a file instead of a module."""
        return self.place.endswith(".py") or "/" in self.place

    def __getstate__(self) -> dict[str, Any]:
        """Returns everything but the function."""
        return {name: value for name, value in vars(self).items() if name != "_function"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the function in the receiving process."""
        vars(self).update(state)
        if self.by_value:
            self._function = pickle.loads(self.by_value)
        else:
            self._find()

    def wanted(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Returns those of a row's columns that the function asks for besides the answer and the response."""
        there = {"question": columns["prompt"], **columns} if "prompt" in columns else columns
        asked = (*self.required, *self.optional, *(columns if self.takes_all else ()))
        return {name: there[name] for name in asked if name in there and name not in (*TEXTS, "answer")}

    def columns(self) -> list[str]:
        """Returns the columns that a row must have."""
        return [name for name in self.required if name not in (*GIVEN, "question")]

    def __call__(self, answer: Any, text: str, columns: Mapping[str, Any]) -> Any:
        """Calls the function and returns its result.

        Args:
            answer: The gold answer.
            text: The response.
            columns: Further columns of the row, including "prompt".
        """
        there = {**columns, "answer": answer, "text": text, "response": text}
        named = [*self.required, *self.optional]
        given = {name: there[name] for name in named if name in there}
        if self.takes_all:
            own = {"answer": answer} | ({} if "response" in named else {"text": text})
            given = {**self.wanted(columns), **own, **given}
        return self._function(**given)

    # -- finding it --------------------------------------------------------------------------------------------

    def _find(self) -> None:
        module = self._module()
        found = getattr(module, self.name, None)
        if found is None:
            there = [name for name, one in vars(module).items() if inspect.isfunction(one) and name[0] != "_"]
            otherwise = f"it has {', '.join(sorted(there))}" if there else "it has none"
            if self.place == MAIN:
                otherwise = "functions of a script or notebook are known while it runs, so put this one into a file"
            self._refuse(
                f"but {self._shown()} has no function {self.name}; {did_you_mean(self.name, there, otherwise)}"
            )
        self._function = found

    def _module(self) -> ModuleType:
        try:
            if not self.is_file():
                return importlib.import_module(self.place)
            file = Path(self.place)
            if not file.is_file():
                self._refuse(f"but there is no file {self._shown()}; {FORM}, from the folder that popo is started in")
            return _module_of(str(file), file.stat().st_mtime_ns)
        except SettingError:
            raise
        except (Exception, SystemExit) as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and not self.is_file() and f"{self.place}.".startswith(f"{missing}."):
                self._refuse(f"but there is no module {self.place} here; {FORM}")
            said = f"{type(error).__name__}: {reason(error)}"  # type: ignore[arg-type]
            self._refuse(f"whose module raised {said}{_place_of(error)} when it was imported; correct it", error)

    def _shown(self) -> str:
        return Path(self.place).name if self.is_file() else self.place

    # -- what it is --------------------------------------------------------------------------------------------

    def _read_signature(self) -> None:
        found = self._function
        if inspect.isclass(found):
            dotted = f"{Path(self.place).stem if self.is_file() else self.place}.{self.name}"
            self._refuse(f"which is a class; name a function, or a class derived from Verifier as {dotted}")
        if not callable(found):
            self._refuse(f"which is a {type(found).__name__}; name a function")
        if getattr(found, "__name__", "") == "<lambda>":
            self._refuse(f"which is a lambda; write it as def {self.name}(text, answer): ...")
        if inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found):
            self._refuse("which is an async function, and a grader waits for nobody; write it with def alone")
        if inspect.isgeneratorfunction(found):
            self._refuse("which is a generator; let it return its number, not yield it")
        try:
            parameters = inspect.signature(found).parameters.values()
        except (TypeError, ValueError):
            self._refuse("whose parameters cannot be read; wrap it in a function of Python")
        if unnamed := [one.name for one in parameters if one.kind is one.POSITIONAL_ONLY]:
            self._refuse(f"whose parameter {unnamed[0]} cannot be given by name; take the / out of its parameters")
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = [one for one in parameters if one.kind not in several]
        self.required = [one.name for one in named if one.default is one.empty]
        self.optional = [one.name for one in named if one.default is not one.empty]
        self.takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
        if not self.takes_all and not {*TEXTS} & {one.name for one in named}:
            self._refuse("which does not ask for the response; give it a parameter text (or response)")

    def _send_by_value(self) -> None:
        remedy = "put the function into a file and name it as FILE.py:FUNCTION"
        try:
            import cloudpickle  # type: ignore[import-untyped]  # comes with vLLM
        except ImportError:
            self._refuse(f"a function of a script or notebook, which takes cloudpickle to send; {remedy}")
        try:
            self.by_value = cloudpickle.dumps(self._function)
        except Exception as error:
            self._refuse(f"which cannot be sent to a grading process ({reason(error)}); {remedy}", error)

    def _refuse(self, what: str, cause: BaseException | None = None) -> NoReturn:
        raise SettingError(f"{SETTING} is {self.address}, {what}") from cause


@cache
def _module_of(file: str, changed: int) -> ModuleType:
    """Imports a file as a module, once per change of the file. It can import modules from its folder."""
    folder = str(Path(file).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"reward_file_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _place_of(error: BaseException) -> str:
    """Returns the user's file and line where an error occurred."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f" at {Path(error.filename).name}:{error.lineno}"
    here = ("importlib", "runpy", str(Path(__file__)))
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    own = [(file, line) for file, line in frames if not any(one in file for one in here)]
    return f" at {Path(own[-1][0]).name}:{own[-1][1]}" if own else ""
