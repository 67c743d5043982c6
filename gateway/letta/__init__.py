"""Everything that speaks to Letta, and the only place that does."""
