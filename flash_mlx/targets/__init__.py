"""Targets: mlx-vlm's vision-language models behind the protocol of `flash_mlx.decode`.

`load_target` checks a folder, loads it through mlx-vlm and proves on the real model that a batched
pass says what single passes say. `MlxVlmTarget` is the adapter. Nothing is changed in mlx-vlm; what
a tree pass needs besides is hooked in for that pass only (`hooks`).
"""

from flash_mlx.targets.adapter import MlxVlmTarget
from flash_mlx.targets.families import FAMILIES, Family
from flash_mlx.targets.load import LoadedTarget, load_target

__all__ = ["FAMILIES", "Family", "LoadedTarget", "MlxVlmTarget", "load_target"]
