"""What hostile files are put into, and every command that loads something, as a command line over these files."""

import contextlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shard_sets import members_of, write
from tu_diffuse.cli.main import run
from tu_diffuse.errors import TuDiffuseError
from tu_diffuse.pipeline.metadata import encode_picture, open_picture, read_metadata
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.training.forking import fork


@dataclass(frozen=True)
class Scene:
    """Good files in one folder, each of which a case may replace."""

    root: Path

    @property
    def model(self) -> Path:
        """A folder; in some cases a single file."""
        return next(self.root.glob("model*"))

    @property
    def shard(self) -> Path:
        return self.root / "a.tar"

    @property
    def picture(self) -> Path:
        return self.root / "a.png"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.jsonl"

    @property
    def pictures(self) -> Path:
        """Of `batch`."""
        return self.root / "pictures"

    @property
    def tuned(self) -> Path:
        """Of `finetune`."""
        return self.root / "tuned"

    @property
    def adapter(self) -> Path:
        """A LoRA or embedding, where a case has one."""
        return next(self.root.glob("adapter*"))

    @property
    def out(self) -> Path:
        """Where a command writes."""
        return self.root / "out"

    def copy(self, root: Path) -> "Scene":
        """The same files under other names; to be replaced, not written into."""
        shutil.copytree(self.root, root, copy_function=os.link)
        return Scene(root)


def put(path: Path, content: bytes | str | dict[str, Any]) -> Path:
    """Write a file in place of what has its name, leaving other links to that alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else json.dumps(content).encode())
    return path


FINETUNE = ["--steps", "4", "--batch-size", "2", "--resolution", "32", "--workers", "0", "--threads", "1", "--device", "cpu", "--save-every", "2"]
FINETUNE += ["--lora", "2", "--ema-posthoc", "1"]

Commands = dict[str, Callable[[Scene], list[Any]]]


def _replay(scene: Scene) -> list[Any]:
    """Of a picture that says it was made with the model as it now is, as far as that can be told."""
    try:
        settings = read_metadata(scene.picture)
        with open_picture(scene.picture) as image:
            data = encode_picture(image.convert("RGB"), settings | {"model": {"name": "model", "hash": open_folder(scene.model).fingerprint}}, "png")
        scene.picture.unlink()
        scene.picture.write_bytes(data)
    except TuDiffuseError:
        pass
    return ["replay", scene.picture, "--model", scene.model]


MODEL: Commands = {
    "generate": lambda s: ["generate", "a", "--model", s.model, "--out", s.out / "a.png", "--seed", "1"],
    "generate --offload": lambda s: [*MODEL["generate"](s), "--offload"],
    "generate --quantize": lambda s: [*MODEL["generate"](s), "--quantize", "int8"],
    "batch": lambda s: ["batch", s.prompts, "--model", s.model, "--out", s.out],
    "replay": _replay,
    "info": lambda s: ["info", s.model],
    "models info": lambda s: ["models", "info", s.model],
    "models verify": lambda s: ["models", "verify", s.model],
    "models convert": lambda s: ["models", "convert", s.model, "--out", s.out],
    "finetune": lambda s: ["finetune", "--shards", s.shard, "--model", s.model, "--out", s.out, *FINETUNE],
    "finetune, resumed": lambda s: ["finetune", "--shards", s.shard, "--model", s.model, "--out", s.tuned, *FINETUNE],
    "average": lambda s: ["average", s.tuned, "--model", s.model, "--sigma-rel", "0.05", "--out", s.out],
    "shards encode": lambda s: ["shards", "encode", s.shard, "--model", s.model, "--out", s.out, "--resolution", "32"],
    "experts show": lambda s: ["experts", "show", s.model],
    "experts fork": lambda s: ["experts", "fork", s.model, "--expert", "low", "--at-sigma", "0.5", "--out", s.out],
    "experts compose": lambda s: ["experts", "compose", s.model, s.model, "--border-sigma", "2", "--out", s.out],
    "experts merge": lambda s: ["experts", "merge", s.model, "--out", s.out],
    "experts drop": lambda s: ["experts", "drop", s.model, "--expert", "low", "--to", "higher", "--out", s.out],
    "experts suggest-boundary": lambda s: [
        *["experts", "suggest-boundary", s.model, "--expert", "low", "--shards", s.shard, "--samples", "8", "--bins", "2"]
    ],
}
LOADED_OTHERWISE = ("generate --offload", *(("generate --quantize",) if find_spec("torchao") is not None else ()))
"""What must refuse all models that `generate` refuses, in the same way."""
SHARDS: Commands = {
    "shards check": lambda s: ["shards", "check", s.shard],
    "shards stats": lambda s: ["shards", "stats", s.shard],
    "shards filter": lambda s: ["shards", "filter", s.shard, "--out", s.out, "--verify-pictures", "--skip-damaged", "--max-lost", "1"],
}
PICTURE: Commands = {
    "info": lambda s: ["info", s.picture],
    "replay": lambda s: ["replay", s.picture, "--model", s.model],
}
PICTURES: Commands = {"batch": lambda s: ["batch", s.prompts, "--model", s.model, "--out", s.pictures]}
LORA: Commands = {
    "generate --lora": lambda s: [*MODEL["generate"](s), "--lora", s.adapter],
    "batch --lora": lambda s: [*MODEL["batch"](s), "--lora", s.adapter],
    "replay --lora": lambda s: [*PICTURE["replay"](s), "--lora", s.adapter],
}
EMBEDDING: Commands = {
    "generate --embedding": lambda s: [*MODEL["generate"](s), "--embedding", f"{s.adapter}=a"],
    "batch --embedding": lambda s: [*MODEL["batch"](s), "--embedding", f"{s.adapter}=a"],
}
SCORES: Commands = {"batch --score-model": lambda s: [*MODEL["batch"](s), "--best-of", "2", "--score-model", s.root / "scores"]}
EVERY = MODEL | SHARDS | PICTURE | PICTURES | LORA | EMBEDDING | SCORES


def make_scene(root: Path, ensemble: Path) -> Scene:
    """An ensemble with two experts that are deltas of a third, and what each command made with it; the run of training can go on."""
    scene = Scene(root)
    fork(open_folder(ensemble), [5.0], root / "model", expert="high")
    write(scene.shard, members_of(12))
    scene.prompts.write_text('{"prompt": "a", "seed": 1, "steps": 1}\n{"prompt": "b", "seed": 2, "steps": 1}\n')
    model = ["--model", str(scene.model)]
    assert run(["generate", "a", *model, "--out", str(scene.picture), "--steps", "1", "--seed", "1"]) == 0
    assert run(["batch", str(scene.prompts), *model, "--out", str(scene.pictures)]) == 0
    assert run(["finetune", "--shards", str(scene.shard), *model, "--out", str(scene.tuned), *FINETUNE]) == 0
    shutil.rmtree(scene.tuned / "checkpoints" / "checkpoint-00000004")
    shutil.rmtree(scene.tuned / "model")
    for path in scene.tuned.glob("*.*"):
        path.unlink()
    return scene


@contextlib.contextmanager
def bounded(megabytes: int) -> Iterator[None]:
    """At most so much more address space, so that a large allocation fails at once, and 20 seconds of CPU time."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, hard))
    before = time.process_time()
    try:
        yield
        assert time.process_time() - before < 20
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
