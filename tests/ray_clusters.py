"""Ray clusters of several nodes on this machine: each node is a raylet of its own, as if it were another machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from tu_diffuse.batch.cluster import Piece, _Worker

OPTIONS = ("--num-cpus", "1", "--object-store-memory", str(80 * 2**20), "--disable-usage-stats", "--include-log-monitor", "false")
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
QUIET |= {"PYTHONPATH": str(Path(__file__).parent)}  # workers import `Dying` from here
_MARK = "FOLDER_OF_THE_RAY_CLUSTER"


@contextmanager
def ray_cluster(nodes: int) -> Generator[str]:
    """A cluster of nodes with one CPU each; gives the address of its head. Its processes and files are gone afterwards, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="rays-", dir="/tmp"))  # a socket's path has room for 107 bytes
    try:
        said = _start(folder, "--head", "--port=0", f"--ray-client-server-port={_free_port()}", "--include-dashboard=false", f"--temp-dir={folder}")
        found = re.search(r"--address='([^']+)'", said)
        assert found is not None, said
        for _ in range(nodes - 1):
            _start(folder, f"--address={found[1]}")
        yield found[1]
    finally:
        gone = processes(folder)
        for process in gone:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(gone, timeout=60)
        shutil.rmtree(folder)


def _start(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *OPTIONS, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET | {_MARK: str(folder)}, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def processes(folder: Path) -> list[psutil.Process]:
    """Everything that runs for the cluster that keeps its files in a folder."""
    started = [process for process in psutil.process_iter() if _mark(process) == str(folder)]
    return [*started, *(child for process in started if process.is_running() for child in process.children(recursive=True))]


class Dying(_Worker):
    """A worker that one prompt kills."""

    PROMPT = "deadly"

    def _draw(self, piece: Piece, send: Callable[..., None]) -> None:
        super()._draw([batch for batch in piece if batch[0].request.prompt != self.PROMPT], send)
        if any(batch[0].request.prompt == self.PROMPT for batch in piece):
            os.kill(os.getpid(), signal.SIGKILL)


def drawing() -> list[psutil.Process]:
    """The workers that draw: actors have their class and method as their name."""
    return [process for process in psutil.process_iter() if any(part.startswith("ray::_Worker") for part in _said(process))]


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(_MARK)
    except psutil.Error:
        return None


def _said(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
