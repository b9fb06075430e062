"""Ports for servers that others are told of before they listen."""

import random
import socket
from pathlib import Path

__all__ = ["free_port", "is_free"]

LOWEST = 20_000  # below are well-known ones, and those of Ray's workers
TRIES = 100


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody has, below those that the kernel gives to outgoing connections: one of them could take it
    before its server listens, or while the server is started again."""
    try:
        highest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:  # no Linux
        highest = 32_768
    chosen = random.SystemRandom()  # processes that fork or share a seed must not choose alike
    for _ in range(TRIES if highest > LOWEST else 0):
        port = chosen.randrange(LOWEST, highest)
        if is_free(port, host):
            return port
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
