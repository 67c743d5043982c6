"""The process around the handlers: composition, lifecycle, listening, the graceful end."""
