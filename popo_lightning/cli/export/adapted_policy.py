"""A policy from a checkpoint that holds only adapters: beside the weights of its run's model, or added to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from popo_lightning.cli.export.base_model import BaseModel, weights_folder
from popo_lightning.cli.export.rebuilt_model import rebuilt
from popo_lightning.cli.export.saved_policy import SavedPolicy
from popo_lightning.cli.export.weights import weights_of
from popo_lightning.model.loading import load_model, load_trainable
from popo_lightning.model.lora import ADAPTER, Lora, adapt, adapters, compact, is_adapter
from popo_lightning.model.policy_checkpoint import LORA, check_lora
from popo_lightning.model.saved_weights import in_four_bits, merged_weight, whole_weight
from popo_lightning.runs.checksums import damaged

PEFT = "base_model.model."  # prefix of the names in an adapter's file


def has_adapters(saved: SavedPolicy) -> bool:
    """Whether a checkpoint holds only adapters."""
    return saved.state.get(LORA) is not None


def policy_model(saved: SavedPolicy, began: BaseModel, dtype: torch.dtype | None = None) -> Any:
    """The policy as a plain transformers model: the checkpoint's weights, or its adapters added to the base.

    Args:
        saved: The checkpoint.
        began: Model that the run began with.
        dtype: dtype of the matrices that adapters are added to; None keeps the run's.

    Raises:
        SettingError: The weights are another model's.
    """
    if not has_adapters(saved):
        return rebuilt(began.config(), weights_of(saved))
    model = adapted_model(saved, began)
    kept = dtype or model.dtype
    for name in model.adapted.targets:
        layer = model.get_submodule(name)
        factors = (layer.lora_B[ADAPTER].weight.detach(), layer.lora_A[ADAPTER].weight.detach())
        weight = merged_weight(layer.base_layer.weight, *factors, model.adapted.lora.scale)
        _put_whole(model, name, layer.base_layer, weight.to(kept))
    for name, layer in list(model.named_modules()):  # those that have no adapter
        if in_four_bits(getattr(layer, "weight", None)):
            _put_whole(model, name, layer, whole_weight(layer.weight).to(kept))
    vars(model).pop("is_loaded_in_4bit", None)
    del model.adapted
    return model.eval()


def _put_whole(model: Any, name: str, base: Any, weight: Tensor) -> None:
    """A plain linear layer with a weight in place of a layer, with the bias of that or of its base."""
    whole = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    whole.bias = base.bias
    place, _, own = name.rpartition(".")
    setattr(model.get_submodule(place), own, whole)


def adapted_model(saved: SavedPolicy, began: BaseModel, module: Any = None) -> Any:
    """The weights that a run began with, and a checkpoint's adapters beside them.

    Args:
        saved: The checkpoint.
        began: Model that the run began with.
        module: PolicyModule whose settings replace the run's.

    Raises:
        SettingError: Weights and adapters do not belong together.
    """
    noted = saved.state[LORA]
    folder = weights_folder(began)
    if module is None:
        lora = Lora(noted["r"], noted["alpha"], list(noted["targets"]), noted["rank_stabilized"], noted["four_bit"])
        whole = load_model(folder, getattr(torch, saved.setting("model.dtype", "float32")))
        model = adapt(whole, lora, folder, False, None)
    else:
        model = load_trainable(folder, module.weight_dtype, module.freeze_vision, module.attention, module.lora)
    check_lora(model.adapted.described(), noted, began.address)
    found, own = weights_of(saved), adapters(model)
    if odd := sorted(own.keys() ^ found.keys()):
        raise damaged(saved.checkpoint, f"{odd[0]} has no match")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])
    return model.to("cpu")  # the move also makes matrices of 4 bits


def write_adapter(model: Any, folder: Path, base: str) -> None:
    """Writes adapters in peft's format: adapter_config.json and adapter_model.safetensors.

    Args:
        model: Model from :func:`adapted_model`.
        folder: Existing folder.
        base: Name of the model that the adapters belong to.
    """
    named = {f"{PEFT}{n.replace(f'.{ADAPTER}.', '.')}": p.detach().contiguous() for n, p in adapters(model).items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_adapter(f"{name}.weight")
    ]
    config = model.adapted.lora.config(compact(model.adapted.targets, linear))
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
