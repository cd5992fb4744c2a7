"""An object store for the tests that let one fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.object_store_helpers import Stores, open_stores


@pytest.fixture(scope="module")
def opened() -> Iterator[Stores]:
    with open_stores() as stores:
        yield stores


@pytest.fixture
def stores(opened: Stores) -> Stores:
    opened.proxy.set(lambda request: "pass")
    return opened
