"""Which conversation a request belongs to, and its turns: one at a time, cancelled or drained."""
