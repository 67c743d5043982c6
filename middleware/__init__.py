"""The middleware chain: each file one plug-in by the contract in ``contract.py``, put in order by ``chain.py``."""
