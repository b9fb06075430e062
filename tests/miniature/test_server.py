import http.client
import threading

import pytest

from vc2.miniature.server import serve
from vc2.miniature.world import World


@pytest.fixture
def urls(small_world: World) -> dict[str | None, str]:
    """A URL path of each planted kind."""
    lines = {line["defect"]: "/" + line["key"].rsplit("/", 1)[1] for line in small_world.truth("laion")}
    return lines


def test_bodies_come_whole_and_by_any_host_name(small_world: World, urls: dict) -> None:
    with serve(small_world.root) as address:
        status, kind, body = _get(address, urls[None], host="images.miniature.test")
    assert (status, kind) == (200, "image/jpeg")
    assert body == (small_world.laion / "www" / urls[None][1:]).read_bytes()


def test_videos_are_served_too(small_world: World) -> None:
    line = next(line for line in small_world.truth("webvid") if line["defect"] is None)
    with serve(small_world.root) as address:
        status, kind, body = _get(address, f"/videos/{line['key']}.mp4")
    assert (status, kind) == (200, "video/mp4") and body[4:8] == b"ftyp"


def test_planted_faults_are_answered_as_faults(small_world: World, urls: dict) -> None:
    with serve(small_world.root) as address:
        assert _get(address, urls["not_found"])[0] == 404
        assert [_get(address, urls["busy"])[0] for _ in range(3)] == [503] * 3
        status, kind, body = _get(address, urls["html"])
        assert (status, kind) == (200, "image/jpeg") and body.startswith(b"<!DOCTYPE html>")
        with pytest.raises(http.client.IncompleteRead):
            _get(address, urls["truncated"])
        with pytest.raises(TimeoutError):
            _get(address, urls["hang"], timeout=0.3)


@pytest.mark.parametrize(
    "path", ["/../world.json", "/videos/../../truth.jsonl", "/", "/answers.json", "/%2e%2e/world.json"]
)
def test_nothing_but_media_is_served(small_world: World, path: str) -> None:
    with serve(small_world.root) as address:
        assert _get(address, path)[0] == 404


def test_one_connection_serves_many_requests(small_world: World, urls: dict) -> None:
    with serve(small_world.root) as address:
        connection = http.client.HTTPConnection(address, timeout=10)
        for path in (urls[None], urls["not_found"], urls[None]):
            connection.request("GET", path)
            connection.getresponse().read()
        connection.close()


def test_the_server_ends_while_an_answer_hangs_and_leaves_no_thread(small_world: World, urls: dict) -> None:
    before = threading.active_count()
    with serve(small_world.root, hang_seconds=600) as address:
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("GET", urls["hang"])
        idle = http.client.HTTPConnection(address, timeout=60)
        idle.connect()
    with pytest.raises((OSError, http.client.HTTPException)):
        connection.getresponse().read()
        _get(address, urls[None])
    connection.close()
    idle.close()
    assert threading.active_count() <= before + 2  # handlers are done with their sockets and may be returning


def _get(address: str, path: str, host: str | None = None, timeout: float = 10) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request("GET", path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()
    finally:
        connection.close()
