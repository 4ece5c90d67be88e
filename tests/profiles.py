"""How many examples a property test tries: 10 while developing, 100 in CI, 2,000 at night.

Choose with HYPOTHESIS_PROFILE=ci or `pytest --hypothesis-profile=ci`. A test whose examples are dear asks for a share
of them: `@settings(max_examples=scaled(0.25))`.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

EXAMPLES = {"dev": 10, "ci": 100, "nightly": 2000}


def register() -> None:
    for name, examples in EXAMPLES.items():
        settings.register_profile(
            name,
            max_examples=examples,
            deadline=None,
            derandomize=name == "ci",  # the same examples for everybody who looks at a failure
            print_blob=True,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def scaled(share: float) -> int:
    """Return this share of the profile's examples, two at least."""
    profile = settings.get_profile(settings.get_current_profile_name())
    return max(2, round(profile.max_examples * share))
