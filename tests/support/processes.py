"""Child processes that talk to each other."""

from __future__ import annotations

import socket
import subprocess


def free_ports(n: int) -> list[str]:
    """Ports that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def outputs_of(processes: list[subprocess.Popen[str]], timeout: float) -> list[str]:
    """What each wrote to stdout, when all have ended; none outlives this."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
