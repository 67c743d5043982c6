"""Pure translation between OpenAI's API and what an agent says: no I/O, no clock, no randomness."""
