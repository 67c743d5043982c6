"""Letta in Open WebUI: two files, each of which is copied alone to where it runs, and imports nothing of the gateway.

``pipeline.py`` goes into Open WebUI's Pipelines server, ``function.py`` into Open WebUI itself. What both need stands
in both, between the same two marks: it is written in ``pipeline.py``, and ``make open-webui-function`` copies it.
"""
