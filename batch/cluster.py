"""Drawing on a Ray cluster: its workers compute batches and send each picture back as bytes; this process alone writes the folder.

So the machines share no file system. Each needs tu-diffuse, and the model's folder under the same path unless it is the embedded model.
"""

import logging
import os
import secrets
import signal
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from .. import __version__
from ..allocator import keep_freed_memory
from ..errors import ModelError, RenderError, UsageError
from ..pipeline.adapters.lora_files import lora_sha256
from ..pipeline.model.folder import EMBEDDED, ModelFolder, open_folder
from ..pipeline.model.place import Place, choose_place
from .drafts import Drawn, Lost, Stepped
from .engine import render
from .items import Item
from .journal import Entry
from .plan import Plan
from .run import Encoded, drawn_together, encoded, keep, missing_batches, missing_items
from .scores import ScoreModel, Scorer, keep_best, load_scorer, open_score_model
from .studio import WINDOW_SHARE, Studio, memory_budget

TRIES = 2  # of a batch whose worker dies
_STORE = 256 * 2**20  # bytes of Ray's object store on a cluster of our own; pictures are in it for moments
_PER_WORKER = 2  # the next piece is this part of a worker's fair share of what is left

Piece = Sequence[Sequence[Item]]
"""Batches that a worker draws without asking again."""

Message = Stepped | Encoded | Lost | Counter[str]
"""What a worker sends: steps and pictures as they are made, at the end of a piece its loads."""


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to.

    Attributes:
        workers: that fit on it: one a GPU, or one for every so many cores as this process computes with.
        needs: of each, as Ray's options.
        neighbours: most workers of one machine, which share its memory.
    """

    workers: int
    needs: Mapping[str, float]
    neighbours: int


@dataclass(frozen=True)
class Task:
    """What all workers are told.

    Attributes:
        version: of this program, which must be theirs.
        model: folder of the model on their machines; None is the embedded one.
        fingerprint: that it must have.
        place: where they compute.
        threads: that they compute with on a CPU: those of this process, since the last bits of a sum may depend on them.
        gib: of memory to stay within on each machine, or None; see `memory_budget`.
        neighbours: see `Cluster`.
        clip: what scores candidates, where items have some.
        files: see `Studio`; on their machines too.
        size: what the model takes in memory, see `model_bytes`.
        variant: of the model's weights, see `ModelFolder`.
    """

    version: str
    model: Path | None
    fingerprint: str
    place: Place
    threads: int
    gib: float | None
    neighbours: int
    clip: ScoreModel | None
    files: Mapping[str, Path]
    size: int
    variant: str | None = None


def make_task(
    folder: ModelFolder, place: Place, gib: float | None, cluster: Cluster, clip: ScoreModel | None, files: Mapping[str, Path], size: int
) -> Task:
    """What the workers of a cluster are told of a model and files that lie here."""
    path = None if folder.path == EMBEDDED else folder.path.absolute()
    scores = clip if clip is None or clip.folder is None else replace(clip, folder=clip.folder.absolute())
    beside = {sha256: file.absolute() for sha256, file in files.items()}
    return Task(__version__, path, folder.fingerprint, place, torch.get_num_threads(), gib, cluster.neighbours, scores, beside, size, folder.variant)


@contextmanager
def connected(address: str, device: str) -> Generator[Cluster]:
    """Connect to a cluster, or start one on this machine and stop it again.

    Args:
        address: HOST:PORT of its head, "auto" for one that was started on this machine, or "local" to start one, which listens to nobody else.
        device: "auto" takes GPUs where the cluster has any.

    Raises:
        UsageError: Ray is not installed, or no cluster is there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":  # set before the import, which reads them
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs Ray, which is not installed; run pip install 'tu-diffuse[ray]'.") from None
    if "://" in address:
        raise UsageError(f"--ray {address} goes through Ray's client; run the command on a machine of the cluster, with --ray HOST:PORT or auto.")
    started: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tu-ray-", ignore_cleanup_errors=True) as folder, Path(os.devnull).open("w") as nowhere:
        if address == "local":
            started = {"include_dashboard": False, "object_store_memory": _STORE, "_temp_dir": folder}
        terminate = signal.getsignal(signal.SIGTERM)
        with redirect_stdout(nowhere):  # Ray prints there when a worker dies
            try:
                with _signals_as_raised():
                    ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **started)
                signal.signal(signal.SIGTERM, terminate)  # which Ray has replaced
            except SystemExit:  # from Ray's handler of SIGTERM
                ray.shutdown()
                signal.signal(signal.SIGTERM, terminate)
                signal.raise_signal(signal.SIGTERM)
                raise
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UsageError(f"--ray {address} does not answer ({reason}); start a cluster with ray start --head, or use --ray local.") from None
            try:
                yield _measured([node["Resources"] for node in ray.nodes() if node["Alive"]], device)
            finally:
                ray.shutdown()


def _measured(machines: Sequence[Mapping[str, float]], device: str) -> Cluster:
    """How many workers fit on machines with these resources."""
    gpus = [int(machine.get("GPU", 0)) for machine in machines]
    if sum(gpus) and device in ("auto", "cuda"):
        return Cluster(sum(gpus), {"num_gpus": 1}, 1)
    cores = [int(machine.get("CPU", 0)) for machine in machines]
    if not any(cores):
        raise UsageError("the Ray cluster has neither GPUs nor CPUs to give; start its nodes with --num-cpus 1 or more.")
    each = min(torch.get_num_threads(), max(cores))
    return Cluster(sum(one // each for one in cores), {"num_cpus": each}, max(one // each for one in cores))


def place_on(cluster: Cluster, dtype: str, device: str, attention: str, quantize: str, offload: bool) -> Place:
    """Where its workers compute, asked of one of them.

    Raises:
        UsageError: see `choose_place`.
    """
    import ray

    ask: Any = ray.remote(choose_place)
    return _received(ask.options(**cluster.needs).remote(dtype, device, attention, quantize, offload))


def draw_on_cluster(
    cluster: Cluster,
    task: Task,
    plan: Plan,
    done: Mapping[str, Entry],
    out: Path,
    part: tuple[int, int],
    loads: Counter[str],
    tell: Callable[[Stepped], None],
    kept: Callable[[Entry], None],
    died: Callable[[str], None],
) -> None:
    """Draw what is not done, each item in its planned batch, on all workers of a cluster.

    What a worker that dies had not yet sent is drawn by another: in two halves, so that a batch that kills its workers is found and left out while
    its neighbours are drawn.

    Args:
        cluster: where.
        task: for its workers.
        plan, done, out, part, tell: see `run.draw_missing`.
        loads: part of the model -> how often it was loaded; the workers' are added.
        kept: told of each item that was drawn or lost, once it is in the journal.
        died: told of each worker that died, why.

    Raises:
        RenderError: workers died twice of the same batch; raised when the others are done.
        OutputError: a picture or the journal cannot be written.
        TuDiffuseError: from any worker: the model is not there, or is another one.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    missing = missing_items(plan, done)
    waiting = deque(pieces([drawn_together(batch) for batch in missing_batches(plan, missing, part)], cluster.workers))
    make = ray.remote(_Worker).options(**cluster.needs)
    busy: dict[Any, tuple[Any, Piece]] = {}
    deaths: Counter[str] = Counter()
    given_up = 0

    def hand_out(worker: Any) -> None:
        piece = waiting.popleft()
        busy[worker.draw.options(num_returns="streaming").remote(piece)] = worker, piece

    for _ in range(min(cluster.workers, len(waiting))):
        hand_out(make.remote(task))
    while busy:
        with _signals_as_raised():
            stream: Any = ray.wait(list(busy), num_returns=1)[0][0]
        worker, piece = busy.pop(stream)
        try:
            with _signals_as_raised():
                reference = next(stream)
            message: Message = _received(reference)
        except StopIteration:
            if waiting:
                hand_out(worker)
            else:
                ray.kill(worker)  # another may be waiting for its place
            continue
        except RayTaskError:
            raise
        except RayError as error:
            ray.kill(worker)
            died(str(error).strip().splitlines()[0])
            left = [batch for batch in piece if any(item.asked in missing for item in batch)]
            if len(left) == 1:
                deaths[left[0][0].key] += 1
            if len(left) == 1 and deaths[left[0][0].key] == TRIES:
                given_up += 1
            else:
                half = (len(left) + 1) // 2
                waiting.extend(one for one in (left[:half], left[half:]) if one)
            if waiting:
                hand_out(make.remote(task))
            continue
        busy[stream] = worker, piece  # behind the others
        if isinstance(message, Stepped):
            tell(message)
        elif isinstance(message, Encoded | Lost):
            if (planned := missing.pop(message.item.key, None)) is not None:
                keep(planned, message, out, kept)
        else:
            loads.update(message)
    if given_up:
        raise RenderError(f"workers died {TRIES} times of each of {given_up} batches; run the same command again to draw what they left.")


def pieces(batches: Sequence[Sequence[Item]], workers: int) -> Iterator[Piece]:
    """Batches in pieces that grow smaller: large at first, so that parts of a model are loaded seldom; single at last, so that all end together.

    Guided self-scheduling (Polychronopoulos and Kuck 1987, doi 10.1109/TC.1987.5009495), with half of a worker's fair share.
    """
    first = 0
    while first < len(batches):
        size = max(1, (len(batches) - first) // (_PER_WORKER * workers))
        yield batches[first : first + size]
        first += size


@contextmanager
def _signals_as_raised() -> Generator[None]:
    """What a signal's handler raises inside Ray's compiled code comes out of it as the cause of a SystemError."""
    try:
        yield
    except SystemError as error:
        raise (error if error.__cause__ is None else error.__cause__) from None


def _received(reference: Any) -> Any:
    """What a reference stands for; an error of the code that ran there is raised as itself."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        with _signals_as_raised():
            return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise


class _Worker:
    """An actor: keeps the model from piece to piece."""

    def __init__(self, task: Task) -> None:
        keep_freed_memory()
        self._task = task
        self._studio: Studio | None = None
        self._scorer: Scorer | None = None
        self._window = 0

    def draw(self, piece: Piece) -> Iterator[Message]:
        """Draw in a thread, and send while it goes on."""
        made: SimpleQueue[Stepped | Drawn | Lost | Counter[str] | None] = SimpleQueue()
        with ThreadPoolExecutor(1) as thread:
            work = thread.submit(self._draw, piece, made.put)
            work.add_done_callback(lambda _: made.put(None))
            while (message := made.get()) is not None:
                yield encoded(message) if isinstance(message, Drawn) else message
            work.result()

    def _opened(self) -> Studio:
        """The model, which must be that of the run.

        Raises:
            ModelError: it or a file beside it is another one, or this is another version of the program.
        """
        if self._studio is not None:
            return self._studio
        task = self._task
        if task.version != __version__:
            raise ModelError(f"a machine of the cluster has tu-diffuse {__version__}, and this is {task.version}; install the same there.")
        torch.set_num_threads(task.threads)
        folder = open_folder(task.model, variant=task.variant)
        if folder.fingerprint != task.fingerprint:
            raise ModelError(f"model {folder.name!r} on a machine of the cluster is not the one here; copy it to the same path on all of them.")
        if task.clip is not None:
            if open_score_model(task.clip.folder).hash != task.clip.hash:
                named = "the embedded CLIP pair" if task.clip.folder is None else f"score model {task.clip.folder.name!r}"
                raise ModelError(f"{named} on a machine of the cluster is not the one here; copy it to all of them.")
            self._scorer = load_scorer(task.clip, task.place.device)
        for sha256, file in task.files.items():
            if not file.is_file() or lora_sha256(file) != sha256:
                raise ModelError(f"{file.name!r} on a machine of the cluster is not the file here; copy it to the same path on all of them.")
        budget = memory_budget(task.gib, task.place) // task.neighbours
        self._window = budget // WINDOW_SHARE
        self._studio = Studio(folder, task.place, roomy=task.size < budget, files=task.files)
        return self._studio

    def _draw(self, piece: Piece, send: Callable[[Stepped | Drawn | Lost | Counter[str]], None]) -> None:
        studio = self._opened()
        before = Counter(studio.loads)
        results = render(studio, piece, self._window, None, send)
        for result in results if self._scorer is None else keep_best(results, self._scorer):
            send(result)
        send(Counter(studio.loads) - before)
