"""The kernels' bodies as CUDA, compiled by NVRTC and no further: does another compiler take them?

MLX runs on CUDA too, where a simdgroup is a warp. `prelude.cuh` defines the words of Metal that the
kernels use in CUDA's: barriers, simdgroup operations as shuffles, and 8 x 8 matrices as shuffles
and multiplications, in Metal's own layout. What no macro can do is done here: `threadgroup`
variables become `__shared__`, and what a thread may ask about itself becomes a variable.

Nothing of it is part of the package: kernels are used on Metal alone. The compiler is looked for in
the package `nvidia-cuda-nvrtc-cu12`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from functools import cache
from pathlib import Path

from emulator import Call, KernelText, generate
from emulator.translate import DECLARATION, DECLARATOR, EXPLICIT_INSTANTIATION

PRELUDE = Path(__file__).parent / "prelude.cuh"
HEADERS = ("metal_stdlib", "metal_simdgroup", "metal_simdgroup_matrix", "metal_atomic")
OPTIONS = ("--gpu-architecture=compute_80", "-default-device", "-std=c++17")
LINEAR = "(threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x"

# What a thread may ask about itself.
ATTRIBUTES = {
    "thread_index_in_simdgroup": f"uint({LINEAR}) % 32u",
    "simdgroup_index_in_threadgroup": f"uint({LINEAR}) / 32u",
    "thread_index_in_threadgroup": f"uint({LINEAR})",
    "threadgroup_position_in_grid": "blockIdx",
    "thread_position_in_threadgroup": "threadIdx",
    "threads_per_threadgroup": "make_uint3(blockDim.x, blockDim.y, blockDim.z)",
    "threadgroups_per_grid": "make_uint3(gridDim.x, gridDim.y, gridDim.z)",
    "thread_position_in_grid": "make_uint3(blockIdx.x * blockDim.x + threadIdx.x, "
    "blockIdx.y * blockDim.y + threadIdx.y, blockIdx.z * blockDim.z + threadIdx.z)",
}


class CudaError(RuntimeError):
    """NVRTC refused the text; its log."""


@cache
def compiler() -> ctypes.CDLL | None:
    """Return NVRTC; None where the package is not installed."""
    try:
        found = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        return None
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [file for folder in folders for file in Path(folder).glob("lib/libnvrtc.so.*")]
    files = [file for file in files if "builtins" not in file.name and "alt" not in file.name]
    return ctypes.CDLL(str(files[0])) if files else None


def to_cuda(kernel: KernelText, call: Call) -> tuple[str, str]:
    """Return a kernel's text as CUDA, and the name of the instance that the call wants."""
    made = generate(kernel, call)
    text = EXPLICIT_INSTANTIATION.sub("", made.text)
    text = re.sub(r"^.*decltype\(.*$", "", text, flags=re.MULTILINE)
    start = text.index("[[kernel]]")
    opened = text.index(") {\n", start)
    signature, body = text[start:opened], text[opened + len(") {\n") :]
    for name in made.attributes:
        signature = re.sub(rf",?\s*\w+ {name} \[\[{name}\]\]", "", signature)
    signature = re.sub(r" \[\[buffer\(\d+\)\]\]", "", signature)
    signature = signature.replace("[[kernel]]", "__global__").replace("&", "")  # by value
    asked = "".join(f"  const auto {name} = {ATTRIBUTES[name]};\n" for name in made.attributes)
    text = text[:start] + signature + ") {\n" + asked + body
    text = DECLARATION.sub(_shared, text)
    return PRELUDE.read_text(encoding="utf-8") + text, made.function + made.template


def _shared(match: re.Match[str]) -> str:
    kind, names = match.groups()
    found = DECLARATOR.findall(names)
    return " ".join(f"__shared__ {kind} {name}{sizes.strip()};" for name, sizes in found)


def compile_cuda(text: str, name: str) -> str:
    """Return the PTX of a kernel.

    Args:
        text: From `to_cuda`.
        name: Likewise.

    Raises:
        CudaError: NVRTC refuses the text.
    """
    nvrtc = compiler()
    assert nvrtc is not None
    program = ctypes.c_void_p()
    empty = (ctypes.c_char_p * len(HEADERS))(*[b""] * len(HEADERS))
    names = (ctypes.c_char_p * len(HEADERS))(*(header.encode() for header in HEADERS))
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"kernel.cu", len(HEADERS), empty, names
    )
    try:
        nvrtc.nvrtcAddNameExpression(program, name.encode())
        options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
        if nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options):
            raise CudaError(_text(nvrtc, program, "ProgramLog"))
        return _text(nvrtc, program, "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.value.decode()
