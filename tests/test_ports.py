"""A free port stays free until its server listens."""

import socket
from pathlib import Path

import pytest

from vc2.ports import free_port, is_free


def test_a_free_port_is_none_that_a_connection_gets_by_itself() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    found = {free_port() for _ in range(50)}
    assert len(found) > 40 and not any(first <= port <= last for port in found)


def test_who_listens_is_seen() -> None:
    port = free_port()
    assert is_free(port)
    with socket.create_server(("127.0.0.1", port)):
        assert not is_free(port)
    assert is_free(port)


def test_where_all_are_taken_the_kernel_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vc2.ports.LOWEST", 65_535)
    assert 0 < free_port() < 65_536
