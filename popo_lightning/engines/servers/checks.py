"""Checks that a vLLM server can take the policy's weights and samples as requested."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from packaging.version import InvalidVersion, Version

from popo_lightning.core.errors import SettingError
from popo_lightning.engines.base import EngineContext
from popo_lightning.engines.servers.client import RequestRefusedError, Server, ServerFailedError

OLDEST_VLLM = 0, 32  # the first version whose answers say which weights sampled a token

log = logging.getLogger(__name__)


def call(server: Server, method: str, arguments: dict[str, str], seconds: float) -> list[dict[str, Any]]:
    """Calls a method of PolicyWorker on a server, and returns the result of each of its workers."""
    answer = server.ask("POST", "/collective_rpc", {"method": method, "kwargs": arguments}, seconds)
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list) or not results or not all(isinstance(result, dict) for result in results):
        raise RuntimeError(f"{server.url} answers {method} with {str(answer)[:200]}; start it with scripts/serve.sh")
    return results


def check_version(server: Server) -> None:
    """Raises SettingError for a vLLM that is known to be too old; some builds do not report their version."""
    try:
        said = server.ask("GET", "/version")
        version = Version(str(said["version"]))
    except (ServerFailedError, RequestRefusedError, InvalidVersion, KeyError, TypeError):
        return
    if version.release < OLDEST_VLLM and not version.is_devrelease:
        raise SettingError(
            f"{server.url} of data.engine.urls runs vLLM {version}, whose answers do not say which weights sampled "
            f"them; start it with vLLM {'.'.join(map(str, OLDEST_VLLM))} or later"
        )


def check(server: Server, context: EngineContext) -> None:
    """Raises SettingError for a server without a PolicyWorker, or one that does not sample as the policy assumes."""
    try:
        found = call(server, "describe_policy_server", {}, 60.0)[0]
    except (ServerFailedError, RequestRefusedError, RuntimeError) as error:
        raise SettingError(
            f"{server.url} of data.engine.urls cannot take a policy's weights ({str(error)[:300]}); start it with "
            "scripts/serve.sh"
        ) from error
    wanted = {
        "dtype": str(context.dtype).removeprefix("torch."),
        "logprobs_mode": "processed_logprobs",  # log-probs of the distribution that is sampled from
        "generation_config": "vllm",  # the model's own top_p, top_k and penalties must not leak in
    }
    for name, value in wanted.items():
        if found.get(name) != value:
            raise SettingError(
                f"{server.url} of data.engine.urls has {name} {str(found.get(name))[:50]}, but this run needs {value}; "
                "start it as scripts/serve.sh does"
            )
    length = found.get("max_model_len")
    if type(length) is not int or length < context.max_tokens:
        raise SettingError(
            f"{server.url} of data.engine.urls takes {str(length)[:20]} tokens (--max-model-len), but prompt and "
            f"response may have {context.max_tokens}; start it with more, or lower data.max_prompt_tokens, "
            "data.max_new_tokens or an evaluation's"
        )


def warn_of_open(servers: Sequence[Server]) -> None:
    """Warns of servers that can be reached from everywhere."""
    for server in servers:
        if not server.is_private:
            log.warning(
                "%s is no private address: anybody who reaches the development endpoints of a vLLM server can "
                "change its weights, because they have no password",
                server.url,
            )
