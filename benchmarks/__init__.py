"""Measurements of a running server; `docs/benchmarks.md` has the figures."""
