"""The honest harness: drafters against plain decoding, interleaved in one process.

`run` lets all contenders answer all questions (`compare`), `questions` reads data sets, `figures`
is the arithmetic, `table` and `plot` show it. `replay` drives the real loop with recorded texts
instead of a model.
"""

from flash_mlx.bench.answers import MLX_VLM, PLAIN, Answer, Settings
from flash_mlx.bench.compare import run
from flash_mlx.bench.questions import SCENES, Question, first_prompt, read_questions

__all__ = [
    "MLX_VLM",
    "PLAIN",
    "SCENES",
    "Answer",
    "Question",
    "Settings",
    "first_prompt",
    "read_questions",
    "run",
]
