"""Who counts what users spend: the gateway by its own prices, or a LiteLLM proxy."""
