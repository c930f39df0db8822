"""Makes untrained models of every family, small enough for a CPU, for scripts/families.py and the tests."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from tiny_vision import picture, vision_model

from popo_lightning.core.problems import IMAGE_MARK, Problem
from popo_lightning.toys.countdown_policy import SYMBOLS, symbol_tokenizer

WIDTH, HEADS, LAYERS = 64, 2, 2

# Settings that most configurations have, under all names in use.
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
    """Small configuration of a text family: its settings among SHARED, and the given ones."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(kind)
    names = {*vars(default), *default.attribute_map}
    shared = {name: value for name, value in SHARED.items() if name in names}
    return AutoConfig.for_model(kind, **(shared | {"vocab_size": len(SYMBOLS)} | settings))


def peaked(model: Any, scale: float = 0.2) -> Any:
    """Changes a model so that its distributions are peaked and no parameter or router bias stays at 0 or 1."""
    saved = {name for name in model.state_dict() if name.endswith("bias")}
    biases = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
    with torch.no_grad():
        for name, parameter in sorted([*model.named_parameters(), *biases]):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name) + parameter.numel()))
            if parameter.ndim < 2:
                parameter += 0.1 * noise
            elif float(parameter.std()) < scale / 4:
                parameter.copy_(scale * noise)
    return model


def make(kind: str, folder: Path) -> Path:
    """Saves an untrained model of a family, with a tokenizer.

    Args:
        kind: Model type of transformers, from FAMILIES.
        folder: Folder of the model.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = symbol_tokenizer(SYMBOLS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if FAMILIES[kind][0] == VISION:
            model = vision_model(kind, folder, tokenizer, SHARED)
        else:
            model = AutoModelForCausalLM.from_config(text_config(kind, **FAMILIES[kind][1]), dtype=torch.float32)
    if model is not None:
        peaked(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if kind in ARCHITECTURES:
        written = folder / "config.json"
        written.write_text(json.dumps(json.loads(written.read_text()) | {"architectures": [ARCHITECTURES[kind]]}))
    return folder


MLA = {
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 64,
}
TWO_KINDS = {"layer_types": ["full_attention", "conv"]}
# The class name in published configurations; vLLM does not know the class of transformers.
ARCHITECTURES = {"phimoe": "PhiMoEForCausalLM"}
DENSE, EXPERTS, SCALED, WINDOW = "dense", "experts", "scaled logits", "sliding window"
HYBRID, STATES, BACKEND, VISION = "hybrid", "state space", "vLLM's transformers backend", "vision"

# For each model type of transformers: its kind, and the settings of its small configuration.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (DENSE, {}),
    "qwen2": (DENSE, {}),
    "qwen3": (DENSE, {}),
    "gemma": (DENSE, {}),
    "phi3": (DENSE, {}),
    "gpt2": (DENSE, {}),
    "opt": (DENSE, {}),
    "falcon": (DENSE, {"ffn_hidden_size": 4 * WIDTH}),
    "stablelm": (DENSE, {}),
    "nemotron": (DENSE, {}),
    "glm4": (DENSE, {}),
    "ernie4_5": (DENSE, {}),
    "apertus": (DENSE, {}),
    "minicpm3": (SCALED, MLA),
    "granite": (SCALED, {"logits_scaling": 4.0}),
    "cohere": (SCALED, {"logit_scale": 0.5}),
    "cohere2": (SCALED, {}),
    "hyperclovax": (SCALED, {"logits_scaling": 0.5}),
    "gemma2": (SCALED, {"final_logit_softcapping": 5.0}),
    "nanochat": (SCALED, {}),
    "mistral": (WINDOW, {"sliding_window": 8}),
    "gemma3_text": (WINDOW, {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "exaone4": (WINDOW, {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen3_moe": (EXPERTS, {}),
    "qwen2_moe": (EXPERTS, {}),
    "mixtral": (EXPERTS, {}),
    "olmoe": (EXPERTS, {}),
    "granitemoe": (EXPERTS, {"logits_scaling": 4.0}),
    "gpt_oss": (EXPERTS, {}),
    "glm4_moe": (EXPERTS, {"head_dim": WIDTH // HEADS}),
    "ernie4_5_moe": (EXPERTS, {}),
    "deepseek_v2": (EXPERTS, MLA),
    "deepseek_v3": (EXPERTS, {**MLA, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    "minimax_m2": (EXPERTS, {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True}),
    "phimoe": (EXPERTS, {"attention_bias": True, "lm_head_bias": True}),
    "falcon_h1": (HYBRID, {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "lm_head_multiplier": 0.5}),
    "granitemoehybrid": (HYBRID, {"layer_types": ["mamba", "attention"]}),
    "jamba": (HYBRID, {}),
    "nemotron_h": (HYBRID, {}),
    "lfm2": (HYBRID, TWO_KINDS | {"block_dim": WIDTH, "conv_dim": WIDTH}),
    "lfm2_moe": (HYBRID, TWO_KINDS | {"conv_dim": WIDTH}),
    "qwen3_next": (HYBRID, {"layer_types": ["linear_attention", "full_attention"]}),
    "qwen3_5_text": (HYBRID, {"layer_types": ["linear_attention", "full_attention"]}),
    "olmo_hybrid": (HYBRID, {}),
    "bamba": (HYBRID, {}),
    "mamba": (STATES, {}),
    "mamba2": (STATES, {"num_heads": 4, "head_dim": 32, "n_groups": 1}),
    "smollm3": (BACKEND, {}),
    "olmo2": (BACKEND, {}),
    "arcee": (BACKEND, {}),
    "seed_oss": (BACKEND, {}),
    "starcoder2": (BACKEND, {}),
    "gpt_neox": (BACKEND, {}),
    "phi": (BACKEND, {}),
    "hunyuan_v1_moe": (BACKEND, {}),
    "recurrent_gemma": (BACKEND, {}),
    "qwen2_vl": (VISION, {}),
    "qwen2_5_vl": (VISION, {}),
    "qwen3_vl": (VISION, {}),
    "gemma3": (VISION, {}),
    "llava": (VISION, {}),
}


def prompts(folder: Path) -> list[Problem]:
    """Short and long prompts, the longest beyond a block of vLLM's CPU cache; with images for models that take them."""
    draw = Random(3)
    texts = ["".join(draw.choice("0123456789+-*") for _ in range(length)) for length in (1, 5, 11, 150)]
    found = [Problem(str(place), text, None) for place, text in enumerate(texts)]
    if (folder / "preprocessor_config.json").exists() or (folder / "processor_config.json").exists():
        messages = [{"role": "user", "content": f"{IMAGE_MARK}3+4"}]
        found += [Problem(f"image {size}", messages, None, images=(picture(size),)) for size in (56, 84)]
    return found
