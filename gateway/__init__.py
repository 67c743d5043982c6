"""Letta Gateway: Letta agents behind the OpenAI API, in one aiohttp process.

The way of one request::

    request -> the middleware chain (middleware/chain.py)
            -> handlers/chat_completions.py, responses.py     HTTP in, HTTP out
                 translation/request.py, responses_request.py OpenAI's request -> Ask                     pure
                 handlers/answering.py                        one answer for all that ask for it
                 conversations/attempts.py                    sent before: the same answer again
                 conversations/chats.py, plans.py             Ask -> AgentTurn, in which conversation
                 conversations/turns.py                       one turn at a time, cancelled or drained
                 letta/rest.py, app_server.py                 AgentTurn -> batches of AgentEvent          I/O
                 translation/answer_filters.py                what the request's options make of them     pure
                 translation/chat_stream.py, responses_stream.py   AgentEvent -> bytes                    pure
                 handlers/sse.py                              bytes -> socket, heartbeats, the end        I/O

What is to outlive the process is in ``storage/``. A line of code knows from its folder what it may touch; ``setup.cfg``
holds the import directions.
"""
