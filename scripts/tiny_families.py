"""Untrained models of every family, small enough for a CPU: scripts/families.py and the tests compare engines on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from popo_lightning.warm_start import SYMBOLS, symbol_tokenizer

WIDTH, HEADS, LAYERS = 64, 2, 2

# What most configurations have, under the names that some of them use.
SHARED: dict[str, Any] = {
    "hidden_size": WIDTH,
    "n_embd": WIDTH,
    "d_model": WIDTH,
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "ffn_dim": 96,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_attention_heads": HEADS,
    "n_head": HEADS,
    "n_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": WIDTH // HEADS,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "max_seq_len": 512,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "word_embed_proj_dim": WIDTH,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "state_size": 16,
    "num_mamba_heads": 4,
}


def text_config(kind: str, **settings: Any) -> Any:
    """A small configuration of a text family: what it has of SHARED, and what is set."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(kind)
    names = {*vars(default), *default.attribute_map}
    shared = {name: value for name, value in SHARED.items() if name in names}
    return AutoConfig.for_model(kind, **(shared | {"vocab_size": len(SYMBOLS)} | settings))


def peaked(model: Any, scale: float = 0.2) -> Any:
    """A model whose distributions are peaked, and in which no parameter is as it was made: nothing is left at 0 or 1."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name) + parameter.numel()))
            if parameter.ndim < 2:
                parameter += 0.1 * noise
            elif float(parameter.std()) < scale / 4:
                parameter.copy_(scale * noise)
    return model


def make(kind: str, folder: Path, **settings: Any) -> Path:
    """Saves an untrained text model of a family, with a tokenizer.

    Args:
        kind: transformers' model type.
        folder: Where to.
        settings: Of its configuration.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(text_config(kind, **settings), dtype=torch.float32)
    peaked(model).save_pretrained(folder)
    symbol_tokenizer(SYMBOLS).save_pretrained(folder)
    return folder
