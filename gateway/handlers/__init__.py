"""HTTP in, HTTP out: one file per family of endpoints."""
