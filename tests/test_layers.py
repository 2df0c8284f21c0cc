"""Imports point down, special dependencies stay in their places, and files stay short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("flash_mlx", "convert")
    for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / "flash_mlx" / "__init__.py"  # it re-exports, lazily
)

LAYERS = (
    {
        "blas",
        "buffer",
        "cost",
        "hub",
        "few_rows",
        "files",
        "images",
        "prompt",
        "sizes",
        "timing",
        "tree",
    },
    {"kernels"},
    {"cache", "penalties", "sampling", "video"},
    {"accept", "guard"},
    {"decode", "pace"},
    {"around"},
    {"stats", "draft", "processed", "targets"},
    {"messages"},
    {"checkpoint", "processing"},
    {"convert"},
    {"registry"},
    {"batch", "loading", "store", "transcript"},
    {"generate", "measure"},
    {"session", "throughput"},
    {"joint_law"},
    {"caption", "verify", "doctor", "selftest", "train", "viz"},
    {"bench"},
    {"integrations"},
    {"cli"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

# Entire packages that only some modules may know.
HOMES = {
    "click": {"cli"},
    "mlx_vlm": {"targets", "messages", "bench", "convert", "integrations"},
    "huggingface_hub": {"hub"},
}


def module(path: Path) -> str:
    """Return the module or subpackage of flash_mlx that a file belongs to."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "convert" else parts[1]


def imports(path: Path) -> set[str]:
    """Return the absolute dotted names that a file imports, at any depth of its code."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    if package[0] == "convert":
        package = ("flash_mlx", *package)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_module_has_a_layer_and_imports_only_from_lower_ones(path: Path) -> None:
    here = module(path)
    assert here in LAYER, f"give {here} a layer in {Path(__file__).name}"
    for imported in imports(path):
        top, _, rest = imported.partition(".")
        assert top != "convert", "the installed name of convert is flash_mlx.convert"
        other = rest.split(".")[0]
        # The root package itself has constants only (`__version__`); names it re-exports are not
        # for the inside.
        if top == "flash_mlx" and other not in {here, "", "__version__"}:
            assert other in LAYER, f"{name(path)} imports {imported}: import it from its module"
            assert LAYER[other] < LAYER[here], f"{name(path)} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_special_dependencies_stay_in_their_places(path: Path) -> None:
    for imported in imports(path):
        allowed = HOMES.get(imported.split(".")[0])
        assert allowed is None or module(path) in allowed, f"{name(path)} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_metal_kernels_are_made_in_one_place(path: Path) -> None:
    if name(path) != "flash_mlx/kernels/metal.py":
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert "metal_kernel" not in used


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 320


def test_the_reader_of_imports_sees_all_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "flash_mlx" / "draft" / "model.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import mlx.core as mx\nfrom ..targets import adapter\nfrom . import config\n"
        "def f():\n    from flash_mlx import cli\n",
        encoding="utf-8",
    )
    assert imports(path) == {
        "mlx.core",
        "flash_mlx.targets.adapter",
        "flash_mlx.draft.config",
        "flash_mlx.cli",
    }
