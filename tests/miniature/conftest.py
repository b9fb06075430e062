"""One small world for all tests of the miniature."""

import pytest

from vc2.miniature.config import WorldConfig
from vc2.miniature.world import World, make_world

SMALL = WorldConfig(num_videos=16, num_web_images=24, num_jdb_images=16, num_prompts=8)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(SMALL, tmp_path_factory.mktemp("miniature") / "world")
