"""Faults planted in the kernels: the checks that every kernel goes through find each of them.

A test that cannot fail proves nothing, so these keep `test_kernels` honest.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from cases import CASES, Case
from emulator import Emulator, check_language
from emulator.compiler import CompileError
from emulator.machine import EmulationError
from flash_mlx.kernels import metal
from test_kernels import check

CASE = {case.name: case for case in CASES}
PRODUCT, PLAIN_PRODUCT = (
    "verify_qmm-16x37x640-g128-b4-float32",
    "verify_qmm-2x64x256-g64-b4-float32",
)
GROUPS = "verify_qmm-8x100x384-g32-b8-float32"
HEAD, TIES = "lmhead_topk-11x600x256-g32-b8-top10-float32", "lmhead_topk-ties192"
POOL, TREE = "latent_pool-5x33x72-float32", "tree_attention-7h1x80-300keys-9rows-float32"
FULL = "tree_attention-2h2x96-70keys-64rows-float32"
VIEW = "tree_attention-4h2x64-77keys-5rows-float32"
SLOT, WALK = "slot_attention-7rows-3slots-1h80-at50-float32", "accept_tree-64rows-sampled"

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

# What is wrong: the case, the right text, the wrong one.
FAULTS = {
    "an index off by one": (PRODUCT, "packed[t][i] = words[i];", "packed[t][i] = words[i + 1];"),
    "a barrier dropped": (
        PLAIN_PRODUCT,
        f"  {BARRIER}\n  for (int i = int(tid); i < SIZE",
        "  for (int i = int(tid); i < SIZE",
    ),
    "a barrier dropped in a loop": (
        POOL,
        f"    {BARRIER}  // the last chunk's weights are read",
        "",
    ),
    "a wrong stride": (VIEW, "head * k_strides[0]", "head * total * D"),
    "a wrong mask bit": (TREE, "uint(bit & 31)", "uint((bit + 1) & 31)"),
    "the wrong word of a mask": (
        FULL,
        "bit < 32 ? low : high",
        "bit < 31 ? low : high",
    ),
    "a row not written": (POOL, "if (m < M && d0 < D)", "if (m < M - 1 && d0 < D)"),
    "an edge not guarded": (PRODUCT, "min(n0 + 8 * t + r, N - 1)", "n0 + 8 * t + r"),
    "the scale of another group": (GROUPS, "quarter * 32) / GROUP", "quarter * 32) / (2 * GROUP)"),
    "a sum not rescaled": (TREE, "weight = weight * shrink + sum", "weight = weight + sum"),
    "a split forgotten": (
        TREE,
        "p < splits; ++p) {\n    const",
        "p < splits - 1; ++p) {\n    const",
    ),
    "tied tokens forgotten": (TIES, "(v == last && id > last_id)", "false"),
    "ties to the highest id of other tiles": (
        "lmhead_topk-ties2048",
        "(v == best && id < best_id)",
        "(v == best && id > best_id)",
    ),
    "ties to a lane's last token": (
        "lmhead_topk-ties64",
        "if (logit[i][b] > best)",
        "if (logit[i][b] >= best)",
    ),
    "ties to the last lane": (
        "lmhead_topk-ties72",
        "simd_min(best == winner ? tile * 256 + block * 32 + int(lane) : 0x7fffffff)",
        "simd_max(best == winner ? tile * 256 + block * 32 + int(lane) : -1)",
    ),
    "the youngest sibling that holds": (
        WALK,
        "if (holds[child] && parent[child] == row) {",
        "if (holds[child] && (parent[child] == row || (row && parent[child] == parent[row]))) {",
    ),
    "a scale in place of a bias": (GROUPS, "float(biases[group])", "float(scales[group])"),
    "positions that do not advance": (SLOT, "float(old + row)", "float(old)"),
    "a slot that does not see itself": (SLOT, "row > s + R - SLOTS", "row >= s + R - SLOTS"),
    "an accumulator not cleared": (
        PRODUCT,
        "      acc[t][u] = simdgroup_matrix<float, 8, 8>(0.0f);",
        "",
    ),
    "simdgroup lanes that part": (
        HEAD,
        "    top = simd_max(top);",
        "    if (lane < 16) { top = simd_max(top); } else { top = simd_min(top); }",
    ),
    "too much threadgroup memory": (POOL, "weights[TILES * 8 * 32]", "weights[TILES * 8 * 1024]"),
    "padding that counts": (FULL, "j + e < total && (bit", "(bit"),
    "a pointer without an address space": (POOL, "const device T* f0", "const T* f0"),
    "float where bfloat is wanted": (
        VIEW.replace("float32", "bfloat16"),
        "static_cast<T>(sum / weight)",
        "sum / weight",
    ),
    "a younger sibling's turn": (WALK, "holds[child] && parent[child] == row", "holds[child]"),
    "a rest not filled": (WALK, "    path[i] = -1;\n", ""),
}


class Mutant(Emulator):
    """Runs kernels with a text replaced."""

    def __init__(self, right: str, wrong: str) -> None:
        super().__init__()
        self.planted = 0
        self._right, self._wrong = right, wrong

    def metal_kernel(self, *, source: str, header: str = "", **options: Any) -> Callable[..., Any]:
        self.planted += source.count(self._right) + header.count(self._right)
        return super().metal_kernel(
            source=source.replace(self._right, self._wrong),
            header=header.replace(self._right, self._wrong),
            **options,
        )


def check_all(case: Case, emulator: Emulator) -> None:
    """What `test_kernels` asks of a case."""
    check(case)
    for launched in emulator.launches:
        assert check_language(launched.generated.text) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(
    fault: str, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, right, wrong = FAULTS[fault]
    mutant = Mutant(right, wrong)
    monkeypatch.setattr(mx.fast, "metal_kernel", mutant.metal_kernel)
    metal.build.cache_clear()
    with pytest.raises((AssertionError, EmulationError, CompileError)):
        check_all(CASE[case], mutant)
    assert mutant.planted
