"""What tests of flows share: a stack per file."""

from collections.abc import Iterator

import pytest

from tests.flows.stacks import Running, serving


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("flows-work")) as stack:
        yield stack
