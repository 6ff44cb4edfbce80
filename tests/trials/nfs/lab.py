"""A real NFS on one machine: a server in user space (nfs-ganesha) and clients that are kernels of their own.

A client is a User-Mode Linux, so it has caches, locks and a connection to the server that nothing else shares. Server,
clients and the network between them live in name spaces of their own, and end with the process that made them: nothing
of the machine is changed, and nothing is left of it.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trials.registry import Unavailable

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SERVER, NETWORK = "10.77.0.1", "10.77.0"
LEASE_S = 10
"""What the server grants and how long it waits after a start, instead of the usual 60 to 90 s."""
SAFE, FAST = "eth0", "vec0"
_CARDS = {SAFE: "eth0=tuntap,{}", FAST: "vec0:transport=tap,ifname={},depth=128,gro=1"}
"""The second one is many times as fast, and at times falls silent for minutes."""
STUCK_S = 600.0
"""A job that takes longer hangs."""
_PROGRAMS = (
    "unshare",
    "linux.uml",
    "ganesha.nfsd",
    "rpcbind",
    "rpc.statd",
    "mount.nfs",
    "ip",
    "busybox",
    "cc",
)
_PACKAGES = (
    "nfs-ganesha, nfs-ganesha-vfs, nfs-common, rpcbind, user-mode-linux, iproute2, busybox-static and gcc"
)
_CONFIGURATION = """
NFS_CORE_PARAM {{ Protocols = 3, 4; Bind_addr = {server}; Enable_RQUOTA = false; MNT_Port = 20048; NLM_Port = 32803; }}
NFSv4 {{ Grace_Period = {lease_s}; Lease_Lifetime = {lease_s}; RecoveryBackend = fs; Minor_Versions = 1; }}
EXPORT {{
    Export_Id = 7; Path = {export}; Pseudo = /cache; Access_Type = RW; Squash = No_Root_Squash; SecType = sys;
    Protocols = 3, 4; Transports = TCP; FSAL {{ Name = VFS; }}
}}
LOG {{ Default_Log_Level = EVENT; }}
"""


def require() -> None:
    """Raises Unavailable where this machine lacks something."""
    if os.getuid() != 0 or not all(map(shutil.which, _PROGRAMS)) or not Path("/dev/net/tun").exists():
        raise Unavailable(f"takes root, /dev/net/tun and the packages {_PACKAGES}")


def run_apart(*arguments: str) -> Any:
    """`python -m trials.nfs.alone ARGUMENTS` in name spaces of its own: what it prints last, in JSON.

    Raises AssertionError with what it said where it failed.
    """
    spaces = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "benchmarks")])
    # Open as long as this process lives: `alone.py` ends, and all that it has started with it, when it is closed.
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            [*spaces, sys.executable, "-m", "trials.nfs.alone", *arguments],
            stdin=reading, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    finally:
        os.close(reading)
        os.close(writing)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


class Server:
    """nfs-ganesha; `export` is the folder that clients see."""

    def __init__(self, folder: Path) -> None:
        self.export, self._folder = folder / "export", folder
        self.export.mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        for state in ("/run", "/var/lib/nfs"):
            _do("mount", "-t", "tmpfs", "none", state)
        for made in (
            "/run/ganesha",
            "/run/rpcbind",
            "/var/lib/nfs/ganesha/v4recov",
            "/var/lib/nfs/ganesha/v4old",
        ):
            Path(made).mkdir(parents=True)
        (folder / "ganesha.conf").write_text(
            _CONFIGURATION.format(server=SERVER, export=self.export, lease_s=LEASE_S)
        )
        for made in ("sm", "sm.bak"):
            Path("/var/lib/nfs", made).mkdir()
        subprocess.Popen(["rpcbind", "-w", "-f"], stderr=subprocess.DEVNULL)
        time.sleep(0.3)
        _do("rpc.statd", "--no-notify")

    def start(self) -> None:
        log = self._folder / "ganesha.log"
        started = log.read_text().count("SERVER INITIALIZED") if log.exists() else 0
        command = ["ganesha.nfsd", "-F", "-f", str(self._folder / "ganesha.conf"), "-L", str(log)]
        self._process = subprocess.Popen(
            [*command, "-p", "/run/ganesha.pid"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(600):
            if log.exists() and log.read_text().count("SERVER INITIALIZED") > started:
                return
            assert self._process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)
        raise AssertionError(f"the server does not start: {log.read_text()[-2000:]}")

    def kill(self) -> None:
        """As by SIGKILL: it tells nobody. Its kernel's memory stays, as where only the service is restarted."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        Path("/run/ganesha.pid").unlink(missing_ok=True)


class Job:
    """A call in a process of its own on a client."""

    def __init__(self, client: Client, number: int) -> None:
        self._client, self.number = client, number
        self.said: list[Any] = []
        """What it has told so far."""
        self.answers: queue.Queue[dict[str, Any]] = queue.Queue()

    def result(self, timeout_s: float = STUCK_S) -> Any:
        """What it returned. Raises AssertionError with its traceback, or where it does not end."""
        answer = self.end(timeout_s)
        assert "value" in answer, f"{self._client.name}: {answer.get('error', answer)}"
        return answer["value"]

    def end(self, timeout_s: float = STUCK_S) -> dict[str, Any]:
        """How it ended: `value`, `error` or `status`."""
        try:
            return self.answers.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(
                f"{self._client.name}: a job hangs, after it said {self.said[-3:]}"
            ) from None

    def kill(self) -> None:
        """SIGKILL to it and all that it has started."""
        self._client.send({"kill": self.number})


class Client:
    """A User-Mode Linux that has mounted the export on /mnt/cache."""

    def __init__(self, folder: Path, number: int, version: str, card: str, shim: Path) -> None:
        self.name, self._folder, self._shim = f"client{number}", folder, shim
        self._card = card
        self._address, self.version = f"{NETWORK}.{10 + number}", version
        _do("ip", "tuntap", "add", "dev", self.name, "mode", "tap")
        _do("ip", "link", "set", self.name, "master", "lab", "up")
        self._jobs: dict[int, Job] = {}
        self.boot()

    def boot(self) -> None:
        """Begin to start; `wait` until it is there."""
        settings = {
            "ADDRESS": self._address, "CARD": self._card, "SHARED": self._folder / "shared", "PYTHON": sys.executable,
            "SOURCES": ":".join(str(ROOT / part) for part in ("src", "tests", "benchmarks")),
        }  # fmt: skip
        command = [
            "linux.uml", "mem=1500M", "rootfstype=hostfs", "rootflags=/", "ro", "quiet",
            f"init={HERE / 'first_process.sh'}", _CARDS[self._card].format(self.name),
            "con=null", "con0=null,fd:2", "ssl=null", "ssl0=fd:0,fd:1", "uml_dir=/run/uml", f"umid={self.name}",
            *(f"{name}={value}" for name, value in settings.items()),
        ]  # fmt: skip
        with (self._folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                env={"PATH": os.environ["PATH"], "LD_PRELOAD": str(self._shim)},
            )  # fmt: skip
        self._ready = threading.Event()
        threading.Thread(target=self._listen, args=(self._process.stdout, self._ready), daemon=True).start()

    def wait(self) -> None:
        assert self._ready.wait(STUCK_S), f"{self.name} does not start: {self._log()}"
        self.call("mount", version=self.version, server=SERVER, export=str(self._folder / "export"))

    def crash(self) -> None:
        """As by pulling its plug: nothing is told to the server, and its memory is gone."""
        os.killpg(self._process.pid, 9)
        self._process.wait()
        self._jobs.clear()

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """As long as this lasts the server cannot be reached, and nobody is told."""
        _do("ip", "link", "set", self.name, "nomaster")
        try:
            yield
        finally:
            _do("ip", "link", "set", self.name, "master", "lab")

    def start(self, call: str, **arguments: Any) -> Job:
        """Call a function of `trials.nfs.jobs` there."""
        number = len(self._jobs)
        job = self._jobs[number] = Job(self, number)
        self.send({"id": number, "call": call, "arguments": arguments})
        return job

    def call(self, call: str, **arguments: Any) -> Any:
        return self.start(call, **arguments).result()

    def send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _listen(self, stream: Any, ready: threading.Event) -> None:
        for line in stream:
            with suppress(ValueError):
                message = json.loads(line)
                if "ready" in message:
                    ready.set()
                elif "said" in message:
                    self._jobs[message["id"]].said.append(message["said"])
                else:
                    self._jobs[message["id"]].answers.put(message)

    def _log(self) -> str:
        return (self._folder / f"{self.name}.log").read_text(errors="replace")[-3000:]


class Lab:
    """A running server and its clients."""

    def __init__(self, folder: Path, version: str, *, card: str = SAFE) -> None:
        """`card`: how clients are connected, see `_CARDS`."""
        (folder / "shared").mkdir()
        shim = folder / "wide_registers.so"
        _do("cc", "-O2", "-shared", "-fPIC", "-o", str(shim), str(HERE / "wide_registers.c"))
        _do("ip", "link", "set", "lo", "up")
        _do("ip", "link", "add", "lab", "type", "bridge")
        _do("ip", "addr", "add", f"{SERVER}/24", "dev", "lab")
        _do("ip", "link", "set", "lab", "up")
        self.shared = folder / "shared"
        """/mnt/shared of all clients, not through NFS."""
        self.server = Server(folder)
        self.server.start()
        Path("/run/uml").mkdir()
        self.clients = [Client(folder, number, version, card, shim) for number in (1, 2)]
        for client in self.clients:
            client.wait()

    @property
    def export(self) -> Path:
        """/mnt/cache of all clients."""
        return self.server.export


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
