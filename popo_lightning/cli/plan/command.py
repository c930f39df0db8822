"""The option ``--plan`` of `popo fit`, and the memory warning of a run on a GPU."""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from popo_lightning.cli.plan.memory import GIB, Model, estimate
from popo_lightning.cli.plan.run_settings import RunSettings, read_settings
from popo_lightning.cli.plan.table import table
from popo_lightning.cli.plan.verdict import objection
from popo_lightning.core.errors import SettingError, reason
from popo_lightning.data import RolloutDataModule
from popo_lightning.policy import PolicyModule
from popo_lightning.rollout.engine_rollouts import check_positions

log = logging.getLogger(__name__)
MIN_GIB, MAX_GIB = 1e-3, 1e6  # plausible memory of a card
CONFIG = "config.json"
SECONDS = 5.0  # timeout of the hub


class PlanOptions:
    """--plan and --card_gib. They are not settings of a run: its config.yaml does not contain them."""

    def __init__(self) -> None:
        self.asked = False
        self.card_gib: str | None = None

    def add_to(self, parser: LightningArgumentParser) -> None:
        """Adds both to the parser of `popo fit`."""
        parser.add_argument(
            "--plan",
            action=_Note,
            options=self,
            nargs=0,
            help="Estimate the run's GPU memory, disk space and sizes from the model's configuration and exit, before "
            "anything loads. The exit code is 2 if the run cannot fit.",
        )
        parser.add_argument(
            "--card_gib",
            action=_Note,
            options=self,
            nargs=1,
            metavar="GIB",
            help="Memory of one GPU in GiB, for --plan (default: that of this machine's GPU, if it has one).",
        )

    def card(self) -> int | None:
        """Bytes of the card that is given; None if none is.

        Raises:
            SettingError: The card has an implausible size, or is given without --plan.
        """
        if self.card_gib is None:
            return None
        try:
            gib = float(self.card_gib)
        except ValueError:
            gib = math.nan
        if not MIN_GIB <= gib <= MAX_GIB:
            raise SettingError(f"--card_gib is {self.card_gib}; use a GPU's memory in GiB, such as 80")
        if not self.asked:
            raise SettingError(f"--card_gib is {self.card_gib}, but without --plan nothing is planned; add --plan")
        return int(gib * GIB)


class _Note(argparse.Action):
    """Passes an option to PlanOptions, and leaves no trace in the namespace."""

    def __init__(self, option_strings: list[str], dest: str, options: PlanOptions, **kwargs: Any) -> None:
        self.options = options
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string == "--plan":
            self.options.asked = True
        else:
            self.options.card_gib = values[0]


def print_plan(card: int | None, config: Any, policy: PolicyModule, data: RolloutDataModule) -> None:
    """Prints the plan of a run that has not begun.

    Args:
        card: Bytes of the card that is given; None for this machine's.
        config: Settings as parsed.
        policy: The policy, without a model.
        data: The data module.

    Raises:
        SettingError: The run cannot fit, or would be refused for another reason.
    """
    run = read_settings(config, policy, data, card is not None)
    if card is None:
        card, name = _card_here(run)
        run = replace(run, card_name=name)
    model = _model(policy, run)
    print(table(run, model, estimate(run, model, card), card))
    found = objection(run, model, card)
    if found is not None:
        raise SettingError(found)
    print("Verdict: " + _verdict(run, card))


def warn_of_memory(config: Any, policy: PolicyModule, data: RolloutDataModule, device: torch.device) -> None:
    """Logs one sentence if a run that begins on a GPU is not expected to fit. The estimate stops nothing."""
    if device.type != "cuda":
        return
    try:
        card = torch.cuda.get_device_properties(device)
        run = replace(read_settings(config, policy, data, for_card=True), card_name=card.name)
        found = objection(run, _model(policy, run), card.total_memory)
    except Exception as error:  # a failed plan must not end a run that works
        log.debug("no plan: %s", error)
        return
    if found is not None:
        log.warning("by an estimate, which may err, %s", found)


def _model(policy: PolicyModule, run: RunSettings) -> Model:
    config = _model_config(policy)
    check_positions(config, run.prompt_tokens, run.engine_tokens)
    name = policy.path or type(policy.warm_start).__name__
    return Model(config, name, run.freeze_vision, run.lora)


def _model_config(policy: PolicyModule) -> Any:
    """The transformers configuration of a policy, from its recipe, its folder, the hub's cache or the hub.

    Raises:
        SettingError: There is no configuration, or transformers cannot read it.
    """
    from transformers import AutoConfig

    if policy.warm_start is not None:
        return policy.warm_start.config()
    folder = Path(policy.folder)
    if folder.is_dir():
        if not (folder / CONFIG).exists():
            raise SettingError(f"model.path is '{folder}', a folder without {CONFIG}; the plan needs that file alone")
    else:
        folder = _from_hub(str(policy.folder)).parent
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged file may raise any exception
        raise SettingError(
            f"model.path is '{policy.path}', whose {CONFIG} transformers does not read: {reason(error)}"
        ) from error


def _from_hub(name: str) -> Path:
    """Path of a hub id's config.json: the cached one if there is one, else the hub's, which is asked once."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, CONFIG)
        if isinstance(cached, str):
            return Path(cached)
        # asked once, before the download, which would retry
        get_hf_file_metadata(hf_hub_url(name, CONFIG), timeout=SECONDS)
        return Path(hf_hub_download(name, CONFIG, etag_timeout=SECONDS))
    except Exception as error:  # no such name, no access, no network, or told to stay offline
        raise SettingError(
            f"model.path is '{name}', no folder here, and its {CONFIG}, which is all that the plan needs, is neither "
            f"cached nor to be had from the hub ({reason(error, 120)}); run once with a network, or set model.path to "
            f"a folder with {CONFIG}"
        ) from error


def _card_here(run: RunSettings) -> tuple[int | None, str]:
    """Bytes and name of this machine's smallest GPU; None and "" if there is none or the run uses none."""
    count = torch.cuda.device_count() if run.on_gpu else 0
    cards = [torch.cuda.get_device_properties(place) for place in range(count)]
    return min(((card.total_memory, card.name) for card in cards), default=(None, ""))


def _verdict(run: RunSettings, card: int | None) -> str:
    if card is not None:
        return f"it fits a card of {card / GIB:.4g} GiB, as far as an estimate can say"
    if run.on_gpu:
        return "nothing was compared, since no GPU is here; --card_gib 80 compares with one of 80 GiB"
    return "nothing was compared, since trainer.accelerator is cpu"
