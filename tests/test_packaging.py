"""What is built from the tree: `flash_mlx.convert` in its place, the demo, the command."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
TOOLS = [importlib.util.find_spec(name) for name in ("pip", "setuptools", "click")]
needs_pip = pytest.mark.skipif(
    None in TOOLS, reason="building needs pip and setuptools in this environment"
)


def call(*words: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, so that building leaves nothing behind."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("flash_mlx", "convert"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(*PIP, "wheel", tree, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    return next(folder.glob("flash_mlx-*.whl"))


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A fresh virtual environment that sees this one's packages, but not its flash-mlx."""
    packages = tmp_path / "packages"
    packages.mkdir()
    folders = {Path(spec.origin).parents[1] for spec in TOOLS}
    for entry in sorted(entry for folder in folders for entry in folder.iterdir()):
        if "flash_mlx" not in entry.name and not (packages / entry.name).exists():
            (packages / entry.name).symlink_to(entry)
    venv = tmp_path / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", venv)
    variables = {"base": str(venv), "platbase": str(venv)}
    (Path(sysconfig.get_path("purelib", vars=variables)) / "packages.pth").write_text(str(packages))
    return venv


def install(environment: Path, *what: str | Path) -> None:
    call(*PIP, "--python", environment / "bin/python", "install", "--no-deps", *what)


def check_installed(environment: Path, tmp_path: Path, home: Path) -> None:
    """`flash-mlx` answers and both packages come from `home`."""
    assert "generate" in call(environment / "bin/flash-mlx", "--help", cwd=tmp_path)
    code = (
        "import flash_mlx, flash_mlx.convert, importlib.util\n"
        "assert importlib.util.find_spec('convert') is None\n"
        "print(flash_mlx.__file__, flash_mlx.convert.__file__, flash_mlx.__version__, sep='\\n')"
    )
    *files, version = call(environment / "bin/python", "-c", code, cwd=tmp_path).split("\n")[:3]
    assert all(Path(file).is_relative_to(home) for file in files), files
    assert version == project()["project"]["version"]


def project() -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_folder_is_listed() -> None:
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "flash_mlx").rglob("__init__.py")
    }
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert found | {"flash_mlx.convert"} == set(listed)
    assert sorted(listed) == listed


@needs_pip
def test_a_wheel_holds_the_package_its_data_and_no_more(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flash_mlx"}
    data = {
        str(file.relative_to(ROOT))
        for file in [ROOT / "flash_mlx/py.typed", *(ROOT / "flash_mlx/demo").rglob("*")]
        if file.is_file()
    }
    assert data <= set(names)
    assert "flash_mlx/convert/__init__.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@needs_pip
@pytest.mark.slow
def test_an_installed_wheel_works(wheel: Path, environment: Path, tmp_path: Path) -> None:
    install(environment, wheel)
    check_installed(environment, tmp_path, environment)


@needs_pip
@pytest.mark.slow
def test_an_editable_install_works(tree: Path, environment: Path, tmp_path: Path) -> None:
    install(environment, "--no-build-isolation", "--editable", tree)
    check_installed(environment, tmp_path, tree)
