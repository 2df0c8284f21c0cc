"""Where a stop string ends a text: the same place, whatever pieces the text comes in."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mlx.cli import run
from flash_mlx.decode import Round
from flash_mlx.generate import Model, generate, load, stream_generate
from flash_mlx.targets import LoadedTarget
from flash_mlx.transcript import StopStrings, Transcript, check_stop_strings
from identity import SHAPES, CorruptedOracle
from tiny import random_image

LETTERS = st.text("ab ", max_size=12)


def read(strings: list[str], pieces: list[str]) -> tuple[str, bool]:
    """Return the text of pieces up to a stop string, and whether there was one."""
    reader, said = StopStrings(strings), ""
    for piece in pieces:
        text, stopped = reader.add(piece)
        said += text
        assert not any(string in said for string in strings)
        if stopped:
            return said, True
    return said + reader.finish(), False


@given(
    st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3), LETTERS, st.sets(st.integers(1))
)
@settings(max_examples=300, deadline=None)
def test_pieces_do_not_matter(strings: list[str], text: str, cuts: set[int]) -> None:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    said, stopped = read(strings, pieces)
    # The first place at which a string is complete ends the text before that string.
    ends = [e for e in range(len(text) + 1) if any(text[:e].endswith(s) for s in strings)]
    if not ends:
        assert (said, stopped) == (text, False)
    else:
        longest = max(len(s) for s in strings if text[: ends[0]].endswith(s))
        assert (said, stopped) == (text[: ends[0] - longest], True)


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    reader = StopStrings(["###", "end"])
    assert reader.add("one #") == ("one ", False)
    assert reader.add("# two e") == ("## two ", False)
    assert reader.add("n") == ("", False)
    assert reader.finish() == "en"


@pytest.mark.parametrize("wrong", ["", [""], ["a", 3], 7, ["\ud800"]])
def test_what_is_no_stop_string_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="top string"):
        check_stop_strings(wrong)
    assert check_stop_strings(None) == ()
    assert check_stop_strings("a") == check_stop_strings(["a"]) == ("a",)


def test_a_round_that_is_cut_keeps_its_counts_consistent(llava: LoadedTarget) -> None:
    ids = llava.processor.tokenizer.encode("A large red circle.", add_special_tokens=False)
    rounds = [Round(tuple(ids[:1]), 0, 0), Round(tuple(ids[1:]), 9, len(ids) - 2)]
    transcript = Transcript(llava.processor, (), ["red"])
    first, last = transcript.watch(rounds)
    assert first == rounds[0]
    said = llava.processor.tokenizer.decode([*first.tokens, *last.tokens])
    assert said.rstrip().endswith("red")
    assert last.num_accepted == min(len(last.tokens), len(ids) - 2) < last.num_drafted == 9
    assert transcript.take() + transcript.finish() == "A large "
    assert transcript.stopped


@pytest.mark.parametrize("stop", ["🙂", "é", "🙂 red", "d🙂"])
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_a_stop_string_that_no_tokens_spell_is_found(
    llava: LoadedTarget, stop: str, at_once: int
) -> None:
    """Its bytes are tokens of their own, and share tokens and rounds with other text."""
    text = "A large red🙂 red é circle."
    tokenizer = llava.processor.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokenizer.encode("🙂", add_special_tokens=False)) > 2
    rounds = [
        Round(tuple(ids[i : i + at_once]), at_once - 1, 0) for i in range(0, len(ids), at_once)
    ]
    transcript = Transcript(llava.processor, (), [stop])
    said = [token for each in transcript.watch(rounds) for token in each.tokens]
    assert transcript.stopped
    assert transcript.take() + transcript.finish() == text[: text.index(stop)]
    assert stop in tokenizer.decode(said)
    assert stop not in tokenizer.decode(said[:-1])


@pytest.fixture(scope="module")
def plain(tiny_llava: Path) -> Model:
    return load(tiny_llava, draft="none")


SETTINGS: dict[str, Any] = {"max_tokens": 40, "temperature": 0.0}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("penalty", [None, 1.3])
def test_a_stop_string_ends_drafted_text_where_it_ends_plain_text(
    plain: Model, shape: str, penalty: float | None
) -> None:
    ask = ("What is this?", random_image())
    settings = {**SETTINGS, "repetition_penalty": penalty}
    free = generate(plain, *ask, **settings)
    oracle = CorruptedOracle(free.token_ids, SHAPES[shape], plain.target.vocab_size, right=0.9)
    drafted = dataclasses.replace(plain, drafter=oracle)
    cut_rounds = 0
    for start, length in [(3, 1), (5, 2), (11, 4), (20, 7), (31, 3)]:
        stop = free.text[start : start + length]
        expected = generate(plain, *ask, **settings, stop=stop)
        pieces = list(stream_generate(drafted, *ask, **settings, stop=[stop, "never said"]))
        said = "".join(piece.text for piece in pieces)
        ids = tuple(token for piece in pieces for token in piece.token_ids)
        assert (said, ids) == (expected.text, expected.token_ids)
        assert said == free.text[: free.text.index(stop)]
        assert ids == free.token_ids[: len(ids)]
        assert pieces[-1].finish_reason == expected.finish_reason == "stop"
        stats = pieces[-1].stats
        assert stats.generation_tokens == len(ids)
        assert stats.accepted <= len(ids) - 1
        cut_rounds += len(ids) < len(free.token_ids) and len(pieces[-2].token_ids) > 1
    assert cut_rounds  # a stop string inside of a block was met


def test_a_stop_string_that_never_comes_changes_nothing(plain: Model) -> None:
    free = generate(plain, "Hello.", **SETTINGS)
    held = generate(plain, "Hello.", **SETTINGS, stop=free.text[-2:] + "#")
    assert (held.text, held.token_ids) == (free.text, free.token_ids)
    assert held.finish_reason == "length"


def test_a_special_token_can_be_a_stop_string(plain: Model) -> None:
    pad = plain.processor.tokenizer.convert_tokens_to_ids("<pad>")
    biased: dict[str, Any] = {**SETTINGS, "logit_bias": {pad: 1000.0}}
    assert generate(plain, "Hello.", **biased).finish_reason == "length"
    stopped = generate(plain, "Hello.", **biased, stop="<pad>")
    assert (stopped.token_ids, stopped.text, stopped.finish_reason) == ((pad,), "", "stop")


def test_the_command_takes_stop_strings(
    tiny_llava: Path, plain: Model, capfd: pytest.CaptureFixture[str]
) -> None:
    free = generate(plain, "Hello.", **SETTINGS).text
    stop = free[8:11]
    words = ["generate", "--model", str(tiny_llava), "--prompt", "Hello.", "--max-tokens", "40"]
    words += ["--temperature", "0", "--no-verbose", "--draft-model", "none"]
    assert run([*words, f"--stop={stop}", "--stop", "@@@@"]) == 0
    assert capfd.readouterr().out == free[: free.index(stop)] + "\n"
    assert run([*words, "--stop", ""]) == 2
    assert "--stop must be text" in capfd.readouterr().err
