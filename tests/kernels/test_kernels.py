"""Every kernel against its definition, emulated."""

import mlx.core as mx
import pytest

from cases import CASES, Case
from emulator import Emulator, check_language, mlx_text
from flash_mlx.kernels import metal
from flash_mlx.kernels.trial import definition, worst_error

REAL = mx.fast.metal_kernel


def check(case: Case) -> None:
    """The kernel says what the definition says in float32."""
    arguments = case.make()
    assert case.kernel.fits(*arguments) is None
    error, allowed = worst_error(
        list(case.kernel.launch(*arguments)), definition(case.kernel.ops, arguments)
    )
    assert error <= allowed, case.name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kernel_says_what_its_definition_says(case: Case, emulator: Emulator) -> None:
    check(case)
    assert emulator.launches


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_text_is_mlx_own_and_in_metal_s_language(case: Case, emulator: Emulator) -> None:
    case.kernel.launch(*case.make())
    for launched in emulator.launches:
        ours = launched.generated.text
        assert ours.strip() == mlx_text(REAL, launched.kernel, launched.call).strip()
        assert check_language(ours) == []


@pytest.mark.metal
@pytest.mark.skipif(not metal.available(), reason="needs a Metal device")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kernel_says_on_metal_what_its_definition_says(case: Case) -> None:
    metal.build.cache_clear()
    check(case)
