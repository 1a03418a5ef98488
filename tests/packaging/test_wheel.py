"""What `pip install .` brings: the offline tools, and nothing of the benchmark."""

import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "cli",
    "device",
    "dispatch",
    "domain",
    "formats",
    "monitor",
    "patching",
    "planner",
    "rebalance",
    "sglang_hooks",
    "simulate",
}
OFFLINE = {"numpy", "numba", "click", "matplotlib"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves a build folder where it builds
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "sglang_eplb_affinity"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_is_small_and_holds_the_package_only(wheel: Path) -> None:
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    inside = {tuple(Path(name).parts) for name in names if ".dist-info/" not in name}
    assert {parts[0] for parts in inside} == {"sglang_eplb_affinity"}
    assert {parts[1] for parts in inside if len(parts) > 2} == PACKAGES
    assert {"demo_plan.npz", "demo_test.npz", "py.typed", "calibrations.yaml"} <= {parts[-1] for parts in inside}
    assert not [name for name in names if "calibrate" in name or "tiny_moe" in name or "published" in name]


def test_it_needs_what_the_offline_tools_need_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        needed = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist") or []
    assert {requirement for requirement in needed if "extra ==" not in requirement} == OFFLINE


def test_offline_tools_import_nothing_else(wheel: Path) -> None:
    """With every other package refused, as where only the wheel's own requirements are installed."""
    code = (
        "import sys\n"
        "refused = {'sglang', 'torch', 'yaml', 'scipy', 'pandas', 'tqdm', 'bench'}\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in refused and '.' not in name:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"sys.path.insert(0, {str(wheel)!r})\n"
        "from sglang_eplb_affinity.cli import FIRST_STEPS, main\n"
        "import sglang_eplb_affinity\n"
        "print(sglang_eplb_affinity.__file__)\n"
        "assert FIRST_STEPS.count('\\n') < 11 and 'demo' in FIRST_STEPS\n"
        "recommend = ['recommend', '--trace', 'x.npz', '--topology', 'deepseek-v3-h200']\n"
        "for argv in (recommend, ['inspect', '--dump', 'd.pt']):\n"
        "    sys.argv[1:] = argv\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 2, end.code\n"
        "import numpy as np\n"
        "from sglang_eplb_affinity.simulate.routing_model import fit_layer\n"
        "fit_layer(np.zeros((4, 2), np.int16), 4)\n"
    )
    with zipfile.ZipFile(wheel.parent / "d.pt", "w") as archive:
        archive.writestr("d/data.pkl", b"")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=wheel.parent)
    assert str(wheel) in done.stdout, done.stderr
    errors = [line for line in done.stderr.splitlines() if ", which is not installed: `pip install '.[" in line]
    assert [re.findall(r"needs (\w+).*\[(\w+)\]", line) for line in errors] == [
        [("PyYAML", "simulate")],
        [("PyTorch", "dumps")],
        [("SciPy", "simulate")],
    ], done.stderr
