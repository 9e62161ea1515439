"""Trimtab: an OpenAI-compatible server around vLLM with attention calibration per request."""

__version__ = "0.1.0"
