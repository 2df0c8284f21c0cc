"""A run that is killed at any moment goes on to the same weights."""

import random
import subprocess
import sys
import time

import numpy as np
import pytest

import endless_training
from flash_mlx.checkpoint import load_network
from flash_mlx.train.state import STATE, RunState
from training import parameters


def steps_done(folder):
    return RunState.load(folder, {}).step if (folder / STATE).is_file() else 0


@pytest.mark.parametrize("kind", ["flash", "vispec"])
def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_weights(kind, tmp_path):
    endless_training.trainer(kind, tmp_path / "whole").run()
    rng, done = random.Random(), []
    while len(done) < 3 or done[-1] < 12:
        line = (sys.executable, endless_training.__file__, kind, tmp_path / "killed")
        process = subprocess.Popen(line)
        began = steps_done(tmp_path / "killed")
        while process.poll() is None and steps_done(tmp_path / "killed") < began + 3:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
        done.append(steps_done(tmp_path / "killed"))
        load_network(tmp_path / "killed")  # a drafter at every moment
    assert process.returncode == -9 or done[-1] == 40
    last = endless_training.trainer(kind, tmp_path / "killed")
    assert last.resume() == done[-1]
    assert last.run()
    before, after = (parameters(load_network(tmp_path / name)[0]) for name in ("whole", "killed"))
    assert all(np.array_equal(before[name], after[name]) for name in before)
