"""`tu-diffuse shards` as a person and a script see it: what is printed, what is written, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shard_sets import encoded, flip, members_of, tar_bytes, write
from tu_diffuse.cli.main import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two whole shards with LAION's columns."""
    for number in range(2):
        members: list[tuple[str, bytes]] = []
        for i in range(10 * number, 10 * number + 10):
            columns = {"LANGUAGE": "en" if i % 5 else "de", "punsafe": None if i == 7 else i / 20, "AESTHETIC_SCORE": 5.0, "width": 9, "height": 8}
            members += [(f"{i:09d}.png", encoded(i)), (f"{i:09d}.txt", f"caption {i}".encode()), (f"{i:09d}.json", json.dumps(columns).encode())]
        write(tmp_path / f"{number:05d}.tar", members)
        (tmp_path / f"{number:05d}_stats.json").write_text('{"successes": 10}')
    return tmp_path


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def hurt(path: Path) -> int:
    """Flip a bit of a caption's header; returns where that header begins."""
    data = path.read_bytes()
    place = data.index(b"000000013.txt")
    path.write_bytes(flip(data, place + 4, 0))
    return place


def test_check_of_whole_shards(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["shards", "check", f"{folder}/{{00000..00001}}.tar"]) == 0
    out, err = capsys.readouterr()
    assert "samples: 20" in out
    assert "damaged_places: 0" in out
    assert f"shard 2/2 {folder}/00001.tar: 10 samples, 0 damaged places" in err
    assert run(["shards", "check", f"{folder}/*.tar", "--json"]) == 0
    (summary,) = lines(capsys)
    assert summary == {
        "kind": "summary",
        "shards": 2,
        "samples": 20,
        "runs": 20,
        "skipped": {},
        "members": {"used": 60, "skipped": 0, "ignored": 0},
        "vanished": 0,
        "damaged_places": 0,
        "notes": [],
    }


def test_check_names_the_damage_and_exits_with_4(folder: Path, capsys: pytest.CaptureFixture[str]):
    place = hurt(folder / "00001.tar")
    assert run(["shards", "check", f"{folder}/*.tar"]) == 4
    out, err = capsys.readouterr()
    assert f"Shard {folder}/00001.tar is damaged at byte {place}, sample 000000013: the header of a member is flipped, zeroed or false" in out
    assert "tu-diffuse: Found 1 damaged place in 1 of 2 shards, as listed;" in err
    assert run(["shards", "check", f"{folder}/*.tar", "--json"]) == 4
    damage, summary = lines(capsys)
    assert (damage["kind"], damage["key"], damage["offset"], damage["reason"]) == ("damage", "000000013", place, "header")
    assert (summary["samples"], summary["runs"], summary["skipped"], summary["vanished"]) == (19, 20, {"header": 1}, 0)


def test_check_decodes_unless_quick_is_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]):
    members = members_of(3)
    members[3] = (members[3][0], members[3][1][:60])
    write(folder / "cut.tar", members)
    assert run(["shards", "check", f"{folder}/cut.tar", "--quick", "--json"]) == 0
    assert lines(capsys)[0]["samples"] == 3
    assert run(["shards", "check", f"{folder}/cut.tar", "--json"]) == 4
    assert lines(capsys)[0]["reason"] == "picture"


def test_control_characters_of_a_shard_stay_off_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]):
    write(folder / "esc.tar", [("\x1b]0;x\x07.png", encoded(1)), ("\x1b]0;x\x07.txt", b"c")])
    assert run(["shards", "check", f"{folder}/esc.tar"]) == 4
    out, err = capsys.readouterr()
    assert "leads out of a folder or cannot be printed" in out
    assert "\x1b" not in out + err
    assert "\x07" not in out + err


def test_stats(folder: Path, capsys: pytest.CaptureFixture[str]):
    plot = folder / "columns.png"
    assert run(["shards", "stats", f"{folder}/*.tar", "--filter", "laion-aesthetic", "--plot", str(plot), "--json"]) == 0
    found = lines(capsys)
    by_name = {(line["kind"], line.get("name")): line for line in found}
    unsafe = by_name["column", "unsafe"]
    assert (unsafe["present"], unsafe["missing"], unsafe["lowest"], unsafe["highest"], sum(unsafe["counts"])) == (19, 1, 0.0, 0.95, 19)
    assert by_name["words", "language"]["counts"] == {"en": 16, "de": 4}
    assert by_name["filter", "language"] | {"only": 0} == {"kind": "filter", "name": "language", "dropped": 4, "missing": 0, "only": 0}
    assert by_name["filter", "unsafe"]["dropped"] == 18  # 0.1 and more, and one without a value
    assert by_name["filter", "unsafe"]["missing"] == 1
    assert (found[-1]["dropped"], found[-1]["kept"], found[-1]["plot"]) == (19, 1, str(plot))
    with Image.open(plot) as picture:
        assert picture.format == "PNG"
        assert picture.convert("L").getextrema() == (picture.convert("L").getextrema()[0], 255)
    assert run(["shards", "stats", f"{folder}/*.tar", "--plot", str(plot)]) == 74
    assert "never overwritten" in capsys.readouterr().err
    assert run(["shards", "stats", f"{folder}/*.tar", "--filter", "laion-aesthetic", "--missing", "keep"]) == 0
    text = capsys.readouterr().out
    assert "unsafe: 19 samples, 1 missing, 0 .. median 0.5 .. 0.95" in text
    assert "unsafe: alone drops 17, 14 that no other does; 1 samples have no value" in text
    assert "kept: 2" in text


def test_infinity_stays_out_of_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["shards", "stats", f"{folder}/*.tar", "--max-unsafe", "0.5", "--json"]) == 0
    assert "Infinity" not in capsys.readouterr().out


def test_filter(folder: Path, capsys: pytest.CaptureFixture[str]):
    out = folder / "out"
    assert run(["shards", "filter", f"{folder}/*.tar", "--out", str(out), "--language", "en", "--max-unsafe", "0.5", "--json"]) == 0
    first, second, summary = lines(capsys)
    assert (first["kept"], first["dropped"], second["kept"]) == (7, {"language": 2, "unsafe missing": 1}, 0)
    assert (summary["kept"], summary["dropped"], summary["samples"]) == (7, 13, 20)
    assert sorted(os.listdir(out)) == ["00000.tar", "00000_stats.json", "00001.tar", "00001_stats.json"]
    assert run(["shards", "check", f"{out}/*.tar", "--json"]) == 0
    assert lines(capsys)[-1]["samples"] == 7
    assert run(["shards", "filter", f"{folder}/*.tar", "--out", str(out), "--language", "en"]) == 74
    assert "never overwritten" in capsys.readouterr().err


def test_filter_can_save_what_is_whole(folder: Path, capsys: pytest.CaptureFixture[str]):
    hurt(folder / "00001.tar")
    arguments = ["shards", "filter", f"{folder}/*.tar", "--out", str(folder / "out"), "--skip-damaged"]
    assert run(arguments) == 4
    assert "1 of 20 samples are lost to 1 damaged places, more than the 1.00% allowed" in capsys.readouterr().err
    assert not (folder / "out").exists()
    assert run([*arguments, "--max-lost", "0.05", "--json"]) == 0
    assert lines(capsys)[-1]["kept"] == 19


def test_encode_and_train_on_it(folder: Path, ensemble_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "encoded"
    model = ["--model", str(ensemble_folder), "--device", "cpu"]
    arguments = ["shards", "encode", f"{folder}/*.tar", "--out", str(out), *model, "--max-unsafe", "0.6", "--json"]
    assert run(arguments) == 0
    first, second, summary = lines(capsys)
    assert first == {
        "kind": "shard",
        "path": f"{out}/00000.tar",
        "source": f"{folder}/00000.tar",
        "kept": 9,
        "dropped": {"unsafe missing": 1},
        "was_there": False,
    }
    assert (second["kept"], second["dropped"]) == (2, {"unsafe": 8})
    assert (summary["kind"], summary["kept"], summary["dropped"], len(summary["encoding"])) == ("summary", 11, 9, 64)
    assert run(arguments[:-1]) == 0
    said, err = capsys.readouterr()
    assert f"encoding sample 9/11 {out}/00000.tar: 9 samples, was there" in err
    assert f"encoding sample 11/11 {out}/00001.tar: 2 samples, was there" in err
    assert said.splitlines()[:2] == [f"{out}/00000.tar", f"{out}/00001.tar"]
    assert run(["shards", "check", f"{out}/*.tar", "--json"]) == 0
    assert lines(capsys)[-1] | {"notes": []} == {
        "kind": "summary",
        "shards": 2,
        "samples": 11,
        "runs": 11,
        "skipped": {},
        "members": {"used": 2 + 33, "skipped": 0, "ignored": 0},
        "vanished": 0,
        "damaged_places": 0,
        "notes": [],
    }
    assert run(["shards", "stats", f"{out}/*.tar", "--json"]) == 0
    assert next(line for line in lines(capsys) if line.get("name") == "unsafe")["present"] == 11
    train = ["finetune", *model, "--shards", f"{out}/*.tar", "--out", str(tmp_path / "run"), "--steps", "2", "--json"]
    assert run(train) == 0
    plan, *_, done = lines(capsys)
    assert (plan["samples"], plan["encoding"], done["model"]) == (11, summary["encoding"], str(tmp_path / "run" / "model"))
    assert run([*train, "--resolution", "64"]) == 2
    assert "they have resolution 32 instead of 64" in capsys.readouterr().err
    assert run([*train, "--shards", f"{folder}/00000.tar"]) == 2
    assert "give shards of one kind" in capsys.readouterr().err
    assert run(["shards", "encode", f"{out}/*.tar", "--out", str(tmp_path / "again"), *model]) == 2
    assert "encoded already" in capsys.readouterr().err
    assert run([*arguments, "--dtype", "float32"]) == 74
    assert "encoded in another way (dtype float16 instead of float32)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["encode", "{set}"], 2, "Missing option"),
        (["encode", "{set}", "--out", "{out}", "--dtype", "int8"], 2, "--dtype 'int8' is not known"),
        (["encode", "{set}", "--out", "{out}", "--resolution", "50"], 2, "--resolution 50 is not a multiple"),
        (["encode", "{set}", "--out", "{out}", "--batch-size", "0"], 2, "batch-size"),
        (["encode", "{set}", "--out", "{out}", "--language", "fr"], 4, "None of the 20 samples passes"),
        (["check"], 2, "Missing argument"),
        (["check", "nowhere.tar"], 2, "is not there"),
        (["check", "pipe:cat x"], 3, "would run a command"),
        (["check", "-"], 2, "standard input"),
        (["stats", "{set}", "--aspect", "1"], 2, "--aspect '1' is not two numbers"),
        (["stats", "{set}", "--aspect", "2,1"], 2, "--aspect 2,1"),
        (["stats", "{set}", "--filter", "x"], 2, "--filter 'x' is not known"),
        (["stats", "{set}", "--missing", "x"], 2, "--missing 'x' is not known"),
        (["stats", "{set}", "--max-lost", "2"], 2, "--max-lost 2"),
        (["stats", "{set}", "--plot", "a.jpg"], 2, "end its name in .png"),
        (["filter", "{set}"], 2, "Missing option"),
        (["filter", "{set}", "--out", "{out}"], 2, "No filter is given"),
        (["filter", "{set}", "--out", "{out}", "--max-watermark", "0.5"], 4, "No sample has a column for the filter watermark"),
        (["filter", "{set}", "--out", "{out}", "--aesthetic-version", "v1", "--min-aesthetic", "4"], 4, "they have v2"),
        (["filter", "{set}", "--out", "{out}", "--language", "fr"], 4, "None of the 20 samples passes"),
    ],
)
def test_what_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str):
    filled = [argument.replace("{set}", f"{folder}/*.tar").replace("{out}", str(folder / "out")) for argument in arguments]
    assert run(["shards", *filled]) == code
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("command", [[], ["check"], ["stats"], ["filter"], ["encode"]])
def test_help_has_examples_and_imports_nothing_heavy(command: list[str]):
    code = (
        "import sys\n"
        "from tu_diffuse.cli.main import run\n"
        f"code = run(['shards', *{command!r}, '--help'])\n"
        "print(code, [name for name in ('torch', 'numpy', 'PIL', 'fsspec', 'tarfile') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr.strip() == "0 []"
    assert "Exit codes" in done.stdout
    assert not command or "Examples:" in done.stdout


def test_commands_need_no_torch(folder: Path):
    arguments = ["shards", "stats", f"{folder}/*.tar", "--plot", f"{folder}/p.png"]
    code = f"import sys\nfrom tu_diffuse.cli.main import run\nprint(run({arguments!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 False"


def test_tar_bytes_is_what_tarfile_reads(tmp_path: Path):
    """The helper that all these tests lean on."""
    import tarfile

    for tar_format in ("ustar", "gnu", "pax"):
        data, placed = tar_bytes(members_of(3), tar_format)
        (tmp_path / "a.tar").write_bytes(data)
        with tarfile.open(tmp_path / "a.tar") as tar:
            read = [(m.name, m.offset, m.offset_data, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
        assert read == [(p.name, p.start, p.data, p.content) for p in placed]
