"""Settings that are changed while the gateway serves: what holds now, and where the changes are stored."""
