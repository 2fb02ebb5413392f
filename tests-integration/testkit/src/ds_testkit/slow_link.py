"""Two hosts on one machine, joined by a slow link: network namespaces, a veth pair, and a token bucket at each end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

HEADERS = 66  # bytes of a packet beside its content: Ethernet 14, IP 20, TCP with timestamps 32
ADDRESS = "10.77.0.1"  # of host 0
_PORT = 29_400  # each namespace has ports of its own


def unusable() -> str | None:
    """Return why there can be no slow link here; None if there can be one."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"iproute2 is not installed: no {' and no '.join(missing)}"
    try:
        with SlowLink("100mbit"):
            return None
    except subprocess.CalledProcessError as error:
        return f"the kernel refused {' '.join(error.cmd)!r}: {error.stderr.strip()}"


class SlowLink:
    """A link between two hosts, each way at most ``rate``; a context manager.

    Queues are long and bursts short (1 ms at ``rate``), so that what is sent takes the time that the rate says.

    Args:
        rate: As for ``tc``, in mbit or gbit.
    """

    def __init__(self, rate: str) -> None:
        self.rate = rate
        self._hosts = [f"ds{os.getpid()}h{host}" for host in range(2)]
        self.interfaces = [f"v{os.getpid()}h{host}" for host in range(2)]

    def __enter__(self) -> SlowLink:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def run(self, program: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 120.0) -> list[Any]:
        """Run ``program`` as one rank on each host, under gloo's environment; return the JSON each printed last.

        Raises:
            RuntimeError: A rank failed; the text holds its output.
        """
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            logs = [stack.enter_context(Path(folder, str(host)).open("w+")) for host in range(2)]
            processes = [self._start(host, program, env or {}, log) for host, log in enumerate(logs)]
            try:
                codes = [process.wait(timeout) for process in processes]
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
            texts = [Path(log.name).read_text() for log in logs]
        if any(codes):
            raise RuntimeError(f"exit codes {codes}:\n" + "\n".join(texts))
        return [json.loads(text.splitlines()[-1]) for text in texts]

    def _start(self, host: int, program: Sequence[str], env: Mapping[str, str], log: Any) -> subprocess.Popen[str]:
        place = {"RANK": str(host), "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESS, "MASTER_PORT": str(_PORT)}
        return subprocess.Popen(
            ["ip", "netns", "exec", self._hosts[host], *program],
            env={**os.environ, **place, "GLOO_SOCKET_IFNAME": self.interfaces[host], **env},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _build(self) -> None:
        for host in self._hosts:
            _call("ip", "netns", "add", host)
        first, second = self.interfaces
        _call(
            *f"ip link add {first} netns {self._hosts[0]} type veth peer name {second} netns {self._hosts[1]}".split()
        )
        number, unit = self.rate[:-4], self.rate[-4:]
        burst = max(16_384, int(number) * {"mbit": 125, "gbit": 125_000}[unit])
        for index, (host, interface) in enumerate(zip(self._hosts, self.interfaces, strict=True)):
            _call(*f"ip -n {host} addr add 10.77.0.{index + 1}/24 dev {interface}".split())
            _call(*f"ip -n {host} link set {interface} up".split())
            _call(*f"ip -n {host} link set lo up".split())
            queue = f"tc -n {host} qdisc add dev {interface} root tbf rate {self.rate} burst {burst} latency 1s"
            _call(*queue.split())

    def _remove(self) -> None:
        for host in self._hosts:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


class Counters:
    """What this host sent over its interface since it was made, as the kernel counts it."""

    def __init__(self, interface: str) -> None:
        self._folder = Path("/sys/class/net", interface, "statistics")
        self._start = self._read()

    def sent(self) -> int:
        """Return bytes without the headers of packets."""
        num_bytes, packets = (now - before for now, before in zip(self._read(), self._start, strict=True))
        return num_bytes - packets * HEADERS

    def _read(self) -> tuple[int, int]:
        return self._value("tx_bytes"), self._value("tx_packets")

    def _value(self, name: str) -> int:
        return int((self._folder / name).read_text())


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
