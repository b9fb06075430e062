"""What our server is told, and how its processes are told from others."""

import os
from pathlib import Path

import psutil
import pytest

from flows.follow import Row, _Lines
from flows.server import Owned, Stack, StackError, environment, free_port, held_lock


def test_the_callers_own_prefect_stays_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Settings of another Prefect neither reach our server nor are reached by it."""
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("PREFECT_API_URL", "https://example.org/api")
    settings = environment(tmp_path, "store", 4711, tied=True)
    assert "PREFECT_API_KEY" not in settings
    assert settings["PREFECT_API_URL"] == "http://127.0.0.1:4711/api"
    assert settings["PREFECT_HOME"].startswith(str(tmp_path))
    assert settings["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert settings["DO_NOT_TRACK"] == "1"


def test_a_pid_that_was_used_again_is_not_ours() -> None:
    started = psutil.Process().create_time()
    assert Owned(os.getpid(), started).process() is not None
    assert Owned(os.getpid(), started - 100).process() is None


def test_a_lock_is_free_when_its_holder_is_done(tmp_path: Path) -> None:
    with held_lock(tmp_path):
        with pytest.raises(StackError, match=f"pid {os.getpid()}"), held_lock(tmp_path):
            pass
    with held_lock(tmp_path):
        pass


def test_nothing_is_recorded_where_nothing_ran(tmp_path: Path) -> None:
    assert Stack.recorded(tmp_path) is None


def test_a_server_that_does_not_answer_is_no_traceback(tmp_path: Path) -> None:
    stack = Stack(tmp_path, str(tmp_path / "store"), free_port())
    assert not stack.is_up()
    with pytest.raises(StackError, match="does not answer"):
        stack.api.get("/health")


def test_a_line_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal there is a line when a stage changes its state, not at every look."""
    show = _Lines()
    for state in ("waiting", "running", "running", "done"):
        show([Row("shard/webvid", state, seconds=3.0)], False)
    assert capsys.readouterr().err.splitlines() == ["shard/webvid: running", "shard/webvid: done in 3 s"]
