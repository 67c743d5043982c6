"""How property tests run: the same examples every time; HYPOTHESIS_PROFILE=explore looks further, at random."""

import os

from hypothesis import settings

settings.register_profile("gateway", max_examples=60, deadline=None, database=None, derandomize=True)
settings.register_profile("explore", max_examples=2_000, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gateway"))
