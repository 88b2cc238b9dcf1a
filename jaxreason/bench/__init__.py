"""Benchmarks that print one JSON line per measurement: `python -m jaxreason.bench
sampler --config=...`. No test depends on speed.
"""
