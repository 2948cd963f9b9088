"""The rules of the house: imports run one way, help needs no torch, every listed package exists."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tu_diffuse

ROOT = Path(tu_diffuse.__file__).parent
BOTTOM = ("unet", "vae", "text_encoders", "schedulers")
MAY_IMPORT = {name: {name} for name in BOTTOM} | {
    "single_file": {"single_file"},
    "pipeline": {"pipeline", *BOTTOM},
    "shards": {"shards"},
    "training": {"training", "shards", "pipeline", *BOTTOM},
    "batch": {"batch", "pipeline", *BOTTOM},
    "cli": {"cli", "batch", "pipeline", "shards", "training"},
}
SHARED = {
    "contracts",
    "allocator",
    "attention",
    "errors",
    "strict_json",
    "offload",
    "pictures",
    "seamless",
    "weights",
    "model_files",
    "single_file",
    "__init__",
    "",
}


def _imported_folders(path: Path) -> set[str]:
    """Top-level folders or modules of the package that a file imports, wherever in the file the import stands."""
    package = ["tu_diffuse", *path.relative_to(ROOT).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [*base, *(node.module.split(".") if node.module else [])]
            modules = [names] if len(names) > 1 else [[*names, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {module[1] for module in modules if module[0] == "tu_diffuse" and len(module) > 1}
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder: str):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        wrong = _imported_folders(path) - MAY_IMPORT[folder] - SHARED - {"__version__"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize(
    "command",
    [[], ["generate"], ["batch"], ["info"], ["models", "info"], ["replay"], ["doctor"], ["experts", "fork"]],
    ids=lambda c: " ".join(c) if c else "-",
)
def test_help_imports_no_torch(command: list[str]):
    """What makes `--help` quick; its time is measured by scripts/bench_generate.py."""
    code = (
        "import sys\n"
        "from tu_diffuse.cli.main import run\n"
        f"code = run([*{command!r}, '--help'])\n"
        "heavy = [name for name in ('torch', 'numpy', 'PIL', 'diffusers', 'transformers') if name in sys.modules]\n"
        "print(code, heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    exit_code, heavy = done.stderr.split()[0], done.stderr.split("[")[1].split("]")[0]
    assert exit_code == "0"
    assert heavy == ""
    assert "Exit codes" in done.stdout
    assert not command or "Examples:" in done.stdout


def test_the_main_path_imports_no_heavy_library(ensemble_folder: Path, tmp_path: Path):
    """The console script, as installed: a picture without diffusers, transformers and their like being imported, and a clean exit."""
    code = (
        "import sys, os; from tu_diffuse.cli.main import run\n"
        f"assert run(['generate', 'a', '--model', {str(ensemble_folder)!r}, '--out', {str(tmp_path / 'a.png')!r}]) == 0\n"
        "assert not {'diffusers', 'transformers', 'open_clip', 'torchvision', 'accelerate', 'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    script = Path(sys.executable).with_name("tu-diffuse")
    started = time.perf_counter()
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tu_diffuse.__version__
    assert time.perf_counter() - started < 10
    module = subprocess.run([sys.executable, "-m", "tu_diffuse", "info", str(tmp_path / "absent.png")], capture_output=True, text=True, check=False)
    assert module.returncode == 2
    assert "absent.png' is not there" in module.stderr


def test_no_dangerous_calls():
    for path in sorted(ROOT.rglob("*.py")):
        if path.relative_to(ROOT).parts[0] in MAY_IMPORT or path.parent == ROOT:
            text = path.read_text(encoding="utf-8")
            for word in ("torch.load(", "import pickle", "shell=True", "allow_pickle=True", "trust_remote_code=True", "os.system("):
                assert word not in text, f"{path.relative_to(ROOT)} has {word}"
