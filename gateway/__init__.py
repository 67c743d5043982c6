"""Letta Gateway: Letta agents behind the OpenAI API, in one aiohttp process.

The way of one request::

    request -> the middleware chain (middleware/chain.py)
            -> handlers/chat_completions.py      HTTP in, HTTP out
                 translation/request.py          OpenAI's request -> AgentTurn            pure
                 conversations/turns.py          one turn at a time, cancelled or drained
                 letta/rest.py                   AgentTurn -> batches of AgentEvent       I/O
                 translation/chat_stream.py      AgentEvent -> chunk bytes                pure
                 handlers/sse.py                 bytes -> socket, heartbeats, the end     I/O

A line of code knows from its folder what it may touch; ``setup.cfg`` holds the import directions.
"""
