"""What vLLM leaves in transformers' classes, and what its reload does not restore. vLLM itself is not started."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import attached, random_model
from helpers.vllm import Recorder, llm, started
from torch import nn

from popo_lightning.core.errors import SettingError
from popo_lightning.engines.servers.worker import PolicyWorker
from popo_lightning.engines.vllm import engine as vllm_module
from popo_lightning.engines.vllm.classes import ClassesBefore
from popo_lightning.engines.vllm.reload import RELOAD, name_loaders, repack, stale_layers
from popo_lightning.policy import PolicyModule

__all__ = ["llm"]


class Compiled:
    """A class that vLLM adds to the bases of another class."""

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return "compiled"


def decorate(kind: Any) -> None:
    """Changes a class in place as vLLM's support_torch_compile does."""
    first = kind.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        first(self, *args, **kwargs)
        self.do_not_compile = True

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return "eager" if self.do_not_compile else Compiled.__call__(self)

    kind.__bases__ = (*kind.__bases__, Compiled)
    kind._ignore_compile, kind.__init__, kind.__call__ = False, __init__, __call__


def test_classes_are_put_back_and_vllms_models_keep_theirs(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel, MistralModel

    policy: Any = attached(PolicyModule(path=str(random_model("llama-tied", tmp_path))))
    ids, expected = torch.tensor([[3, 4]]), (LlamaModel.__bases__, dict(vars(LlamaModel)), dict(vars(MistralModel)))
    before = ClassesBefore()
    decorate(LlamaModel)
    with pytest.raises(AttributeError, match="do_not_compile"):  # the trainer's model fails without what follows
        policy.model(input_ids=ids)
    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    theirs = LlamaModel(LlamaConfig(vocab_size=9, **settings))
    before.put_back(nn.ModuleList([theirs]).modules())
    assert (LlamaModel.__bases__, dict(vars(LlamaModel)), dict(vars(MistralModel))) == expected
    assert policy.model(input_ids=ids).logits.shape[1] == 2
    assert (
        theirs(ids) == "eager" and isinstance(theirs, LlamaModel | Compiled) and type(theirs).__name__ == "LlamaModel"
    )
    theirs.do_not_compile = False
    assert theirs(ids) == "compiled"
    assert not hasattr(LlamaModel(LlamaConfig(vocab_size=9, **settings)), "do_not_compile")


@pytest.mark.parametrize("fails", [False, True])
def test_the_engine_puts_them_back(fails: bool, llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaModel

    expected = dict(vars(LlamaModel))

    def start() -> None:
        decorate(LlamaModel)
        if fails:
            raise NotImplementedError("no such attention")

    llm.during_start = start
    monkeypatch.setattr(llm, "apply_model", lambda function: [function(nn.ModuleList())], raising=False)
    monkeypatch.setattr(vllm_module, "end_token_ids", lambda folder, tokenizer: [1])
    if fails:
        sentence = r"model\.path is 'no folder', a model, with which vLLM does not start \(NotImplementedError: no such"
        with pytest.raises(SettingError, match=sentence):
            started("cpu")
    else:
        started("cpu")
    assert dict(vars(LlamaModel)) == expected


# -- reloading -------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.ones(2))


class Rotary(nn.Module):
    """Has a buffer and no parameter to load."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.ones(2))


class Head(nn.Module):
    """Shares its weight with another module."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def model() -> nn.Module:
    embedding = nn.Embedding(3, 2)
    return nn.ModuleList([embedding, Head(embedding.weight), Rotary(), Experts()])


def says(*kinds: str) -> Any:
    def reload() -> None:
        for kind in kinds:
            logging.getLogger(RELOAD).warning("%s: Failed to load weights", kind)
        logging.getLogger(RELOAD).warning("Allocating %.1f MB of device memory", 3.0)

    return reload


def test_layers_that_keep_old_weights_are_named(caplog: pytest.LogCaptureFixture) -> None:
    made = model()
    logging.getLogger("vllm").setLevel(logging.ERROR)  # as VLLM_LOGGING_LEVEL does
    assert stale_layers(says("Head", "Rotary"), made.modules) == []
    assert stale_layers(says("Experts", "Head", "Experts"), made.modules) == ["Experts"]
    assert stale_layers(says(), made.modules) == []
    log = logging.getLogger(RELOAD)
    assert (log.handlers, log.level, log.propagate) == ([], logging.NOTSET, True)
    assert not caplog.records


def test_the_engine_and_a_server_refuse_them(llm: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vllm_module, "end_token_ids", lambda folder, tokenizer: [1])
    monkeypatch.setattr(llm, "apply_model", lambda function: [function(model())], raising=False)
    monkeypatch.setattr(llm, "collective_rpc", lambda method, kwargs: says("Experts")(), raising=False)
    with pytest.raises(SettingError, match="a model, of which vLLM reloads no weights into Experts"):
        started("cpu").update_weights([], 1)
    worker: Any = PolicyWorker()
    worker.model_runner = SimpleNamespace(get_model=model)
    worker.reload_weights = lambda weights_path: says("Experts")()
    (tmp_path / "weights.safetensors").touch()
    assert "reloads no weights into Experts" in worker.load_policy(str(tmp_path))["error"]


def test_loaders_without_a_name_are_given_one(llm: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The norms of MiniMax-M2 have such loaders, and vLLM's reload asks each loader for its name."""

    def load(weight: Any, loaded: Any) -> None:
        pass

    def named() -> nn.Module:
        made: Any = Experts()
        made.w13_weight.weight_loader = partial(load, loaded=None)
        return nn.ModuleList([made])

    def reload(model: Any) -> None:
        names.append(model[0].w13_weight.weight_loader.__name__)

    names: list[str] = []
    made = named()
    for _ in range(2):
        name_loaders(made.modules())
        reload(made)
    engine_model, server_model = named(), named()
    monkeypatch.setattr(vllm_module, "end_token_ids", lambda folder, tokenizer: [1])
    monkeypatch.setattr(llm, "apply_model", lambda function: [function(engine_model)], raising=False)
    monkeypatch.setattr(llm, "collective_rpc", lambda method, kwargs: reload(engine_model), raising=False)
    started("cpu").update_weights([], 1)
    worker: Any = PolicyWorker()
    worker.model_runner = SimpleNamespace(get_model=lambda: server_model)
    worker.reload_weights = lambda weights_path: reload(server_model)
    (tmp_path / "weights.safetensors").touch()
    assert worker.load_policy(str(tmp_path)) == {"files": 1}
    assert names == ["load"] * 4


def test_a_model_that_vllm_loads_only_once_is_refused(llm: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Any:
        def reload(method: str, kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(llm, "collective_rpc", reload, raising=False)
        return started("cpu")

    monkeypatch.setattr(vllm_module, "end_token_ids", lambda folder, tokenizer: [1])
    sentence = r"a model, whose weights vLLM loads once and not again \(KeyError: KeyError 'layers.0'\); choose another"
    with pytest.raises(SettingError, match=sentence):
        fail(KeyError("layers.0")).update_weights([], 1)
    for error in (RuntimeError("a rank is gone"), torch.OutOfMemoryError("no memory")):
        with pytest.raises(type(error), match=str(error)):
            fail(error).update_weights([], 1)


def test_experts_and_tied_heads_are_packed_again() -> None:
    packed: list[str] = []

    class UnquantizedFusedMoEMethod:
        moe_kernel: Any = SimpleNamespace(
            fused_experts=SimpleNamespace(process_weights_after_loading=lambda layer: packed.append("experts"))
        )

    class ParallelLMHead(Head):
        cpu_linear = True
        quant_method: Any = SimpleNamespace(process_weights_after_loading=lambda layer: packed.append("head"))

    experts: Any = Experts()
    experts.quant_method = UnquantizedFusedMoEMethod()
    repack(nn.ModuleList([experts, ParallelLMHead(nn.Parameter(torch.ones(1))), Rotary()]))
    assert packed == ["experts", "head"]
    packed.clear()
    repack(nn.ModuleList([experts.to("meta")]))  # not on a CPU, so nothing is packed
    assert packed == []
