"""Models of the hub: fetched from a stand-in that is unreliable in every way that we know of, found in the cache, and what is said when it fails."""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hub_stand_in import Hub, files_below, hub_stand_in, use_hub
from safetensors.numpy import save
from tu_diffuse.errors import HubError, ModelError, OutputError, TuDiffuseError, UnsafeError, UsageError
from tu_diffuse.pipeline.hub import pull as hub_pull
from tu_diffuse.pipeline.hub.found import found
from tu_diffuse.pipeline.hub.models import HubName, cached, hub_name, origin_of
from tu_diffuse.pipeline.hub.pull import fetch, plan_pull

REPO = "me/it"
NAME = HubName(REPO)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_stand_in() as stand_in:
        use_hub(stand_in, tmp_path / "cache", monkeypatch)
        yield stand_in


def repository(number: int = 0) -> dict[str, bytes]:
    """A model folder in name only, all of whose files differ from those of another number."""
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    return {
        "model_index.json": json.dumps(index | {"number": number}).encode(),
        "scheduler/scheduler_config.json": json.dumps({"number": number}).encode(),
        "unet/config.json": json.dumps({"width": number}).encode(),
        WEIGHTS: save({"a": np.full(300, number, np.float32)}),
        "unet/diffusion_pytorch_model.bin": b"pickle",
    }


WANTED = set(repository()) - {"unet/diffusion_pytorch_model.bin"}


def pull(name: HubName = NAME, **options: Any) -> Path:
    return fetch(plan_pull(name, **options), lambda work, file: None)


def content(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_below(folder).items() if not name.startswith(".")}


@pytest.mark.parametrize(
    "text", ["a", "./a/b", "/a/b", "a/b/c", "a/../b", "a/b@", "a/b@../c", "a/b.safetensors", "a/b.ckpt", "C:/b", "a b/c", "", "a--b/c"]
)
def test_names_that_are_no_hub_names(text: str):
    assert hub_name(text) is None


def test_hub_names():
    assert hub_name("own.er/na_me-1.5") == HubName("own.er/na_me-1.5", None)
    assert hub_name("owner/name@refs/pr/3") == HubName("owner/name", "refs/pr/3")


def test_every_file_is_of_one_commit_however_main_moves(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Somebody pushes before request k, for every k, and before each."""
    hub.push(REPO, repository())
    pull()
    asked = len(hub.requests)
    assert asked >= 2 + 2 * len(WANTED)
    kept = set[str]()
    for k in [*range(1, asked + 1), None]:
        count = iter(range(1, 1000))

        def before(count: Iterator[int] = count, k: int | None = k):
            now = next(count)
            if k in (now, None):
                hub.push(REPO, repository(1000 * (k or 99) + now))

        hub.before = before
        use_hub(hub, tmp_path / f"cache-{k}", monkeypatch)
        folder = pull()
        origin = origin_of(folder)
        assert origin is not None
        assert origin.revision is not None
        pushed = hub.commits[REPO][origin.revision]
        assert content(folder) == {name: pushed[name] for name in WANTED}
        kept.add(origin.revision)
    assert len(kept) > 2  # some were resolved after the push


def test_a_cached_model_stays_until_it_is_pulled_again(hub: Hub):
    old = hub.push(REPO, repository(1))
    first = found(Path(REPO))  # fetched
    new = hub.push(REPO, repository(2))
    asked = len(hub.requests)
    assert found(Path(REPO)) == first
    assert len(hub.requests) == asked
    assert origin_of(pull()) == HubName(REPO, new)
    assert origin_of(found(Path(REPO))) == HubName(REPO, new)
    assert found(Path(f"{REPO}@{old}")) == first
    hub.push(REPO, repository(3), branch="v3")
    assert content(found(Path(f"{REPO}@v3")))[WEIGHTS] == repository(3)[WEIGHTS]
    assert origin_of(found(Path(REPO))) == HubName(REPO, new)


def test_what_is_there_wins(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.push(REPO, repository())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    with pytest.raises(UsageError, match="is not there, though me/ is"):
        found(Path(REPO))
    (tmp_path / "me" / "it").mkdir()
    assert found(Path(REPO)) == Path(REPO)
    assert hub.requests == []


def test_nothing_is_fetched_twice(hub: Hub):
    hub.push(REPO, repository(1))
    pull()
    assert sorted(hub.downloads()) == sorted([*WANTED, "model_index.json"])  # once to read, once for the cache
    hub.requests.clear()
    pull()
    assert hub.downloads() == []
    hub.push(REPO, repository(1) | {"unet/config.json": b"{}"})
    pull()
    assert set(hub.downloads()) == {"unet/config.json", "model_index.json"}


def test_a_broken_download_is_taken_up_where_it_broke(hub: Hub):
    hub.push(REPO, repository(1))
    hub.cut[WEIGHTS] = [512, 2]
    assert content(pull())[WEIGHTS] == repository(1)[WEIGHTS]
    assert [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(WEIGHTS)] == ["", "bytes=512-", "bytes=1024-"]


def test_a_pull_that_breaks_off_keeps_whole_files_and_goes_on(hub: Hub):
    hub.push(REPO, repository(1))
    hub.cut[WEIGHTS] = [0, 1000]
    with pytest.raises(HubError, match="run the same command again"):
        pull()
    assert cached(NAME) is None
    hub.cut.clear()
    hub.requests.clear()
    assert content(pull())[WEIGHTS] == repository(1)[WEIGHTS]
    assert set(hub.downloads()) == {WEIGHTS, "model_index.json"}


@pytest.mark.parametrize(
    "lie", [b"<html>blocked</html>", repository(2)[WEIGHTS], b"", repository(1)[WEIGHTS] + b"x"], ids=["page", "bytes", "none", "more"]
)
@pytest.mark.parametrize("name", [WEIGHTS, "unet/config.json"])
def test_other_content_than_recorded_is_refused(hub: Hub, name: str, lie: bytes):
    hub.push(REPO, repository(1))
    hub.lies[name] = lie
    with pytest.raises(HubError, match="run the same command again"):
        pull()
    assert cached(NAME) is None
    hub.lies.clear()
    assert content(pull())[name] == repository(1)[name]


def test_wrong_sizes_are_refused(hub: Hub):
    hub.push(REPO, repository(1))
    hub.sizes[WEIGHTS] = 4000
    with pytest.raises(HubError, match="did not come whole"):
        pull()
    assert cached(NAME) is None


@pytest.mark.parametrize(
    ("name", "locked", "error", "said"),
    [
        ("me/nobody", 0, UsageError, "the hub has no model 'me/nobody'"),
        (f"{REPO}@v9", 0, UsageError, "has no revision 'v9'"),
        (f"{REPO}@{'0' * 40}", 0, UsageError, "has no revision"),
        (REPO, 401, UsageError, "gated: .* HF_TOKEN"),
        (REPO, 403, UsageError, "gated: .* HF_TOKEN"),
        (REPO, 500, HubError, "answers 500"),
    ],
)
def test_refusals(hub: Hub, name: str, locked: int, error: type[TuDiffuseError], said: str):
    hub.push(REPO, repository())
    hub.locked[REPO] = locked
    with pytest.raises(error, match=said):
        found(Path(name))


def test_a_token_goes_to_the_hub_and_nowhere_else(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.push(REPO, repository())
    hub.locked[REPO] = 401
    monkeypatch.setenv("HF_TOKEN", "right")
    assert set(content(pull())) == WANTED
    assert len(hub.tokens) > 5
    assert not any(path.startswith("/cdn/") for path in hub.tokens)


def test_a_hub_that_is_not_there(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_hub(Hub(url="http://127.0.0.1:9"), tmp_path / "cache", monkeypatch)
    with pytest.raises(HubError, match="cannot be reached"):
        found(Path(REPO))


def test_a_commit_that_is_none(hub: Hub, tmp_path: Path):
    hub.push(REPO, repository())
    hub.commits[REPO]["../../../x"] = repository()
    hub.refs[REPO]["main"] = "../../../x"
    with pytest.raises(HubError, match="which is none"):
        pull()
    assert not (tmp_path / "cache").exists()


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.push(REPO, repository())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="offline nothing is fetched"):
        found(Path(REPO))
    assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = pull()
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found(Path(REPO)) == folder
    (folder / "model_index.json").unlink()  # as after a pull that was killed
    with pytest.raises(UsageError, match="offline nothing is fetched"):
        found(Path(REPO))
    assert hub.requests == []


def test_a_disk_that_is_too_small(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.push(REPO, repository())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"0\.0 MB free"):
        pull()
    assert set(hub.downloads()) == {"model_index.json"}
    assert cached(NAME) is None


def test_a_disk_that_fills_up(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.push(REPO, repository())
    work = plan_pull(NAME)

    def full(*args: object, **options: object):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_pull, "hf_hub_download", full)
    with pytest.raises(OutputError, match=r"No space left on device.*HF_HOME"):
        fetch(work, lambda work, file: None)


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", "unet/../../x.json", "unet\\..\\x.json", "C:\\x.json", "C:x.json", "unet/\0x.json"])
def test_names_that_lead_outside_are_refused(hub: Hub, tmp_path: Path, name: str):
    hub.push(REPO, repository())
    hub.names.append(name)
    with pytest.raises(ModelError, match="may not leave the model folder"):
        pull()
    assert not list(tmp_path.rglob("x.json"))


def test_classes_off_the_list_are_refused_before_any_weight_is_fetched(hub: Hub):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["pipeline", "Evil"]}
    hub.push(REPO, repository() | {"model_index.json": json.dumps(index).encode()})
    with pytest.raises(UnsafeError, match="Evil"):
        pull()
    assert set(hub.downloads()) == {"model_index.json"}


def test_a_single_file_and_one_of_many(hub: Hub):
    hub.push("me/one", {"cats.safetensors": repository(1)[WEIGHTS], "cats.png": b""})
    file = found(Path("me/one"))
    assert (file.name, file.read_bytes()) == ("cats.safetensors", repository(1)[WEIGHTS])
    hub.push("me/two", {"a.safetensors": repository(1)[WEIGHTS], "b.safetensors": repository(2)[WEIGHTS]})
    with pytest.raises(UsageError, match=r"--file one of a\.safetensors, b\.safetensors"):
        pull(HubName("me/two"))
    file = pull(HubName("me/two"), only=["b.safetensors"])
    assert (file.name, file.read_bytes()) == ("b.safetensors", repository(2)[WEIGHTS])
    hub.push("me/t5", {"config.json": b"{}", "model.safetensors": repository(1)[WEIGHTS], "spiece.model": b"x", "pytorch_model.bin": b"x"})
    assert set(content(found(Path("me/t5")))) == {"config.json", "model.safetensors", "spiece.model"}
