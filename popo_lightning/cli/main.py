"""The ``popo`` command: LightningCLI over the policy, the rollouts and the callbacks, without logic of its own."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack

from lightning.pytorch.cli import ArgsType

from popo_lightning.cli.class_faults import show_traceback
from popo_lightning.cli.parser import CLI_SETTINGS, refuse
from popo_lightning.cli.popo_cli import PopoCLI
from popo_lightning.cli.quiet_libraries import quieten
from popo_lightning.cli.shipped_configs import with_config_paths
from popo_lightning.core.errors import NotFiniteError, NothingSavedError, SettingError, own_refusal, reason
from popo_lightning.core.one_voice import speak
from popo_lightning.core.ranks import lost_rank
from popo_lightning.data import RolloutDataModule
from popo_lightning.policy import PolicyModule
from popo_lightning.runs.stopping import Stopped, stopped_in_words


def run(args: ArgsType = None) -> PopoCLI:
    """Runs one command; a user's mistake is one sentence and exit code 2."""
    quieten()
    args = with_config_paths(args) if isinstance(args, list) else args
    claims = ExitStack()
    try:
        return PopoCLI(PolicyModule, RolloutDataModule, args=args, claims=claims, **CLI_SETTINGS)
    except (SettingError, ValueError) as error:
        # jsonargparse wraps what the constructor of an optional class raises
        refusal = own_refusal(error)
        if refusal is None:
            raise
        show_traceback(refusal)
        refuse(str(refusal))
    except (NotFiniteError, NothingSavedError) as error:
        speak("; ".join(map(str, (error, *getattr(error, "__notes__", ())))))
        sys.exit(1)
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        print(
            "popo: this rank stops because another rank is gone, whose own output says why; checkpoints are complete, "
            f"and --run.resume true resumes from the newest, if there is one ({reason(error)})",
            file=sys.stderr,
        )
        sys.exit(1)
    except Stopped as stop:
        if stop.speaks:
            for sentence in (
                *getattr(stop, "__notes__", ()),
                stopped_in_words(stop, sys.argv[1:] if args is None else args),
            ):
                print(f"popo: {sentence}", file=sys.stderr)
        # a rank that another one started ends well: that one gives the exit code, and would be killed for another's
        sys.exit(0 if stop.launched else stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # Lightning's way of passing it on
            sys.exit(128 + signal.SIGINT)
        raise
    finally:
        claims.close()
