"""The command line of `popo estimate`, without torch, so that --help answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from popo_lightning.cli.estimate.names import CONFIDENCE, LARGEST_WEIGHT, ONE, POSITION, TIME
from popo_lightning.cli.export.options import SOURCE, CommandLine, add_policy_options, number


def estimate_parser() -> CommandLine:
    """Parser of `popo estimate`."""
    made = CommandLine(
        "estimate",
        "Estimates the accuracy of a checkpoint from responses that another one sampled, by one forward pass; or, with "
        "--instrument, what a behavior does to accuracy, from responses to prompts with a randomized hint.",
    )
    made.add_argument(
        "source",
        metavar=f"{SOURCE}|FILE",
        nargs="+",
        help="A run's folder, whose newest checkpoint counts, or a checkpoint; with --instrument, files of JSON lines.",
    )
    _add_checkpoint_options(made)
    made.add_argument(
        "--instrument",
        metavar="NAME",
        help="Field of the rows that says whether the prompt had the hint, 0 or 1, as a coin decided.",
    )
    made.add_argument(
        "--action",
        metavar="EXPRESSION",
        help="What the response does, such as 'len>512', 'format>=1' or 'response contains \"so\"'.",
    )
    return made


def estimate_options(args: Sequence[str]) -> argparse.Namespace:
    """Parses the command line of `popo estimate`.

    Args:
        args: Arguments after the subcommand.
    """
    made = estimate_parser()
    asked = made.parse_args(args)
    if (asked.instrument is None) != (asked.action is None):
        missing = "--action" if asked.action is None else "--instrument"
        made.error(f"{missing} is missing; give --instrument NAME and --action EXPRESSION together")
    if asked.instrument is None and len(asked.source) > 1:
        made.error(f"'{asked.source[1]}' is one {SOURCE} too many; responses of other runs are named by --from")
    return asked


def _add_checkpoint_options(made: CommandLine) -> None:
    made.add_argument(
        "--from",
        dest="from_",
        action="append",
        default=[],
        metavar="RUN_OR_EVALUATION",
        help="Whose responses are used: a run's folder, or one of its evaluations/ folders; may be repeated (default: "
        "the checkpoint's own run).",
    )
    made.add_argument(
        "--iteration",
        type=number(int, 0),
        action="append",
        default=[],
        help="Evaluation of the run whose responses are used; may be repeated (default: the newest that is no newer "
        "than the checkpoint).",
    )
    made.add_argument("--benchmark", metavar="NAME", help="Only this one.")
    made.add_argument(
        "--temperature",
        type=number(float, 0, above=True),
        help="The checkpoint is judged at (default: that of the responses).",
    )
    made.add_argument(
        "--reward", metavar="COMPONENT", default="acc", help="Reward component that is estimated (default: acc)."
    )
    made.add_argument(
        "--max_weight",
        type=number(float, 0, above=True),
        default=LARGEST_WEIGHT,
        metavar="WEIGHT",
        help=f"Largest weight of a response in the clipped estimate (default: {LARGEST_WEIGHT:g}).",
    )
    made.add_argument(
        "--abstraction",
        choices=(POSITION, CONFIDENCE, TIME, ONE),
        default=POSITION,
        help="States of STAR: the tenth of the response; the tenth and how sure the policy is; each token; one alone "
        "(default: position).",
    )
    made.add_argument(
        "--last",
        type=number(int, 0),
        default=0,
        metavar="TOKENS",
        help="Tokens in STAR's weights; fewer than all vary less and are biased (default: 0, all).",
    )
    made.add_argument("--seed", type=number(int, 0), default=0, help="Of the bootstrap (default: 0).")
    add_policy_options(made)
    made.add_argument("--json", metavar="FILE", help="Also write all numbers there.")
