"""Everything that knows vLLM's engine: plug-in, worker, scheduler, attention backends."""
