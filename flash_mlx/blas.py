"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheel links the reference BLAS, whose float32 matrix product is many times slower than
the machine allows, and the more so the more rows it has: exactly the pass that speculative
decoding relies on. `libmlx.so` calls `cblas_sgemm` by name, and the dynamic linker looks such a
name up in the libraries that were loaded globally before those that `libmlx.so` names itself. So
a real BLAS loaded globally *before* `mlx.core` takes the calls; afterwards the names are already
bound and nothing changes. `import flash_mlx` therefore calls `bind` before anything else.

Candidates, in this order: the file in `FLASH_MLX_BLAS` (`off` turns the binding off), an OpenBLAS
of this Python environment, the system's, the one that opencv-python carries (mlx-vlm depends on
it, so there always is one), and MKL. NumPy's and SciPy's own copies cannot serve: their symbols
have a prefix.

On macOS MLX uses Accelerate, and this module does nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VARIABLE = "FLASH_MLX_BLAS"
# Debian, Arch and conda; Fedora's threaded build; MKL's single library.
OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblasp.so.0")
MKL_NAMES = ("libmkl_rt.so.3", "libmkl_rt.so.2")


@dataclass(frozen=True)
class BlasInfo:
    """Which BLAS MLX's CPU backend uses in this process.

    Attributes:
        bound: Whether a BLAS other than the one of MLX's wheel takes the calls.
        name: What it says it is, such as `OpenBLAS 0.3.29 ...`.
        path: Its file; None where MLX's own is used.
        threads: Threads it will use; None if it does not say.
        reason: Why this one, in a few words.
        error: What is wrong with `FLASH_MLX_BLAS`; None if nothing is.
    """

    bound: bool
    name: str
    path: Path | None
    threads: int | None
    reason: str
    error: str | None = None


class _DlInfo(ctypes.Structure):
    """`Dl_info` of dlfcn.h."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


@cache
def bind() -> BlasInfo:
    """Bind a real BLAS once a process, before `mlx.core` is imported.

    A setting that cannot be met is kept in `BlasInfo.error` and raised by `require`, so that
    `import flash_mlx` itself, `--help` and `doctor` still work.

    Returns:
        What is bound and why.
    """
    if sys.platform != "linux":
        return BlasInfo(False, "the system's", None, None, "only MLX's Linux wheel needs another")
    setting = os.environ.get(VARIABLE, "").strip()
    if setting == "off":
        return _not_bound(f"{VARIABLE}=off")
    if "mlx.core" in sys.modules:
        return _too_late()
    already = _global_blas()
    if already is not None:
        return _describe(already, "it was loaded globally before Python's imports (LD_PRELOAD)")
    if setting:
        return _bind_setting(setting)
    for file, reason in _candidates():
        library = _open(file)
        if library is not None and _name(library) is not None:
            return _bind(file, reason)
    return _not_bound("no OpenBLAS or MKL found; pip install opencv-python brings one")


def require() -> BlasInfo:
    """The binding, for code that is about to use a model.

    Raises:
        OSError: `FLASH_MLX_BLAS` names something that cannot serve.
    """
    info = bind()
    if info.error is not None:
        raise OSError(info.error)
    return info


def _candidates() -> Iterator[tuple[str, str]]:
    for name in OPENBLAS_NAMES:
        yield str(Path(sys.prefix, "lib", name)), "found in this Python environment"
    for name in OPENBLAS_NAMES:
        yield name, "the system's"
    try:
        spec = importlib.util.find_spec("cv2")
    except ValueError:  # a stand-in without a spec is loaded under that name
        spec = None
    if spec is not None and spec.origin is not None:
        for file in sorted(Path(spec.origin).parents[1].glob("opencv*.libs/libopenblas*.so*")):
            yield str(file), "carried by opencv-python"
    # After OpenBLAS: MKL ends the process where one of its own parts is missing.
    for name in MKL_NAMES:
        yield str(Path(sys.prefix, "lib", name)), "found in this Python environment"
        yield name, "the system's"


def _bind_setting(setting: str) -> BlasInfo:
    wanted = f"{VARIABLE} must be 'off' or the path of a shared library with cblas_sgemm"
    if "/" in setting and not Path(setting).is_file():
        return _not_bound(wanted, error=f"{wanted}; {setting!r} is no file. Correct or unset it.")
    try:
        library = ctypes.CDLL(setting)
    except OSError as error:
        return _not_bound(wanted, error=f"{wanted}; {setting!r} does not load: {error}.")
    if not hasattr(library, "cblas_sgemm"):
        return _not_bound(wanted, error=f"{wanted}; {setting!r} has none. Correct or unset it.")
    if _has_wide_integers(library):
        return _not_bound(
            wanted, error=f"{wanted} and 32-bit integers; {setting!r} has 64-bit ones."
        )
    return _bind(setting, f"{VARIABLE} names it")


def _bind(file: str, reason: str) -> BlasInfo:
    """Make `file`'s symbols global and see that they are the ones found."""
    library = ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
    found = _global_blas()
    if found is None or _address(found) != _address(library):
        return _not_bound(f"{file} was loaded, but its cblas_sgemm is not the one found")
    return _describe(library, reason)


def _too_late() -> BlasInfo:
    """`mlx.core` was imported first: say what it uses, and warn if that is slow."""
    used = _global_blas() or _mlx_library()
    if used is not None and _name(used) is not None:
        return _describe(used, "mlx.core was imported first and uses it already")
    warnings.warn(
        "mlx.core was imported before flash_mlx, so MLX keeps its slow reference BLAS on this "
        "CPU. Put `import flash_mlx` before any import of mlx, mlx_lm or mlx_vlm.",
        RuntimeWarning,
        stacklevel=4,
    )
    return _not_bound("mlx.core was imported before flash_mlx")


def _not_bound(reason: str, error: str | None = None) -> BlasInfo:
    return BlasInfo(False, "MLX's own (reference BLAS)", None, None, reason, error)


def _describe(library: ctypes.CDLL, reason: str) -> BlasInfo:
    path = _path(library)
    name = _name(library) or (path.name if path is not None else "unknown")
    return BlasInfo(True, name, path, _threads(library), reason)


def _open(file: str) -> ctypes.CDLL | None:
    """Load a library without making its symbols global; None if it cannot be loaded."""
    if "/" in file and not Path(file).is_file():
        return None
    try:
        return ctypes.CDLL(file)
    except OSError:
        return None


def _global_blas() -> ctypes.CDLL | None:
    """The process's global scope, if it has a `cblas_sgemm`."""
    process = ctypes.CDLL(None)
    return process if hasattr(process, "cblas_sgemm") else None


def _mlx_library() -> ctypes.CDLL | None:
    """`libmlx.so` with what it links; None where the wheel is laid out otherwise."""
    spec = importlib.util.find_spec("mlx")
    folders = spec.submodule_search_locations if spec is not None else None
    library = _open(str(Path(folders[0], "lib", "libmlx.so"))) if folders else None
    return library if library is not None and hasattr(library, "cblas_sgemm") else None


def _name(library: ctypes.CDLL) -> str | None:
    """What a real BLAS calls itself; None for the reference and for 64-bit integers."""
    if not hasattr(library, "cblas_sgemm") or _has_wide_integers(library):
        return None
    if hasattr(library, "openblas_get_config"):
        return _openblas_config(library)
    if hasattr(library, "MKL_Get_Max_Threads"):
        return "MKL"
    return None


def _has_wide_integers(library: ctypes.CDLL) -> bool:
    """Whether an OpenBLAS was built with 64-bit integers, which MLX does not pass."""
    has_config = hasattr(library, "openblas_get_config")
    return has_config and "USE64BITINT" in _openblas_config(library)


def _openblas_config(library: ctypes.CDLL) -> str:
    library.openblas_get_config.restype = ctypes.c_char_p
    return str(library.openblas_get_config().decode()).strip()


def _threads(library: ctypes.CDLL) -> int | None:
    if hasattr(library, "openblas_get_num_threads"):
        return int(library.openblas_get_num_threads())
    if hasattr(library, "MKL_Get_Max_Threads"):
        return int(library.MKL_Get_Max_Threads())
    return None


def _address(library: ctypes.CDLL) -> int | None:
    return ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value


def _path(library: ctypes.CDLL) -> Path | None:
    """The file that holds a library's `cblas_sgemm`."""
    info = _DlInfo()
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    found = dladdr(_address(library), ctypes.byref(info))
    return Path(os.fsdecode(info.file)) if found and info.file else None
