"""Binding a BLAS: what is chosen, what is refused, and that MLX's calls reach it.

The linker chooses once a process, so each case has a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS uses Accelerate")

REPORT = """
import dataclasses, json, sys
import flash_mlx
from flash_mlx import blas
assert "mlx.core" not in sys.modules
print(json.dumps(dataclasses.asdict(blas.bind()), default=str))
"""
PRODUCT = """
import mlx.core as mx
mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "FLASH_MLX_BLAS"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def report(**environment: str) -> dict[str, object]:
    return json.loads(run(REPORT, **environment).stdout)


def library_called_by_mlx(code: str, folder: Path) -> str:
    """The file whose cblas_sgemm the linker gives to libmlx.so, as the linker itself reports."""
    run(code, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(folder / "linker"))
    pattern = re.compile(r"binding file \S*/libmlx\.so \S+ to (\S+) .*symbol `cblas_sgemm'")
    text = "\n".join(file.read_text(errors="replace") for file in folder.glob("linker.*"))
    return pattern.findall(text)[-1]


def test_mlx_calls_the_bound_library(tmp_path: Path) -> None:
    found = report()
    assert found["bound"], found["reason"]
    assert str(found["name"]).startswith("OpenBLAS")
    assert found["threads"]
    called = library_called_by_mlx("import flash_mlx\n" + PRODUCT, tmp_path)
    assert Path(called).resolve() == Path(str(found["path"])).resolve()


def test_off_leaves_mlx_its_own(tmp_path: Path) -> None:
    code = "import os\nos.environ['FLASH_MLX_BLAS'] = 'off'\nimport flash_mlx\n" + PRODUCT
    assert "mlx_cpu.libs" in library_called_by_mlx(code, tmp_path)
    found = report(FLASH_MLX_BLAS="off")
    assert (found["bound"], found["reason"]) == (False, "FLASH_MLX_BLAS=off")


def test_a_named_library_is_used() -> None:
    path = str(report()["path"])
    found = report(FLASH_MLX_BLAS=path)
    assert (found["bound"], found["path"]) == (True, path)
    assert "FLASH_MLX_BLAS" in str(found["reason"])


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("/no/such/library.so", "is no file"),
        (__file__, "does not load"),
        ("libm.so.6", "has none"),
        ("libnosuchblas.so", "does not load"),
    ],
)
def test_a_setting_that_cannot_serve_is_an_error_when_a_model_is_wanted(
    setting: str, what: str
) -> None:
    code = (
        "import flash_mlx\nfrom flash_mlx import blas\n"
        "try:\n    blas.require()\nexcept OSError as error:\n    print(error)"
    )
    said = run(code, FLASH_MLX_BLAS=setting)
    assert what in said.stdout
    assert "FLASH_MLX_BLAS" in said.stdout
    assert setting in said.stdout
    assert said.stdout.count("\n") == 1
    assert said.stderr == ""


def test_mlx_imported_first_is_said_once_with_the_remedy() -> None:
    code = (
        "import mlx.core\nimport flash_mlx\nfrom flash_mlx import blas\n"
        "blas.bind(); blas.bind(); print(blas.bind().bound)"
    )
    said = run(code)
    assert said.stdout == "False\n"
    assert said.stderr.count("RuntimeWarning") == 1
    assert "before any import of mlx" in said.stderr
    assert run(code, FLASH_MLX_BLAS="off").stderr == ""


def test_mlx_imported_first_is_fine_where_a_real_blas_is_preloaded() -> None:
    code = "import mlx.core\nimport flash_mlx\nprint(flash_mlx.blas.bind().bound)"
    said = run(code, LD_PRELOAD=str(report()["path"]))
    assert (said.stdout, said.stderr) == ("True\n", "")


def test_a_copy_with_prefixed_symbols_is_no_candidate() -> None:
    numpy_libs = Path(__import__("numpy").__file__).parents[1] / "numpy.libs"
    copies = list(numpy_libs.glob("*openblas*.so"))
    if not copies:
        pytest.skip("this NumPy has no OpenBLAS of its own")
    found = report(FLASH_MLX_BLAS=str(copies[0]))
    assert not found["bound"]
    assert "has none" in str(found["error"])
