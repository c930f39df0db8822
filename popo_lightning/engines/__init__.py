"""Who samples responses: vLLM in the process, vLLM servers, or plain transformers."""
