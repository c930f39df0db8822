"""``popo`` and ``python -m popo_lightning``. Commands that need neither torch nor vLLM run without importing them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from popo_lightning import __version__
from popo_lightning.cli.shipped_configs import with_config_paths
from popo_lightning.core.config_options import configs_first
from popo_lightning.core.did_you_mean import did_you_mean
from popo_lightning.core.errors import causes
from popo_lightning.core.unbroken_output import keep_output_unbroken

SUBCOMMANDS = {
    "fit": "Train a policy.",
    "validate": "Evaluate a policy, or a checkpoint of it, on the task's benchmarks.",
    "test": "Evaluate like validate, with results in a separate folder.",
    "predict": "Sample responses to the benchmarks' problems and write them to responses.jsonl.",
    "compare": "Run methods x seeds on a task, one or several at a time, and report.",
    "configs": "List, print or copy the configurations that come with the package.",
    "show": "Make one HTML file of runs: curves, evaluations, groups of responses.",
    "export": "Write a trained policy as a folder that transformers and vLLM load.",
    "sample": "Ask a trained policy a question, and print its answers.",
    "estimate": "Estimate a checkpoint's accuracy from responses that another one sampled.",
    "completion": "Print a script that completes commands and settings in bash or zsh.",
}
# The subcommands that LightningCLI does not handle: the module in cli/ whose `main` runs each.
MODULES = {
    "compare": "compare.command",
    "configs": "shipped_configs",
    "show": "show.command",
    "export": "export.export_command",
    "sample": "export.sample_command",
    "estimate": "estimate.command",
    "completion": "completion",
}
NO_WINDOWS = (
    "Windows lacks the POSIX locks and signals that a run needs; use WSL (wsl --install) or the container of the "
    "Dockerfile (docs/install.md)"
)
HELP = """usage: popo SUBCOMMAND [options]

Off-policy reinforcement learning with verifiable rewards on Lightning, with group replay (POPO).

subcommands:
{subcommands}

options:
  -h, --help      Show this and exit. popo SUBCOMMAND --help lists a subcommand's settings.
  --version       Show the version and exit.

Settings come from YAML files, each over the ones before, and from the command line over all of them:
  popo fit --config task/countdown_tiny --config method/popo --run.root runs"""


def main() -> None:
    """Runs the command line. Ctrl-C while it loads ends it with the exit code of later ones, without a traceback."""
    keep_output_unbroken()
    try:
        dispatch()
    except BaseException as error:
        if not interrupted(error):
            raise
        if not isinstance(error, KeyboardInterrupt):
            print(f"popo: stopped by Ctrl-C ({type(error).__name__}: {error})", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def interrupted(error: BaseException) -> bool:
    """Whether an error comes from Ctrl-C: libraries raise errors of their own when their import is interrupted."""
    ends = (each for each in causes(error) if isinstance(each, KeyboardInterrupt | SystemExit))
    return isinstance(next(ends, None), KeyboardInterrupt)


def dispatch() -> None:
    """Runs a subcommand. It first sets the environment variables that torch and vLLM read when imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    answer_at_once(sys.argv[1:])
    if sys.platform == "win32":
        print(f"popo: {NO_WINDOWS}", file=sys.stderr)
        sys.exit(2)
    if (folder := str(Path.cwd())) not in sys.path:  # last, so that it hides no installed module
        sys.path.append(folder)  # so that class_path finds classes in the working directory
    sys.argv[1:] = configs_first(with_config_paths(sys.argv[1:]))
    command, *args = sys.argv[1:]
    if command in MODULES:
        module = import_module(f"popo_lightning.cli.{MODULES[command]}")
        sys.exit(module.main(args, other_parsers) if command == "completion" else module.main(args))
    if sys.stderr.isatty() and not {"-h", "--help", "--help_all", "--print_config"} & set(sys.argv):
        print("popo: loading torch, Lightning and transformers", file=sys.stderr)
    from popo_lightning.cli.main import run

    run(sys.argv[1:])


def other_parsers() -> dict[str, tuple[str, Any]]:
    """Returns the description and the parser of each subcommand that LightningCLI does not handle."""
    from popo_lightning.cli import completion, shipped_configs
    from popo_lightning.cli.compare.command import parser as compare
    from popo_lightning.cli.estimate.options import estimate_parser
    from popo_lightning.cli.export.options import export_parser, sample_parser
    from popo_lightning.cli.show.command import parser as show

    made = {"compare": compare, "configs": shipped_configs.parser, "show": show, "export": export_parser}
    made |= {"sample": sample_parser, "estimate": estimate_parser, "completion": completion.parser}
    return {name: (SUBCOMMANDS[name], make()) for name, make in made.items()}


def answer_at_once(args: Sequence[str]) -> None:
    """Prints help, the version, or an error for a missing or misspelt subcommand, and exits."""
    first = args[0] if args else ""
    if first in ("-h", "--help"):
        listed = "\n".join(f"  {name:<16}{about}" for name, about in SUBCOMMANDS.items())
        print(HELP.format(subcommands=listed))
        sys.exit(0)
    if first == "--version":
        print(f"popo {__version__}")
        sys.exit(0)
    if first.startswith("-") or first in SUBCOMMANDS:  # options of all subcommands may come first
        return
    there = f"name one of {', '.join(SUBCOMMANDS)}"
    said = f"'{first}' is no subcommand; {did_you_mean(first, SUBCOMMANDS, there)}" if first else there
    print(f"popo: {said} (popo --help describes them)", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
