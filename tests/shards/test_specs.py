"""Names of shards: patterns as a shell reads them, files, URLs, and what is refused."""

import itertools
import subprocess
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from shard_sets import members_of, tar_bytes, write
from tu_diffuse.errors import DataError, UnsafeError, UsageError
from tu_diffuse.shards import specs
from tu_diffuse.shards.index import index_shards
from tu_diffuse.shards.specs import expand, shard_name
from web_server import files_of, serve


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


PATTERNS = [
    "{00000..00012}",
    "{7..11}",
    "{007..11}",
    "{3..1}",
    "{08..12}",
    "{a,b}",
    "{a,b}{1..2}",
    "x{a,b{1..3},c}y",
    "{a,{b,c}d}",
    "{a}",
    "a{}b",
    "{a,}",
    "{1..2}{",
    "}{1..2}",
    "{1...2}",
    "{a..c..d}x{1,2}",
    "{x{1,2}}",
    "{0..0}",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_braces_are_a_shells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str):
    """What bash makes of a pattern; ranges of letters and of negative numbers are the two that are not taken over."""
    wanted = subprocess.run(["bash", "-c", f"printf '%s\\n' p{pattern}.tar"], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    touch(tmp_path, *wanted)
    monkeypatch.chdir(tmp_path)
    assert expand([f"p{pattern}.tar"]) == wanted


def test_globs_are_sorted_and_take_only_tars(tmp_path: Path):
    touch(tmp_path, "2.tar", "10.tar", "1.tar", "1.parquet", "1_stats.json", "deep/3.tar", ".hidden.tar")
    assert expand([f"{tmp_path}/*"]) == [f"{tmp_path}/{name}.tar" for name in ("1", "10", "2")]
    assert expand([f"{tmp_path}/?.tar"]) == [f"{tmp_path}/{name}.tar" for name in ("1", "2")]
    assert expand([f"{tmp_path}/{{deep,.}}/[23].tar"]) == [f"{tmp_path}/deep/3.tar", f"{tmp_path}/./2.tar"]
    assert f"{tmp_path}/deep/3.tar" in expand([f"{tmp_path}/**/*.tar"])


def test_several_in_the_order_given(tmp_path: Path):
    touch(tmp_path, "b.tar", "a.tar", "odd name", "{1..3}[x].tar")
    given = [str(tmp_path / name) for name in ("b.tar", "a.tar", "odd name", "{1..3}[x].tar")]
    assert expand(given) == given  # a file that exists is taken as it is written
    assert expand([f"file://{tmp_path}/b.tar", f"file://{tmp_path}/odd%20name"]) == [given[0], given[2]]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "No shards are named"),
        (["none.tar"], "'none.tar' is not there"),
        (["here{1..3}.tar"], r"'here2\.tar' is not there \(from 'here\{1\.\.3\}\.tar'\)"),
        (["none*.tar"], "No shard .* matches 'none"),
        (["."], r"is a folder; name its shards, for example '\*\.tar'"),
        (["here1.tar", "./here1.tar"], "named twice"),
        (["here1.tar", "here*.tar"], "named twice"),
        (["-"], "standard input"),
        (["ftp://host/a.tar"], "not a kind of URL"),
        (["memory://a.tar"], "not a kind of URL"),
        (["python://a.tar"], "not a kind of URL"),
        (["data:application/x-tar,abc"], "not a kind of URL"),
        (["s3:a.tar"], "not a kind of URL"),
        (["simplecache::https://host/a.tar"], "not a kind of URL"),
        (["https://host/a.zip::zip://a.tar"], "not a kind of URL"),
        (["{" * 30 + "a" + "}" * 30], "more than 20 brace groups"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, specs: list[str], message: str):
    touch(tmp_path, "here1.tar", "here3.tar")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        expand(specs)


@pytest.mark.parametrize("spec", ["pipe:touch canary", "pipe:cat {1..3}.tar", "PIPE:touch canary", "pipe://touch canary"])
def test_commands_are_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafeError, match="would run a command"):
        expand([spec])
    assert not list(tmp_path.iterdir())


def test_an_endless_pattern_ends_at_100_000():
    with pytest.raises(UsageError, match="more than 100000 shards"):
        expand(["https://host/{000000000000..999999999999}.tar"])
    assert len(expand(["https://host/{00000..99999}.tar"])) == 100_000


def test_names_are_shown_without_secrets():
    assert shard_name("https://me:word@host:8/a/b.tar?X-Amz-Signature=1") == "https://host:8/a/b.tar"
    assert shard_name("dir/a?b.tar") == "dir/a?b.tar"


def web_folder(tmp_path: Path) -> Path:
    for number in range(3):
        write(tmp_path / f"{number:05d}.tar", members_of(4, first=4 * number), "pax")
    (tmp_path / "00001_stats.json").write_text('{"successes": 4}')
    return tmp_path


def test_shards_on_a_web_server(tmp_path: Path):
    folder = web_folder(tmp_path)
    with serve(files_of(folder)) as address:
        locations = expand([f"{address}/{{00000..00002}}.tar"])
        assert locations == [f"{address}/0000{i}.tar" for i in range(3)]
        assert expand([f"{address}/*.tar"]) == locations
        found = index_shards(locations)
        local = index_shards(expand([f"{folder}/*.tar"]))
        assert found.samples == local.samples
        assert found.fingerprint() == local.fingerprint()
        assert "2 of 3 shards have no _stats.json" in found.notes[0]
        for i in (11, 0, 5):
            assert found.picture(i)[0, 0].tolist() == [i, 0, 255 - i]
        assert found.metadata(7)["n"] == 7
        signed = index_shards([f"{address}/00001.tar?signature=secret"])
        assert (len(signed.samples), signed.notes) == (4, ())
        (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:9000])
        with pytest.raises(DataError, match=r"Shard http://127\.0\.0\.1:\d+/00001\.tar is damaged at byte \d+") as error:
            index_shards([f"{address}/00001.tar?signature=secret"])
        assert "secret" not in str(error.value)
        with pytest.raises((DataError, UsageError), match=r"nowhere\.tar (cannot be read|is not there)"):
            index_shards([f"{address}/nowhere.tar"])


def test_a_web_server_that_sends_only_whole_files_is_refused(tmp_path: Path):
    with serve(files_of(web_folder(tmp_path), ranges=False)) as address, pytest.raises(DataError, match="does not send parts of a file"):
        index_shards([f"{address}/00000.tar"])


def test_a_connection_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(specs, "_REMOTE_BLOCK", 1024)
    folder = web_folder(tmp_path)
    for allowed in range(3, 30, 4):
        answers = itertools.count()

        class Failing(files_of(folder)):
            def answer(self, body: bool):
                if next(answers) < allowed:  # noqa: B023
                    super().answer(body)
                else:
                    self.send_error(500)

        with serve(Failing) as address, pytest.raises(DataError, match=r"00000\.tar cannot be read \(ClientResponseError 500\)"):
            index_shards([f"{address}/00000.tar"])


def test_a_server_that_is_not_there_is_an_error_of_one_sentence():
    with pytest.raises((DataError, UsageError), match=r"^Shard http://127\.0\.0\.1:9/a\.tar (cannot be read|is not there)"):
        index_shards(["http://127.0.0.1:9/a.tar"])


def test_object_stores_go_the_same_way(monkeypatch: pytest.MonkeyPatch):
    """A store in memory in the place of fsspec's S3 back end, which needs an account."""

    class Store(MemoryFileSystem):
        protocol = "s3"
        store = {}  # noqa: RUF012 - fsspec's own way to share it
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("s3://"))

    monkeypatch.setitem(_registry, "s3", Store)
    for number in range(2):
        Store().pipe(f"/bucket/{number}.tar", tar_bytes(members_of(3, first=3 * number))[0])
    assert [shard_name(name).lstrip("s3:/") for name in expand(["s3://bucket/*.tar"])] == ["bucket/0.tar", "bucket/1.tar"]
    found = index_shards(expand(["s3://bucket/{0..1}.tar"]))
    assert [s.key for s in found.samples] == [f"{i:09d}" for i in range(6)]
    assert found.picture(4)[0, 0].tolist() == [4, 0, 251]


def test_a_back_end_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing(location: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UsageError, match=r"pip install 'tu-diffuse\[remote\]'"):
        index_shards(["s3://bucket/a.tar"])


def test_every_refused_kind_stays_without_a_connection(monkeypatch: pytest.MonkeyPatch):
    def connect(*_: object) -> None:
        raise AssertionError("a name was resolved")

    monkeypatch.setattr(fsspec.core, "url_to_fs", connect)
    for scheme, rest in itertools.product(("ftp", "ssh", "git", "reference", "hdfs", "zip", "tar"), ("://host/a.tar", "://a::file://b")):
        with pytest.raises(UsageError):
            expand([scheme + rest])
