"""LoRA by peft: frozen weights, with two small trained matrices beside each frozen matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from popo_lightning.core.bounds import above, at_least
from popo_lightning.core.errors import SettingError
from popo_lightning.model.adapter_rank import check_rank, warn_of_rank
from popo_lightning.model.fingerprint import fingerprint

ALL = "all-linear"
ADAPTER = "default"  # peft's name of a model's only adapter
OUTPUT, INPUT = f".lora_B.{ADAPTER}.weight", f".lora_A.{ADAPTER}.weight"
DESCRIBED = ("r", "alpha", "rank_stabilized", "four_bit")  # settings that a checkpoint records
BASE = ".base_layer"  # suffix of a frozen layer's name, if it has an adapter


@dataclass(frozen=True)
class Lora:
    """Trains low-rank adapters beside frozen weights (LoRA, 2106.09685), by peft.

    A matrix W computes W x + s B (A x), with s = alpha / r. A (r x in) starts at random, by the run's seed, and B
    (out x r) at 0, so training begins at the model itself. Both are float32; model.dtype is the frozen weights' type.
    There is no dropout: with it the ratio would differ from 1 on unchanged weights.

    Args:
        r: Rank of the adapters.
        alpha: Scale of the adapters, times r.
        target_modules: Linear layers with adapters, by the end of their names as in peft, such as [q_proj, v_proj];
            all-linear takes all but the output head and a frozen vision tower.
        rank_stabilized: Scale by alpha / sqrt(r) instead (rsLoRA, 2312.03732).
        four_bit: Hold the frozen matrices in 4 bits (NF4, QLoRA, 2305.14314); needs bitsandbytes.
    """

    r: int = 16
    alpha: float = 32.0
    target_modules: list[str] | str = ALL
    rank_stabilized: bool = False
    four_bit: bool = False

    def __post_init__(self) -> None:
        at_least("model.lora.r", self.r, 1, ", a rank such as 16")
        above("model.lora.alpha", self.alpha, 0, f"{2 * self.r}")
        if isinstance(self.target_modules, str) and self.target_modules != ALL:
            raise SettingError(
                f"model.lora.target_modules is '{self.target_modules}'; use {ALL}, or a list of names such as "
                "[q_proj, v_proj]"
            )
        if not self.target_modules:
            raise SettingError(f"model.lora.target_modules is empty, so nothing would be trained; use {ALL}")
        if self.four_bit and find_spec("bitsandbytes") is None:
            raise SettingError(
                "model.lora.four_bit is true, but bitsandbytes is not installed; pip install bitsandbytes, or leave it "
                "out and set model.dtype to bfloat16"
            )

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)

    def config(self, targets: list[str]) -> Any:
        """Returns peft's configuration.

        Args:
            targets: Names of the layers, or ends of their names.
        """
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a number, as peft's own code takes it
            target_modules=targets,
            use_rslora=self.rank_stabilized,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )


@dataclass(frozen=True)
class Adapted:
    """Description of a model with adapters, stored as the model's `adapted`.

    Args:
        lora: Settings of the adapters.
        targets: Full names of the layers with an adapter.
        base: Fingerprint of the frozen weights as loaded.
    """

    lora: Lora
    targets: list[str]
    base: str

    def described(self) -> dict[str, Any]:
        """Returns the description in plain containers, for a checkpoint."""
        settings = {name: getattr(self.lora, name) for name in DESCRIBED}
        return settings | {"targets": list(self.targets), "base": self.base}


def check_split(lora: Lora | None, split: bool) -> None:
    """Raises SettingError for 4-bit matrices that a strategy would shard over the ranks."""
    if lora is not None and lora.four_bit and split:
        raise SettingError(
            "model.lora.four_bit is true, but trainer.strategy ModelParallelStrategy splits weights, which those of 4 "
            "bits cannot be; use trainer.strategy ddp, or set model.lora.four_bit to false and model.dtype to bfloat16"
        )


def adapt(model: Any, lora: Lora, folder: str | Path, freeze_vision: bool, tower: nn.Module | None) -> Any:
    """Freezes a model and gives it adapters, in place.

    Args:
        model: A loaded transformers model, not sharded.
        lora: Settings of the adapters.
        folder: Model folder, for error messages.
        freeze_vision: Whether the vision tower gets no adapters.
        tower: The vision tower, if there is one.

    Raises:
        SettingError: The settings name layers that cannot have adapters.
    """
    kept = {id(module) for module in tower.modules()} if tower is not None and freeze_vision else set()
    targets = target_layers(model, lora, folder, kept)
    warn_of_rank(model, targets, lora.r)
    made = Adapted(lora, targets, fingerprint(model.named_parameters()))
    if lora.four_bit:
        from popo_lightning.model.four_bit import quantize

        quantize(model)
    return inject(model, made)


def inject(model: Any, adapted: Adapted) -> Any:
    """Adds adapters to layers of a model, and freezes its other weights.

    Args:
        model: A transformers model, which may be on the meta device.
        adapted: Description of the adapters and their layers.
    """
    from peft import inject_adapter_in_model

    model.requires_grad_(False)
    # The run's seed decides A; the process's random state does not change.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(torch.initial_seed())
        inject_adapter_in_model(adapted.lora.config(list(adapted.targets)), model, ADAPTER)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()  # bfloat16 would round small steps away
    model.adapted = adapted
    return model


def target_layers(model: Any, lora: Lora, folder: str | Path, kept: set[int]) -> list[str]:
    """Returns the full names of the layers that get an adapter, for a rank that they can have.

    Args:
        model: A transformers model.
        lora: Settings of the adapters.
        folder: Model folder, for error messages.
        kept: Ids of modules that get no adapter.

    Raises:
        SettingError: The settings name layers that cannot have adapters, or a rank above that of every layer.
    """
    targets = _named_layers(model, lora, folder, kept)
    check_rank(model, targets, lora.r)
    return targets


def _named_layers(model: Any, lora: Lora, folder: str | Path, kept: set[int]) -> list[str]:
    head = model.get_output_embeddings()
    if lora.target_modules == ALL:
        return [
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear and module is not head and id(module) not in kept
        ]
    found: dict[str, nn.Module] = {}
    for wanted in lora.target_modules:
        named = {n: m for n, m in model.named_modules() if n == wanted or n.endswith(f".{wanted}")}
        if not named:
            ends = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is nn.Linear})
            raise SettingError(
                f"model.lora.target_modules has '{wanted}', which no layer of model.path '{folder}' is called; its "
                f"linear layers are {', '.join(ends)}"
            )
        found |= named
    for name, module in found.items():
        if module is head or type(module) is not nn.Linear:
            what = "the output head" if module is head else f"a {type(module).__name__}"
            raise SettingError(
                f"model.lora.target_modules names {name} of model.path '{folder}', {what}; only linear layers other "
                "than the output head get adapters, so name others, such as q_proj"
            )
        if id(module) in kept:
            raise SettingError(
                f"model.lora.target_modules names {name}, a part of the vision tower, but model.freeze_vision is true; "
                "name other layers, or set it to false"
            )
    return [name for name, _ in model.named_modules() if name in found]


def is_adapter(name: str) -> bool:
    """Returns whether a parameter's name is an adapter's."""
    return name.endswith((OUTPUT, INPUT))


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the adapters' parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Context in which a model computes without its adapters. For passes without gradient."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    # peft's enable_adapters would also freeze and unfreeze the adapters, which a strategy may have wrapped.
    for layer in layers:
        layer._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False  # type: ignore[assignment]


def take_inputs_as_they_are(model: nn.Module) -> None:
    """Lets autocast cast the adapters' inputs. Otherwise each adapter would keep its own copy for its gradient."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


def keep_adapters_only(module: L.LightningModule, also: Callable[[], set[str]] = set) -> None:
    """Leaves frozen weights out of a module's state_dict, and allows loading without them.

    Args:
        module: Module that holds a model with adapters. Trained weights of its other parts are saved, too.
        also: Returns the names of tensors that are saved without being trained.
    """

    def trained() -> set[str]:
        return {name for name, parameter in module.named_parameters() if parameter.requires_grad} | also()

    def drop(own: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        kept = trained()
        # Names to keep decide, not names of frozen weights, because 4-bit weights have further tensors.
        for name in [each for each in state if each.removeprefix(prefix) not in kept]:
            del state[name]

    def excuse(own: nn.Module, incompatible: Any) -> None:
        needed = trained()
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name in needed]

    module.strict_loading = module.device_mesh is None  # FSDP2 would also require frozen weights in a whole file
    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_post_hook(excuse)


def compact(targets: Iterable[str], names: Iterable[str]) -> list[str]:
    """Shortens layer names to their last parts, if those mean the same layers; otherwise returns the full names.

    Args:
        targets: Full names of the layers.
        names: Names of all modules of the model.
    """
    chosen = list(targets)
    ends = {name.rpartition(".")[2] for name in chosen}
    others = {name.rpartition(".")[2] for name in set(names) - set(chosen)}
    return sorted(chosen) if ends & others else sorted(ends)
