"""The measurements: a raw fake upstream, aiohttp's byte pass-through, the gateway and its peers, driven in one run.

`python -m tests.bench` prints a markdown table and writes the figures as JSON under `.cache/bench/`.
"""
