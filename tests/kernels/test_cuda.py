"""Every kernel's body is taken by a second compiler, as CUDA; nothing is run."""

import re

import mlx.core as mx
import pytest

from as_cuda import CudaError, compile_cuda, compiler, to_cuda
from cases import CASES, Case
from emulator import Call, KernelText
from flash_mlx.kernels import metal

pytestmark = pytest.mark.skipif(
    compiler() is None, reason="needs NVRTC (pip install nvidia-cuda-nvrtc-cu12)"
)


class Noted:
    """Notes what is launched in place of `mx.fast.metal_kernel`, and returns zeros."""

    def __init__(self) -> None:
        self.launches: list[tuple[KernelText, Call]] = []

    def metal_kernel(self, **made: object) -> object:
        def launch(**call: object) -> list[mx.array]:
            self.launches.append((KernelText(**made), Call(**call)))
            return [
                mx.zeros(shape, dtype)
                for shape, dtype in zip(call["output_shapes"], call["output_dtypes"], strict=True)
            ]

        return launch


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    noted = Noted()
    monkeypatch.setattr(mx.fast, "metal_kernel", noted.metal_kernel)
    metal.build.cache_clear()
    yield noted
    metal.build.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_body_compiles_as_cuda(case: Case, noted: Noted) -> None:
    list(case.kernel.launch(*case.make()))
    assert noted.launches
    for kernel, call in noted.launches:
        ptx = compile_cuda(*to_cuda(kernel, call))
        assert re.search(r"\.entry \w*custom_kernel_flash", ptx)
        assert ("shared" in ptx) == ("threadgroup " in kernel.source + kernel.header)


def test_what_is_no_program_is_refused(noted: Noted) -> None:
    case = CASES[0]
    list(case.kernel.launch(*case.make()))
    text, name = to_cuda(*noted.launches[0])
    with pytest.raises(CudaError, match="undefined"):
        compile_cuda(text.replace("simd_max(", "simd_most("), name)
