"""Ray in a process of its own: it does what it is asked, and whoever loses it hears so and lives on."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from vc2.errors import LaunchFailed, StoreError
from vc2.launch import PARENT
from vc2.ray_session import RAY_SESSION, HeldSession, ray_session

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


@pytest.fixture(scope="module")
def held() -> Iterator[HeldSession]:
    with ray_session(2) as held:
        yield held


def family_of(folder: str) -> dict[str, psutil.Process]:
    """The processes of a private session, by name."""
    found = {}
    for process in psutil.process_iter(["name"]):
        try:
            if process.environ().get(RAY_SESSION) == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.setdefault(process.info["name"], process)  # one that a raylet has just forked has its name too
        except psutil.Error:
            continue
    return found


def folder_of(held: HeldSession) -> str:
    return str(Path(held.environment["RAY_AUTH_TOKEN_PATH"]).parent)


def test_results_come_and_this_process_needs_no_ray(held: HeldSession) -> None:
    assert sorted(held.spread("math:factorial", [3, 5, 4])) == [6, 24, 120]
    assert held.is_alive()
    code = "import sys, vc2.data.prepare, vc2.ray_session; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_error_for_the_user_arrives_as_itself_and_a_defect_with_its_traceback(held: HeldSession) -> None:
    with pytest.raises(StoreError, match="ftp"):
        list(held.spread("vc2.storage:open_store", ["ftp://nowhere"]))
    with pytest.raises(RuntimeError, match="factorial\\(\\) not defined for negative values"):
        list(held.spread("math:factorial", [-1]))


def test_answers_that_nobody_waits_for_reach_nobody_else(held: HeldSession) -> None:
    """A loop that breaks off; the next question gets its own answers."""
    answers = held.spread("math:factorial", [0] * 8)
    assert next(answers) == 1
    del answers
    assert list(held.spread("math:factorial", [4])) == [24]


def test_the_session_that_is_held_is_the_one_that_is_used(held: HeldSession) -> None:
    """In this process, and by environment in those that it starts."""
    with ray_session() as same:
        assert same is held
    assert os.environ["RAY_ADDRESS"] == held.address


@pytest.mark.parametrize("victim", ["raylet", "gcs_server", "holder"])
def test_whoever_loses_ray_hears_so_and_nothing_is_left(victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of a part of a private session: its owner and a second process that shares it get an error that may pass,
    soon; no process and no file of it stay."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with HeldSession(4) as owner:
        folder = folder_of(owner)
        family = family_of(folder)
        for name, value in owner.environment.items():
            monkeypatch.setenv(name, value)
        with HeldSession() as guest:
            answers = [held.spread("time:sleep", [0.01] * 6 + [600]) for held in (owner, guest)]
            assert [next(one) for one in answers] == [None, None]
            holder = psutil.Process(family["raylet"].ppid())
            (holder if victim == "holder" else family[victim]).kill()
            for one in answers:
                with pytest.raises(LaunchFailed, match=r"Ray is lost: .*the same command does the rest") as caught:
                    list(one)
                assert caught.value.kind == "communication"
            assert not owner.is_alive() and not guest.is_alive()
    assert not Path(folder).exists()
    assert wait_until(lambda: not family_of(folder)), family_of(folder)


def test_a_session_ends_with_its_starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of the process that holds it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code = textwrap.dedent("""
        import time
        from vc2.ray_session import HeldSession
        with HeldSession(1) as held:
            print(held.environment["RAY_AUTH_TOKEN_PATH"], flush=True)
            time.sleep(600)
    """)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        folder = Path(starter.stdout.readline().strip()).parent
        assert "raylet" in family_of(str(folder))
        starter.kill()
    assert wait_until(lambda: not folder.exists() and not family_of(str(folder)))


def test_a_session_whose_holder_is_killed_at_once_ends_too(tmp_path: Path) -> None:
    """Before its warden has looked at it: what carries the mark of the session is ended all the same."""
    (tmp_path / "ray").mkdir()
    code = "import time; time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", ""]) as holder:  # ended when the block does
        pass
    settings = os.environ | {RAY_SESSION: str(tmp_path / "ray")}
    with subprocess.Popen([sys.executable, "-c", code], env=settings) as left:
        words = [sys.executable, "-m", "vc2.ray_session", "warden", str(tmp_path / "ray")]
        subprocess.run(words, env=os.environ | {PARENT: str(holder.pid)}, check=True, timeout=60)
        assert left.wait(5) < 0
    assert not (tmp_path / "ray").exists()


def test_a_head_that_is_not_there_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address where nothing answers: no traceback, and of a kind that may pass."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    held = HeldSession()
    with pytest.raises(LaunchFailed, match=r"^Ray: nothing answers at 127\.0\.0\.1:9 .*start a head there") as caught:
        held.start()
    held.stop()
    assert caught.value.kind == "communication" and "\n" not in str(caught.value)


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
