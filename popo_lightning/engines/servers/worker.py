"""Runs inside a vLLM server's workers, where scripts/serve.sh puts it: takes the policy's weights from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from popo_lightning.engines.vllm.reload import name_loaders, repack, stale_layers


class PolicyWorker:
    """Worker extension of a server (``--worker-extension-cls``), which vLLM mixes into its worker class.

    Nothing here raises: vLLM 0.32 ends a server whose worker raises inside a call of /collective_rpc.
    """

    model_runner: Any
    reload_weights: Any
    vllm_config: Any

    def describe_policy_server(self) -> dict[str, Any]:
        """Says how this server samples, for the trainer to check."""
        model = self.vllm_config.model_config
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
            "generation_config": model.generation_config,
            "vocab_size": model.get_vocab_size(),
        }

    def load_policy(self, folder: str) -> dict[str, Any]:
        """Replaces all weights, and renews what vLLM derives from them.

        Args:
            folder: Folder of safetensors files, which hold no code.

        Returns:
            "files", the number of files read, or "error", the reason why the weights must not be used.
        """
        files = list(Path(folder).glob("*.safetensors"))
        if not files:
            return {"error": f"no *.safetensors in {folder} as this server sees it"}
        try:
            model = self.model_runner.get_model()
            name_loaders(model.modules())
            if stale := stale_layers(lambda: self.reload_weights(weights_path=folder), model.modules):
                return {
                    "error": f"vLLM reloads no weights into {', '.join(stale)}, so this model cannot be trained with it"
                }
            repack(model)
        except Exception as error:  # weights of a wrong model may raise anything
            return {"error": f"{type(error).__name__}: {error}"[:500]}
        return {"files": len(files)}
