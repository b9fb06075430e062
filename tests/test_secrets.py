"""Secrets stay in the environment: nothing that is written, shown or listed holds one.

They are planted where people have them, the pipeline is run in every way, with failures in it, and all that was written
is searched: the store, the work folder with its logs and the server's database, what commands print, how processes were
called, Ray's folder while it is there. Two exceptions are by design: Ray's token lies in a file of its own that nobody
else may read, and a link that S3 signs names the key that signed it, and the session token where there is one.
"""

import json
import os
import re
import stat
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.follow import FINAL
from flows.server import ROOT, StackError
from tests.digests import as_options
from tests.flows.stacks import TINY_WORLD, Running, processes_of, ranks_of, serving
from vc2.config import merge
from vc2.data.config import TarSource
from vc2.errors import ConfigError, SourceError, without_secrets
from vc2.miniature.config import WorldConfig
from vc2.pipeline.recipes import miniature, world_folder
from vc2.storage import open_store

PLANTED = {
    name: f"planted-{name.lower().replace('_', '-')}-7fd2c1"
    for name in (
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING",
        "HF_TOKEN", "WANDB_API_KEY", "SOMEBODYS_PASSWORD",
    )
}  # fmt: skip
PASSWORD = "planted-password-of-a-url-7fd2c1"
URL = f"https://somebody:{PASSWORD}@data.example/webvid.csv"
SIGNED = re.compile(rb"X-Amz-(Credential|Security-Token)=[^&\s\"'\\)]*")
TRAINING = {"batch_size": 4, "num_steps": 4, "state_every_steps": 2, "heartbeat_seconds": 1}


@dataclass
class Seen:
    """What was written and shown: where -> bytes."""

    work: Path
    found: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)  #: of Ray's sessions
    modes: set[str] = field(default_factory=set)  #: of the files that hold them
    has_killed: bool = False

    def look_around(self) -> None:
        """How our processes were called, and what Ray has written by now."""
        for process in processes_of(self.work):
            try:
                self.found[f"command line of {process.pid}"] = " ".join(process.cmdline()).encode()
                environment = process.environ()
            except psutil.Error:
                continue
            if token := environment.get("RAY_AUTH_TOKEN_PATH"):
                self.look_at_ray(Path(token))

    def look_at_ray(self, token: Path) -> None:
        places = [Path(folder, name) for folder, _, names in os.walk(token.parent) for name in names]
        for path in places:  # of a session that may end at any moment
            try:
                if path == token:
                    self.tokens.add(path.read_text())
                    self.modes.add(stat.filemode(path.stat().st_mode))
                elif path.is_file():
                    self.found[str(path)] = path.read_bytes()
            except OSError:
                continue

    def command(self, *words: str, **variables: str) -> None:
        """What a command of ours prints, with the secrets in its environment."""
        done = subprocess.run(
            [sys.executable, "-m", "vc2.cli", *words], cwd=ROOT, capture_output=True, timeout=300,
            env=os.environ | PLANTED | {"VC2_WORK": str(self.work)} | variables,
        )  # fmt: skip
        self.found[f"vc2 {' '.join(words)}"] = done.stdout + done.stderr

    def folder(self, folder: Path) -> None:
        self.found |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def store(self, uri: str) -> None:
        store = open_store(uri)
        self.found |= {f"{uri}/{entry.key}": store.read(entry.key) for entry in store.list("")}


def followed(seen: Seen, running: Running, run: str) -> dict[str, Any]:
    """A run when it has ended; one of its ranks is killed when they train for the first time."""
    while (found := dict(running.run(run)))["state_type"] not in FINAL:
        seen.look_around()
        if not seen.has_killed:
            seen.has_killed = any(kill_if_it_trains(rank) for rank in ranks_of(running.work))
        time.sleep(0.2)
    return found


def kill_if_it_trains(rank: psutil.Process) -> bool:
    try:
        if "vc2.train.rank" not in rank.cmdline():
            return False
        rank.kill()
    except psutil.Error:
        return False
    return True


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[Seen]:
    import boto3

    boto3.client("s3").create_bucket(Bucket="secrets")
    work, uri = tmp_path_factory.mktemp("secrets"), "s3://secrets/here"
    seen = Seen(work)
    overrides = {
        "world": TINY_WORLD,
        "laion_coco": {"source": {"kind": "laion-coco", "table": str(work / "not-yet"), "min_yield": 0}},
        "full": TRAINING,
    }
    asked = {"stop_after": "train/full", "overrides": overrides}
    with serving(work, "--store", uri, **PLANTED) as running:
        with pytest.raises(StackError, match="refused") as refused:
            running.submit(overrides={"webvid": {"source": {"kind": "webvid", "table": URL}}})
        seen.found["what the submitter is told"] = str(refused.value).encode()
        run = running.submit(**asked)
        assert followed(seen, running, run)["state_type"] == "FAILED"
        (work / "not-yet").symlink_to(world_folder(WorldConfig(**TINY_WORLD), work) / "laion")
        for _ in range(3):
            running.retry(run)
            ended = followed(seen, running, run)
            if ended["state_type"] == "COMPLETED":
                break
        assert ended["state_type"] == "COMPLETED", ended["state"]
        for kind in ("flow_runs", "artifacts", "logs", "deployments", "events"):
            seen.found[f"{kind} of the server"] = json.dumps(running.api.post(f"/{kind}/filter", {})).encode()
    settings = as_options(overrides)
    here = ("--store", uri, "--work", str(work))
    seen.command("run", "miniature", *here, *settings, "--stop-after", "train/full")
    seen.command("plan", "miniature", *here, *settings, "--json")
    seen.command("doctor", "--json")
    seen.command("run", "miniature", *here, "--set", f"webvid.source.table={URL}")
    away = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    seen.command("plan", "miniature", "--store", "s3://away/x", "--work", str(work), **away)
    seen.folder(work)
    seen.store(uri)
    yield seen


@pytest.mark.s3
@pytest.mark.timeout(1200)
def test_no_secret_is_written_or_shown(seen: Seen) -> None:
    """Of all that a run leaves, on the way or for good, nothing holds one."""
    assert any("prefect.db" in name for name in seen.found)
    secrets = {PASSWORD, *PLANTED.values(), *seen.tokens}
    for where, data in seen.found.items():
        told = SIGNED.sub(b"", urllib.parse.unquote_to_bytes(data) if b"X-Amz-" in data else data)
        held = [secret for secret in secrets if secret.encode() in told]
        assert not held, f"{where} holds {held}: {told[max(0, told.find(held[0].encode()) - 200) :][:400]!r}"


@pytest.mark.s3
def test_rays_token_is_for_its_owner_alone_and_gone_at_the_end(seen: Seen) -> None:
    assert seen.modes == {"-rw-------"}
    assert len(seen.tokens) >= 1
    folders = {Path(name).parts[2] for name in seen.found if name.startswith("/tmp/vc2-ray-")}
    assert not [name for name in folders if Path("/tmp", name).exists()]


@pytest.mark.s3
def test_errors_were_told_all_the_same(seen: Seen) -> None:
    """Nothing is hidden by saying nothing: what the failures were about stands in the logs."""
    told = b"".join(seen.found.values())
    assert seen.has_killed and b"SIGKILL" in told
    assert str(seen.work / "not-yet").encode() in told
    (refused,) = (said for name, said in seen.found.items() if name.endswith(URL))
    assert b"a user or a password" in refused and len(refused.splitlines()) == 1
    assert b"s3://away/x" in told


def test_a_link_that_s3_signs_holds_no_secret_key(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the key and the session, as S3 wants it, and expires."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it would keep the credentials of other tests
    link = open_store(s3_uri).link("report.html", 60)
    assert PLANTED["AWS_ACCESS_KEY_ID"] in link and "X-Amz-Expires=60" in link
    assert PLANTED["AWS_SECRET_ACCESS_KEY"] not in link
    assert "planted" not in without_secrets(link)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("https://me:word@host/a?b=c", "https://***@host/a?b=c"),
        ("see s3://bucket/key and http://host/@me", "see s3://bucket/key and http://host/@me"),
        ("http://h/a?X-Amz-Signature=0f&size=3", "http://h/a?X-Amz-Signature=***&size=3"),
        ("https://h/x?sv=1&sig=a%2Fb", "https://h/x?sv=1&sig=***"),
        ("mail me@host", "mail me@host"),
    ],
)
def test_errors_quote_urls_without_their_credentials(said: str, shown: str) -> None:
    assert str(SourceError(said)) == shown


def test_a_configuration_takes_no_url_with_credentials() -> None:
    """It would end up in manifests and databases."""
    with pytest.raises(ConfigError, match="a user or a password") as refused:
        merge(miniature(), {"webvid": {"source": {"table": URL}}})
    assert PASSWORD not in str(refused.value)
    with pytest.raises(ValueError, match="a user or a password") as refused:
        TarSource(name="mine", media="image", archives=URL)
    assert PASSWORD not in str(refused.value)
