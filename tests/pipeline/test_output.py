import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tu_diffuse.errors import OutputError, UsageError
from tu_diffuse.pipeline.output import Target, plan_target, publish, replace, slug


def test_file_and_folder(tmp_path: Path):
    assert plan_target(tmp_path / "a.jpg", None, None, 1) == Target(tmp_path, "a.jpg", "{prompt}-{seed}", "jpeg")
    folder = plan_target(tmp_path / "new", None, "webp", 3)
    assert folder.folder.is_dir()
    assert folder.name("A red apple, left!", 7, 1) == "a-red-apple-left-7.webp"
    assert plan_target(tmp_path, "{number}-{seed}", None, 2).name("x", 7, 2) == "2-7.png"


@pytest.mark.parametrize(
    ("out", "name", "picture_format", "pictures", "said"),
    [
        ("a.gif", None, None, 1, "'.gif'"),
        ("a.png", None, "webp", 1, "contradict"),
        ("a.png", None, None, 2, "one file but 2"),
        ("a.png", "b", None, 1, "leave one"),
        ("d", "../x", None, 1, "file name"),
        ("d", "{prompt.__class__}", None, 1, "field"),
        ("d", "{seed:>9999999}", None, 1, "field"),
        ("d", "{", None, 1, "field"),
        ("d", None, "gif", 1, "'gif'"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, out: str, name: str | None, picture_format: str | None, pictures: int, said: str):
    with pytest.raises(UsageError, match=said):
        plan_target(tmp_path / out, name, picture_format, pictures)


def test_existing_file_and_unwritable_folder_are_refused(tmp_path: Path):
    (tmp_path / "a.png").write_text("mine")
    with pytest.raises(OutputError, match="never overwritten"):
        plan_target(tmp_path / "a.png", None, None, 1)
    with pytest.raises(OutputError, match="cannot be written"):
        plan_target(tmp_path / "a.png" / "below", None, None, 1)
    assert (tmp_path / "a.png").read_text() == "mine"


def test_publish_never_overwrites_and_leaves_nothing_else(tmp_path: Path):
    paths = [publish(str(i).encode(), tmp_path, "a.png") for i in range(3)]
    assert [p.name for p in paths] == ["a.png", "a-2.png", "a-3.png"]
    assert [p.read_text() for p in paths] == ["0", "1", "2"]
    assert sorted(os.listdir(tmp_path)) == ["a-2.png", "a-3.png", "a.png"]
    replace(b"new", paths[0])
    assert paths[0].read_text() == "new"
    assert len(os.listdir(tmp_path)) == 3


def test_publish_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert [publish(str(i).encode(), tmp_path, "a.png").read_text() for i in range(2)] == ["0", "1"]


def test_a_planted_symlink_is_not_followed(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.png").symlink_to(outside)
    assert publish(b"new", tmp_path / "d", "a.png").name == "a-2.png"
    assert outside.read_text() == "mine"


def test_disk_errors_are_output_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        publish(b"data", tmp_path, "a.png")
    assert os.listdir(tmp_path) == []


def test_four_processes_write_every_file(tmp_path: Path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom tu_diffuse.pipeline.output import publish\n"
        "for i in range(25): publish(f'{sys.argv[1]} {i}'.encode(), Path(sys.argv[2]), 'same.png')"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(w), str(tmp_path)]) for w in range(4)]
    assert [worker.wait() for worker in workers] == [0] * 4
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == sorted(f"{w} {i}" for w in range(4) for i in range(25))


@given(st.text(max_size=300), st.integers(0, 2**32 - 1))
def test_names_are_safe_everywhere(prompt: str, seed: int):
    name = Target(Path(), None, "{prompt}-{seed}", "png").name(prompt, seed, 1)
    assert len(name.encode()) <= 160
    assert not set(name) & set('<>:"/\\|?*\x00\n')
    assert not name.startswith((".", "-"))
    assert name.endswith(f"-{seed}.png")


def test_slugs():
    assert slug("[b]Red[/b] ../../etc/passwd") == "b-red-b-etc-passwd"
    assert slug("💥 !") == "picture"
    assert slug("日本の リンゴ") == "日本の-リンゴ"
    assert Target(Path(), None, "{prompt}", "png").name("CON", 1, 1) == "con_.png"
