"""Fetch and probe: bytes are brought in, checked before they are believed, and entered in the ledger with a reason if
they fail.

Nothing about the outcome depends on the order in which answers arrive: rows are written in their own order, bytes
packed likewise.

A download counts only with status 200, the announced length, a size within the limit, and a content that opens as
what it should be. 429, 5xx, broken connections and short bodies are tried again, later and later, or when
`Retry-After` says so, as long as the row's total time allows. Redirects are followed by hand, five at most, so that
each address is checked: nobody's URL list may make us talk to addresses inside the network we run in (loopback,
private, link-local), unless `connect_to` names the host.
"""

import asyncio
import email.utils
import hashlib
import ipaddress
import os
import platform
import random
import shutil
import socket
import tarfile
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from vc2.data.config import FetchConfig, FolderSource, ShardStage, WebVidSource
from vc2.data.decode import Decoder, MediaError, shared_decoder, sniff
from vc2.data.ledger import row_of, write_part
from vc2.data.rejects import RejectReason
from vc2.data.sources import Record, is_url, media_key
from vc2.seeding import derive_seed
from vc2.storage import Store, file_digest

if TYPE_CHECKING:
    import aiohttp

__all__ = ["download", "fetch_archive", "fetch_rows", "local_file", "workplace"]

MOST_REDIRECTS = 5
CHUNK = 2**16
HEAD = 32  # bytes that tell what a body is


@contextmanager
def workplace(work: Path) -> Iterator[Path]:
    """A temporary folder below `work` that goes away at the end; those of killed processes go with it."""
    root = work / "tmp"
    root.mkdir(parents=True, exist_ok=True)
    host = platform.node()  # the folder may be shared: whether a process of another machine lives cannot be told
    for old in root.glob(f"{host}-data-*-*"):
        if not _is_alive(int(old.name.split("-")[-2])):
            shutil.rmtree(old, ignore_errors=True)
    folder = root / f"{host}-data-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def fetch_rows(store: Store, prefix: str, name: str, records: list[Record], config: ShardStage, work: Path) -> None:
    """Fetch and probe some rows of the tables and commit them as a part of the ledger."""
    decoder = shared_decoder(config.fetch.probe_seconds, config.fetch.max_pixels)
    with workplace(work) as folder:
        found = asyncio.run(_fetch_all(records, config, folder, decoder))
        blob = folder / "blob"
        rows = [row_of(record, **facts) for record, facts in zip(records, found, strict=True)]
        with open(blob, "wb") as packed:
            for row in rows:
                body = folder / str(row["row"])
                if row["reason"] is None and body.exists():
                    row["offset"] = packed.tell()
                    with open(body, "rb") as file:
                        shutil.copyfileobj(file, packed)
        write_part(store, prefix, name, rows, blob)


def fetch_archive(
    store: Store, prefix: str, number: int, path: Path, config: ShardStage, work: Path, *, first: int = 0
) -> None:
    """Read an image archive once from its start, probe its members and commit them in parts.

    Args:
        store: Where.
        prefix: Folder of the ledger.
        number: Place of the archive among the archives.
        path: The .tgz.
        config: The stage.
        work: For temporary files.
        first: Parts of this archive that are there already.
    """
    size = config.fetch.part_rows
    decoder = shared_decoder(config.fetch.probe_seconds, config.fetch.max_pixels)
    with workplace(work) as folder:
        members = _members(path, config.fetch.max_bytes, skip=first * size)
        part, waiting = first, next(members, None)
        while True:
            blob, rows = folder / "blob", []
            with open(blob, "wb") as packed:
                while waiting is not None and len(rows) < size:
                    row = _probed_member(path, part * size + len(rows), *waiting, decoder)
                    if row["reason"] is None:
                        row["offset"] = packed.tell()
                        packed.write(waiting[1])
                    rows.append(row)
                    waiting = next(members, None)
            write_part(store, prefix, f"part-{number:03d}-{part:05d}", rows, blob, last=waiting is None)
            if waiting is None:
                return
            part += 1


def _members(path: Path, max_bytes: int, skip: int) -> Iterator[tuple[str, bytes, RejectReason | None]]:
    """Name and bytes of the files in an archive, from number `skip`. A damaged archive ends early, and says so."""
    try:
        with tarfile.open(path, "r|*") as tar:
            number = -1
            for member in tar:
                if not member.isfile():
                    continue
                number += 1
                if number < skip:
                    continue
                if member.size > max_bytes:
                    yield member.name, b"", RejectReason.TOO_LARGE
                    continue
                content = tar.extractfile(member)
                yield member.name, content.read() if content else b"", None
    except (tarfile.TarError, OSError, EOFError) as error:
        yield f"(end of archive: {type(error).__name__})", b"", RejectReason.TRUNCATED


def _probed_member(
    path: Path, number: int, name: str, data: bytes, reason: RejectReason | None, decoder: Decoder
) -> dict[str, Any]:
    record = Record(number, media_key(name) or "", f"{path.name}/{name.removeprefix('./')}")
    if reason is not None:
        return row_of(record, reason=str(reason), detail="")
    return row_of(record, **_probed(decoder, "image", data, hashlib.sha256(data).hexdigest(), len(data)))


def _probed(decoder: Decoder, media: Any, source: Path | bytes, sha256: str, size: int) -> dict[str, Any]:
    found = {"sha256": sha256, "size": size, "reason": None, "detail": ""}
    try:
        return found | decoder.probe(media, source).as_dict()
    except MediaError as error:
        return found | {"reason": str(error.reason), "detail": error.detail}


# ---- rows ----


async def _fetch_all(records: list[Record], config: ShardStage, folder: Path, decoder: Decoder) -> list[dict[str, Any]]:
    """What was found for each record. Downloads run side by side; one child decodes what has arrived."""
    loop = asyncio.get_running_loop()
    gate = asyncio.Semaphore(config.fetch.concurrency)
    with ThreadPoolExecutor(1) as probing:
        async with _session(config.fetch) as session:

            async def fetch(record: Record) -> dict[str, Any]:
                if record.reason is not None:
                    return {}
                try:
                    if is_url(record.locator):
                        path = folder / str(record.row)
                        async with gate:
                            await download(session, record.locator, path, config.fetch, jitter_seed=record.key)
                    else:
                        path = local_file(config.source, record.locator)
                    return await loop.run_in_executor(probing, _probed_file, decoder, config, path)
                except MediaError as error:
                    return {"reason": str(error.reason), "detail": error.detail}

            return list(await asyncio.gather(*(fetch(record) for record in records)))


def _probed_file(decoder: Decoder, config: ShardStage, path: Path) -> dict[str, Any]:
    try:
        found = file_digest(path)
    except OSError as error:
        raise MediaError(RejectReason.MISSING_FILE, error.strerror or "unreadable") from None
    return _probed(decoder, config.source.media, path, found.sha256, found.size)


def _local_root(source: Any) -> Path:
    place = (
        source.videos
        if isinstance(source, WebVidSource)
        else source.folder
        if isinstance(source, FolderSource)
        else "."
    )
    return Path(place or ".").expanduser()


def local_file(source: Any, locator: str) -> Path:
    """The file that a locator names.

    Raises:
        MediaError: If there is none.
    """
    root = _local_root(source)
    if (path := root / locator).is_file():
        return path
    if isinstance(source, WebVidSource):  # some copies have one more level: <part>/<page_dir>/<videoid>.mp4
        for part in sorted(entry for entry in root.iterdir() if entry.is_dir()):
            if (path := part / locator).is_file():
                return path
    raise MediaError(RejectReason.MISSING_FILE, "no such file below the source's folder")


# ---- HTTP ----


class _TryLater(Exception):
    """A failure that may pass, and how long the server asked to wait."""

    def __init__(self, reason: RejectReason, detail: str, wait: float | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.wait = reason, detail, wait


async def download(
    session: "aiohttp.ClientSession", url: str, path: Path, config: FetchConfig, *, jitter_seed: str = ""
) -> None:
    """Bring the body of a URL to a file, or say why not.

    Raises:
        MediaError: With the reason of the last attempt.
    """
    until = time.monotonic() + config.total_timeout
    waits = random.Random(derive_seed("retry", jitter_seed))
    failure = _TryLater(RejectReason.TIMEOUT, "no time for an attempt")
    for attempt in range(config.retries + 1):
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + until - time.monotonic()):
                body = await _body(session, url, config)
            path.write_bytes(body)
            return
        except TimeoutError:
            raise MediaError(RejectReason.TIMEOUT, f"not finished after {config.total_timeout:g} s") from None
        except _TryLater as later:
            failure = later
        if attempt == config.retries:
            break
        wait = failure.wait if failure.wait is not None else config.backoff * 2**attempt * (0.5 + waits.random())
        if time.monotonic() + wait >= until:
            break
        await asyncio.sleep(wait)
    raise MediaError(failure.reason, failure.detail)


async def _body(session: "aiohttp.ClientSession", url: str, config: FetchConfig) -> bytes:
    import aiohttp

    for _ in range(MOST_REDIRECTS + 1):
        _check_address(url, config)
        try:
            async with session.get(url, allow_redirects=False) as answer:
                if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                    url = urljoin(url, answer.headers["Location"])
                    continue
                _check_status(answer.status, answer.headers.get("Retry-After"))
                return await _checked_content(answer, config)
        except TimeoutError:
            raise _TryLater(RejectReason.TIMEOUT, "no answer, or silence within it") from None
        except aiohttp.ClientPayloadError:
            raise _TryLater(RejectReason.TRUNCATED, "the body ended before its announced length") from None
        except aiohttp.InvalidURL:
            raise MediaError(RejectReason.UNPARSABLE, "not a URL") from None
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error.__cause__, _Forbidden):
                raise MediaError(RejectReason.FORBIDDEN_ADDRESS, "a name that leads into a private network") from None
            raise _TryLater(RejectReason.CONNECTION, type(error).__name__) from None
    raise MediaError(RejectReason.HTTP_STATUS, f"more than {MOST_REDIRECTS} redirects")


def _check_status(status: int, retry_after: str | None) -> None:
    if status == 200:
        return
    if status in (404, 410):
        raise MediaError(RejectReason.HTTP_404, f"HTTP {status}")
    if status in (408, 425, 429) or status >= 500:
        raise _TryLater(RejectReason.HTTP_STATUS, f"HTTP {status}", _seconds(retry_after))
    raise MediaError(RejectReason.HTTP_STATUS, f"HTTP {status}")


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` is a number of seconds or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


async def _checked_content(answer: "aiohttp.ClientResponse", config: FetchConfig) -> bytes:
    announced = answer.content_length
    if announced is not None and announced > config.max_bytes:
        raise MediaError(RejectReason.TOO_LARGE, f"{announced} bytes announced")
    body = bytearray()
    async for chunk in answer.content.iter_chunked(CHUNK):
        body += chunk
        if len(body) >= HEAD and sniff(bytes(body[:HEAD])) is None:  # no need to wait for the end of a web page
            raise MediaError(RejectReason.NOT_MEDIA, "neither image nor video by its first bytes")
        if len(body) > config.max_bytes:
            raise MediaError(RejectReason.TOO_LARGE, f"more than {config.max_bytes} bytes")
    if sniff(bytes(body[:HEAD])) is None:
        raise MediaError(RejectReason.NOT_MEDIA, "neither image nor video by its first bytes")
    return bytes(body)


class _Forbidden(OSError):
    """An address that no URL of a stranger may lead to."""


def _check_address(url: str, config: FetchConfig) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise MediaError(RejectReason.UNPARSABLE, "not a URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise MediaError(RejectReason.FORBIDDEN_ADDRESS, f"scheme {parts.scheme!r}; only http and https are fetched")
    try:
        literal = ipaddress.ip_address(parts.hostname)
    except ValueError:
        return  # a name: the resolver checks what it stands for
    if not literal.is_global and _mapped(config, parts.hostname, port or 80) is None:
        raise MediaError(RejectReason.FORBIDDEN_ADDRESS, "an address inside a private network")


def _mapped(config: FetchConfig, host: str, port: int) -> tuple[str, int] | None:
    target = config.connect_to.get(f"{host}:{port}") or config.connect_to.get(host)
    if target is None:
        return None
    address, _, number = target.rpartition(":")
    return address.strip("[]"), int(number)


@asynccontextmanager
async def _session(config: FetchConfig) -> AsyncIterator["aiohttp.ClientSession"]:
    import aiohttp
    from aiohttp.abc import AbstractResolver

    class Resolver(AbstractResolver):
        """Names to addresses: `connect_to` first; of the rest only addresses of the public internet."""

        async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[Any]:
            if (target := _mapped(config, host, port)) is not None:
                return [_resolved(host, *target)]
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
            addresses = [str(item[4][0]) for item in found]
            if not all(ipaddress.ip_address(address.partition("%")[0]).is_global for address in addresses):
                raise _Forbidden(host)
            return [_resolved(host, address, port) for address in addresses]

        async def close(self) -> None:
            return

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout, sock_read=config.idle_timeout)
    connector = aiohttp.TCPConnector(limit=config.concurrency, resolver=Resolver(), use_dns_cache=False)
    # Bodies are wanted as they are, so that their length can be checked.
    headers = {"User-Agent": config.user_agent, "Accept": "*/*", "Accept-Encoding": "identity"}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        yield session


def _resolved(host: str, address: str, port: int) -> dict[str, Any]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return {
        "hostname": host,
        "host": address,
        "port": port,
        "family": family,
        "proto": 0,
        "flags": socket.AI_NUMERICHOST,
    }
