"""HTTP routes, laid over vLLM's own."""
