"""What is installed from a wheel has the published map, so `neva space` works outside of a clone too."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", "77", reason="it builds the package")

ROOT = Path(__file__).resolve().parents[1]
MAP = "smollm2-135m-instruct-schwartz"
FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the source distribution, as by whoever packages it. (In a copy: setuptools writes beside the source.)"""
    folder = tmp_path_factory.mktemp("package")
    source, found = folder / "source", folder / "found"
    source.mkdir()
    found.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "LICENSE-CC-BY-4.0"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "neva_hf", source / "neva_hf", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "model_cards" / MAP, source / "model_cards" / MAP, ignore=shutil.ignore_patterns("report"))
    _build("sdist", source, found)
    (packed,) = found.glob("*.tar.gz")
    with tarfile.open(packed) as opened:
        opened.extractall(found, filter="data")
    _build("wheel", found / packed.name.removesuffix(".tar.gz"), found)
    (built,) = found.glob("*.whl")
    return built


def _build(kind: str, source: Path, into: Path) -> None:
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(into)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_published_map_is_in_the_wheel_and_nothing_else_of_its_folder(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        packed = [name for name in opened.namelist() if name.startswith("neva_hf/maps/")]
        assert sorted(packed) == sorted(f"neva_hf/maps/{MAP}/{name}" for name in FILES)
        for name in FILES:
            assert opened.read(f"neva_hf/maps/{MAP}/{name}") == (ROOT / "model_cards" / MAP / name).read_bytes()


def test_what_the_page_needs_beside_code_is_in_the_wheel(wheel: Path) -> None:
    static = {path.name for path in (ROOT / "neva_hf" / "space" / "static").iterdir()}
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    assert {Path(name).name for name in names if name.startswith("neva_hf/space/static/")} == static
    assert "neva_hf/py.typed" in names


def test_the_page_of_an_installation_shows_the_published_map(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path)
    code = (
        "from neva_hf import NeuronMap; from neva_hf.space.maps import default_map; "
        "print(default_map()); print(len(NeuronMap.from_pretrained(default_map()).values))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path.resolve() / "neva_hf" / "maps" / MAP), "10"]
