"""HTTP as a good guest, and as a careful one.

Good: a worker makes at most so many requests at a time to one host, with a least time between them; failures that may
pass (408, 425, 429, 5xx, broken connections, short bodies) are tried again, later and later with jitter, and not before
`Retry-After` says; a host that asks for more time than a row has is left alone by all rows of the worker. We say who we
are, and media whose answer reserves its rights (`X-Robots-Tag`, `TDM-Reservation`) are left out.

Careful: a list of URLs is written by strangers. Only http and https are spoken; each hop of a redirect is a new
address to be checked; a host must stand for addresses of the public internet alone, in whatever spelling, and the
connection goes to the very address that was checked, without a second look-up. Hosts inside one's own network are
reached if `connect_to` or `allow_hosts` names them. Bodies have a limit, announced or not, and must come as they are:
an encoded one could unpack to any size.

A row's time (`total_timeout`) runs while it is served or waits for the server, not while it waits for its turn.
"""

import asyncio
import email.utils
import hashlib
import ipaddress
import random
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from vc2.data.config import FetchConfig
from vc2.data.media import MediaError, sniff
from vc2.data.rejects import RejectReason
from vc2.errors import SourceError
from vc2.seeding import derive_seed

__all__ = ["Body", "PlaceFacts", "PlaceReader", "Web", "facts_of_places"]

T = TypeVar("T")
MOST_REDIRECTS = 5
CHUNK = 2**18  # bytes that are written at a time
HEAD = 32  # bytes that tell what a body is
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})  # none: noindex, nofollow
MOST_NAMES = 10_000  # of hosts of which something is remembered
NAME_SECONDS = 600.0  # how long they are
LOOK_UPS = 16  # of names, at a time


@dataclass(frozen=True, slots=True)
class Body:
    """What was downloaded."""

    size: int  #: bytes
    sha256: str


class _TryLater(Exception):
    """A failure that may pass, and how long the server asked to wait."""

    def __init__(self, reason: RejectReason, detail: str, wait: float | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.wait = reason, detail, wait


class _Forbidden(OSError):
    """An address that no URL of a stranger may lead to."""


@dataclass(slots=True)
class _Host:
    """When a host may be asked again, by `time.monotonic`."""

    next_start: float = 0.0  # of a request
    quiet_until: float = 0.0  # as it asked for


_hosts: dict[tuple[str, ...], _Host] = {}  # of this process, whose parts follow each other
_known: dict[str, tuple[float, list[str]]] = {}  # addresses by name, and until when they hold; of this process, too


@dataclass
class _Time:
    """What is left of a row's time, in seconds."""

    left: float

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        clock = asyncio.get_running_loop().time
        begun = clock()
        try:
            async with asyncio.timeout(self.left):
                yield
        finally:
            self.left -= clock() - begun


class Web:
    """Requests of one worker. Used as `async with Web(config) as web`, within one event loop.

    What hosts asked for, and where they are, is known to all that come one after the other in a process.
    """

    def __init__(self, config: FetchConfig) -> None:
        self.config = config
        self._gates: dict[str, asyncio.Semaphore] = {}
        self._gate = asyncio.Semaphore(config.concurrency)

    async def __aenter__(self) -> Self:
        config = self.config
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout, sock_read=config.idle_timeout)
        self._names = _Names(config)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, resolver=self._names, use_dns_cache=False),
            timeout=timeout,
            headers={"User-Agent": config.user_agent, "Accept": "*/*", "Accept-Encoding": "identity"},
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=CHUNK,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def download(self, url: str, path: Path, *, seed: str = "") -> Body:
        """Bring a medium to a file, or say why not.

        Args:
            url: Of an image or a video.
            path: The file; what is in it after an error is of no use.
            seed: Of the jitter between attempts.

        Raises:
            MediaError: With the reason of the last attempt.
        """

        async def take(answer: aiohttp.ClientResponse) -> Body:
            if self.config.opt_out and (said := _opt_out(answer)):
                raise MediaError(RejectReason.OPT_OUT, said)
            return await save(answer, path, most=self.config.max_bytes, only_media=True)

        return await self.get(url, take, seed=seed)

    async def get(
        self,
        url: str,
        take: Callable[[aiohttp.ClientResponse], Awaitable[T]],
        *,
        headers: dict[str, str] | None = None,
        statuses: Sequence[int] = (200,),
        seed: str = "",
    ) -> T:
        """Ask for a URL until an answer of one of these statuses is taken, or there is no hope or time.

        Raises:
            MediaError: With the reason of the last attempt.
        """
        config, rest = self.config, _Time(self.config.total_timeout)
        waits = random.Random(derive_seed("retry", seed))
        for attempt in range(config.retries + 1):
            try:
                return await self._attempt(url, take, headers or {}, statuses, rest)
            except TimeoutError:
                raise MediaError(RejectReason.TIMEOUT, f"not finished after {config.total_timeout:g} s") from None
            except _TryLater as later:
                wait = config.backoff * 2**attempt * (0.5 + waits.random()) if later.wait is None else later.wait
                if attempt == config.retries or wait >= rest.left:
                    raise MediaError(later.reason, later.detail) from None
            rest.left -= wait
            await asyncio.sleep(wait)
        raise AssertionError("no attempt was made")

    async def _attempt(
        self,
        text: str,
        take: Callable[[aiohttp.ClientResponse], Awaitable[T]],
        headers: dict[str, str],
        statuses: Sequence[int],
        rest: _Time,
    ) -> T:
        url = _url(text)
        for _ in range(MOST_REDIRECTS + 1):
            self._names.check(url)
            async with self._turn(url, rest), rest.running(), self._answer(url, headers) as answer:
                if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                    url = _url(answer.headers["Location"], url)
                    continue
                if answer.status not in statuses:
                    raise self._refused(answer)
                if answer.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
                    raise MediaError(RejectReason.NOT_MEDIA, "an encoded body, though none was asked for")
                return await take(answer)
        raise MediaError(RejectReason.HTTP_STATUS, f"more than {MOST_REDIRECTS} redirects")

    @asynccontextmanager
    async def _turn(self, url: URL, rest: _Time) -> AsyncIterator[None]:
        """Wait until the host, and we, can have one more request."""
        name = url.host or ""
        if name not in self._gates:
            self._gates[name] = asyncio.Semaphore(self.config.per_host)
        async with self._gates[name]:
            host = self._host(url)
            if (quiet := host.quiet_until - time.monotonic()) > 0:
                if quiet >= rest.left:
                    raise MediaError(RejectReason.HTTP_STATUS, f"its host asked us to stay away for {quiet:.0f} s")
                rest.left -= quiet
                await asyncio.sleep(quiet)
            start = max(time.monotonic(), host.next_start)
            host.next_start = start + self.config.host_interval
            await asyncio.sleep(start - time.monotonic())
            async with self._gate:
                yield

    def _host(self, url: URL) -> _Host:
        key = (url.host or "", *map(str, self._names.target(url) or ()))
        if key not in _hosts:
            if len(_hosts) >= MOST_NAMES:
                now = time.monotonic()
                for old in [old for old, host in _hosts.items() if max(host.next_start, host.quiet_until) <= now]:
                    del _hosts[old]
            _hosts[key] = _Host()
        return _hosts[key]

    @asynccontextmanager
    async def _answer(self, url: URL, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer, and the failures of asking and of reading it in our words."""
        try:
            async with self._session.get(url, allow_redirects=False, headers=headers) as answer:
                yield answer
        except TimeoutError:
            raise _TryLater(RejectReason.TIMEOUT, "no answer, or silence within it") from None
        except aiohttp.ClientPayloadError:
            raise _TryLater(RejectReason.TRUNCATED, "the body ended before its announced length") from None
        except aiohttp.InvalidURL:
            raise MediaError(RejectReason.UNPARSABLE, "not a URL") from None
        except aiohttp.ClientError as error:
            if isinstance(error.__cause__, _Forbidden):
                raise MediaError(RejectReason.FORBIDDEN_ADDRESS, "a name that leads into a private network") from None
            raise _TryLater(RejectReason.CONNECTION, type(error).__name__) from None
        except ValueError:
            raise MediaError(RejectReason.UNPARSABLE, "not a URL, or no answer of HTTP") from None

    def _refused(self, answer: aiohttp.ClientResponse) -> Exception:
        status = answer.status
        if status in (404, 410):
            return MediaError(RejectReason.HTTP_404, f"HTTP {status}")
        if status not in (408, 425, 429) and status < 500:
            return MediaError(RejectReason.HTTP_STATUS, f"HTTP {status}")
        wait = _seconds(answer.headers.get("Retry-After"))
        if wait is not None:
            host = self._host(answer.url)
            host.quiet_until = max(host.quiet_until, time.monotonic() + wait)
        return _TryLater(RejectReason.HTTP_STATUS, f"HTTP {status}", wait)


async def save(answer: aiohttp.ClientResponse, path: Path, *, most: int | None, only_media: bool) -> Body:
    """Write a body to a file, in bounded memory.

    Raises:
        MediaError: If it has more than `most` bytes or, with `only_media`, does not begin like an image or a video.
    """
    announced = answer.content_length
    if most is not None and announced is not None and announced > most:
        raise MediaError(RejectReason.TOO_LARGE, f"{announced} bytes announced")
    sha256, size, head, is_known = hashlib.sha256(), 0, b"", not only_media
    with open(path, "wb") as file:
        async for chunk in answer.content.iter_any():
            sha256.update(chunk)
            size += len(chunk)
            if not is_known and len(head := head + chunk[:HEAD]) >= HEAD:
                _check_head(head)  # no need to wait for the end of a web page
                is_known = True
            if most is not None and size > most:
                raise MediaError(RejectReason.TOO_LARGE, f"more than {most} bytes")
            file.write(chunk)
    if not is_known:
        _check_head(head)
    return Body(size, sha256.hexdigest())


def _check_head(head: bytes) -> None:
    if sniff(head[:HEAD]) is None:
        raise MediaError(RejectReason.NOT_MEDIA, "neither image nor video by its first bytes")


def _opt_out(answer: aiohttp.ClientResponse) -> str | None:
    """The header that reserves the rights in an answer. What is said to one robot by name is taken as said to all."""
    for value in answer.headers.getall("X-Robots-Tag", []):
        for directive in value.lower().split(","):
            name, _, said = directive.rpartition(":")
            if said.strip() in OPT_OUTS and not name.strip().endswith("max-image-preview"):
                return f"X-Robots-Tag: {value[:100]}"
    if answer.headers.get("TDM-Reservation", "").strip() == "1":
        return "TDM-Reservation: 1"
    return None


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` is a number of seconds or a date."""
    if retry_after is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d*)?\s*", retry_after):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


# ---- addresses ----


def _url(text: str, base: URL | None = None) -> URL:
    """A URL with a host that can be looked up.

    Raises:
        MediaError: If it is none.
    """
    try:
        url = URL(text) if base is None else base.join(URL(text))
        if url.scheme in ("http", "https"):
            host = (url.host and url.raw_host) or ""
            host.encode("idna")  # the system would refuse it later, in other ways
            if host and url.port:
                return url
        else:
            return url  # to be refused for what it is
    except ValueError:
        pass
    raise MediaError(RejectReason.UNPARSABLE, "not a URL")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also the IPv4 address that an IPv6 one stands for."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if (inside := found.ipv4_mapped or found.sixtofour or _nat64(found)) is not None:
            return is_public(str(inside))
        if found.is_site_local:
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


def _nat64(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    inside = address in ipaddress.ip_network("64:ff9b::/96")
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if inside else None


@dataclass
class _Names(AbstractResolver):
    """Which hosts may be asked, and the addresses they stand for: those of `connect_to` first, of the others only
    public ones. aiohttp connects to what this returns and looks nothing up by itself."""

    config: FetchConfig

    def __post_init__(self) -> None:
        self._looking_up = ThreadPoolExecutor(LOOK_UPS, thread_name_prefix="names")

    def check(self, url: URL) -> None:
        """Raise `MediaError` unless a URL may be asked for, as far as its text tells; names are for `resolve`."""
        host = url.host or ""
        if url.scheme not in ("http", "https"):
            raise MediaError(
                RejectReason.FORBIDDEN_ADDRESS, f"scheme {url.scheme[:20]!r}; only http and https are fetched"
            )
        if url.user is not None or url.password is not None:
            raise MediaError(RejectReason.FORBIDDEN_ADDRESS, "a URL with a user or a password")
        if self._is_named(host, url.port or 80):
            return
        try:
            is_allowed = is_public(host)
        except ValueError:  # a name, or a number that systems read as an address: 127.1, 0x7f000001, 017700000001
            is_allowed = re.fullmatch(r"(0x[0-9a-f]*|[0-9]+)", host.rstrip(".").rpartition(".")[2].lower()) is None
        if not is_allowed:
            raise MediaError(RejectReason.FORBIDDEN_ADDRESS, "an address inside a private network")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if (target := self._target(host, port)) is not None:
            return [_resolved(host, *target)]
        addresses = await self._addresses(host)
        if not self._is_named(host, port) and not all(map(is_public, addresses)):
            raise _Forbidden(host)
        return [_resolved(host, address, port) for address in addresses]

    async def close(self) -> None:
        self._looking_up.shutdown(wait=False, cancel_futures=True)

    async def _addresses(self, host: str) -> list[str]:
        now = time.monotonic()
        if host in _known and _known[host][0] > now:
            return _known[host][1]
        async with asyncio.timeout(self.config.connect_timeout):
            found = await asyncio.get_running_loop().run_in_executor(
                self._looking_up, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            )
        addresses = list(dict.fromkeys(str(item[4][0]) for item in found))
        if len(_known) >= MOST_NAMES:
            del _known[next(iter(_known))]
        _known[host] = now + NAME_SECONDS, addresses
        return addresses

    def _is_named(self, host: str, port: int) -> bool:
        allowed = self.config.allow_hosts
        return host in allowed or f"{host}:{port}" in allowed or self._target(host, port) is not None

    def target(self, url: URL) -> tuple[str, int] | None:
        """Where `connect_to` leads a URL."""
        return self._target(url.host or "", url.port or 80)

    def _target(self, host: str, port: int) -> tuple[str, int] | None:
        target = self.config.connect_to.get(f"{host}:{port}") or self.config.connect_to.get(host)
        if target is None:
            return None
        address, _, number = target.rpartition(":")
        return address.strip("[]"), int(number)


def _resolved(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST)


# ---- places that the user names ----


@dataclass(frozen=True, slots=True)
class PlaceFacts:
    """What a server says of a file."""

    size: int  #: bytes
    stamp: str  #: ETag, else time of the last change, else empty
    ranged: bool  #: whether it gives parts of it


def facts_of_places(urls: Sequence[str]) -> list[PlaceFacts | None]:
    """What servers say of these files; None where there is none.

    Raises:
        SourceError: If one cannot be asked.
    """

    async def ask(web: Web, url: str) -> PlaceFacts | None:
        try:
            return await web.get(url, _facts, headers={"Range": "bytes=0-0"}, statuses=(200, 206, 416))
        except MediaError as error:
            if error.reason is RejectReason.HTTP_404:
                return None
            raise

    async def ask_all() -> list[PlaceFacts | None]:
        async with Web(_place_config(urls)) as web:
            return list(await asyncio.gather(*(ask(web, url) for url in urls)))

    return _run(urls[0], ask_all())


async def _facts(answer: aiohttp.ClientResponse) -> PlaceFacts:
    stamp = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    if answer.status == 200:
        return PlaceFacts(answer.content_length if answer.content_length is not None else -1, stamp, False)
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if not total.isdigit():
        raise MediaError(RejectReason.UNPARSABLE, "a part of a body of unknown length")
    return PlaceFacts(int(total), stamp, True)


class PlaceReader:
    """A file of the user's at an http(s) URL, read by parts or as a whole.

    Raises:
        SourceError: If there is none.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        (facts,) = facts_of_places([url])
        if facts is None:
            raise SourceError(f"{url}: no such file; check the URL")
        self.size, self.stamp, self.ranged = facts.size, facts.stamp, facts.ranged

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; `SourceError` if the file is no longer the same."""

        async def take(answer: aiohttp.ClientResponse) -> bytes:
            if answer.status == 200:
                raise MediaError(RejectReason.CHANGED, "changed while it was read; start again")
            try:
                return await answer.content.readexactly(size)
            except asyncio.IncompleteReadError:
                raise MediaError(RejectReason.TRUNCATED, "fewer bytes than were asked for") from None

        headers = {"Range": f"bytes={offset}-{offset + size - 1}"}
        if self.stamp and not self.stamp.startswith("W/"):
            headers["If-Range"] = self.stamp
        return self._ask(take, headers, (200, 206))

    def copy(self, path: Path) -> Body:
        """Bring the whole to a file."""
        return self._ask(lambda answer: save(answer, path, most=None, only_media=False), {}, (200,))

    def _ask(
        self,
        take: Callable[[aiohttp.ClientResponse], Awaitable[T]],
        headers: dict[str, str],
        statuses: Sequence[int],
    ) -> T:
        async def ask() -> T:
            async with Web(_place_config([self.url])) as web:
                return await web.get(self.url, take, headers=headers, statuses=statuses)

        return _run(self.url, ask())


def _place_config(urls: Sequence[str]) -> FetchConfig:
    """Patient; and what the user names may lie in the user's network."""
    hosts = {f"{url.host}:{url.port}" for url in map(URL, urls)}
    return FetchConfig(total_timeout=24 * 3600, retries=5, allow_hosts=tuple(sorted(hosts)))


def _run(url: str, work: Coroutine[Any, Any, T]) -> T:
    """Run in a thread of its own: the caller's may have a running loop."""
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(asyncio.run, work).result()
        except MediaError as error:
            raise SourceError(f"{url}: {error.detail or error.reason}; check the URL and the server") from None
