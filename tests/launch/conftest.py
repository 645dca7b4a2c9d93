"""One cache directory for all tests of the composition root."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fresh_cache import make_fresh_cache


@pytest.fixture(scope="package", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measure step times once for these tests, and leave the user's profiles alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", make_fresh_cache(tmp_path_factory.mktemp("cache")))
        yield
