"""Requests that come when they like: latency, goodput and throughput against offered load, of four ways to serve them.

`python -m benchmarks.serving` measures and writes JSON; see docs/serving.md.
"""
