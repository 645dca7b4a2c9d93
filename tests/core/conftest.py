"""How hard hypothesis tries: `ci` repeats itself, `--hypothesis-profile deep` searches."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

COMMON = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("ci", COMMON, derandomize=True, max_examples=250, stateful_step_count=50)
settings.register_profile("deep", COMMON, max_examples=3000, stateful_step_count=120)
settings.load_profile("ci")
