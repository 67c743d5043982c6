"""The operator's page: its static files, and the handlers that they ask."""
