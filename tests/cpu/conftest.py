"""These tests need the extra `cpu` and a processor with AVX2."""

from __future__ import annotations

import pytest

from pyggml import backends


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if backends.on_host() != "cpu":
        for item in items:
            if item.path.parent.name == "cpu":
                item.add_marker(pytest.mark.skip(reason="needs the extra 'cpu' and AVX2"))
