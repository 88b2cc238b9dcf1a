"""Benchmarks, one JSON line a measurement: `python -m jaxreason.bench sampler
--config=...`. Tests never depend on speed.
"""
