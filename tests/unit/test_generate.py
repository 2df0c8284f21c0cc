"""Text in, text out: settings, pieces, endings. The texts themselves are the loop's matter."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import flash_mlx
from commands import make_drafter
from flash_mlx.generate import (
    Model,
    generate,
    join,
    load,
    make_sampler,
    stream_generate,
    with_drafter,
)
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from tiny import random_image


@pytest.fixture(scope="module")
def plain(tiny_llava: Path) -> Model:
    return load(tiny_llava, draft="none")


@pytest.fixture(scope="module")
def drafted(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    drafter = make_drafter(tmp_path_factory.mktemp("drafter"))
    return load(str(tiny_llava), draft=drafter, drafting="fixed")


def stopping_at(model: Model, *ids: int) -> Model:
    return dataclasses.replace(model, loaded=dataclasses.replace(model.loaded, eos_ids=ids))


def test_settings_come_from_the_caller_then_the_checkpoint_then_the_defaults() -> None:
    checkpoint = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "do_sample": True}
    assert make_sampler({}) == Sampler(0.0, 1.0, 0, 0.0)
    assert make_sampler(checkpoint) == Sampler(0.7, 0.8, 20, 0.0)
    assert make_sampler(checkpoint, 0.0, 1.0, 0, 0.1) == Sampler(0.0, 1.0, 0, 0.1)
    assert make_sampler({**checkpoint, "do_sample": False}).greedy
    assert make_sampler({**checkpoint, "do_sample": False}, 0.5).temperature == 0.5
    assert make_sampler(dict.fromkeys(checkpoint)) == Sampler()
    with pytest.raises(ValueError, match=r"^Top-p"):
        make_sampler({}, top_p=0.0)


@pytest.mark.parametrize(
    "wrong", [{"temperature": "hot"}, {"temperature": -1}, {"top_p": "x"}, {"top_k": [50]}]
)
def test_wrong_settings_of_a_checkpoint_name_their_file(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^generation_config\.json: .* must be"):
        make_sampler(wrong)
    assert make_sampler({"top_k": 50.0}).top_k == 50


def test_the_pieces_make_the_whole_answer(drafted: Model) -> None:
    settings = {"max_tokens": 20, "temperature": 0.0}
    pieces = list(stream_generate(drafted, "What is this?", random_image(), **settings))
    whole = generate(drafted, "What is this?", [random_image()], **settings)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == list(whole.token_ids)
    assert len(whole.token_ids) == 20 == whole.stats.generation_tokens
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert whole.finish_reason == join(pieces).finish_reason == "length"
    assert (whole.visual_tokens, whole.latents) == (16, 4)
    assert whole.stats.drafted > 0
    assert whole.prompt_tps > 0
    assert whole.generation_tps > 0
    assert whole.peak_memory > 0


def test_a_drafter_does_not_change_the_text(plain: Model, drafted: Model) -> None:
    settings = {"max_tokens": 40, "temperature": 0.0}
    pictures = [random_image(seed=1), random_image(seed=2)]
    expected = generate(plain, "Compare them.", pictures, **settings)
    assert generate(drafted, "Compare them.", pictures, **settings).token_ids == expected.token_ids
    assert (expected.stats.drafted, expected.latents) == (0, 0)


def test_penalties_change_the_text_and_a_drafter_does_not(plain: Model, drafted: Model) -> None:
    def says(**penalties: Any) -> tuple[int, ...]:
        settings = {"max_tokens": 40, "temperature": 0.0, **penalties}
        expected = generate(plain, "Hello.", **settings).token_ids
        assert generate(drafted, "Hello.", **settings).token_ids == expected
        return expected

    def only_even(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[1]) % 2 == 0, logits, -mx.inf)

    free = says()
    assert free[-15:-10] == free[-10:-5] == free[-5:]  # so penalties must look 5 tokens back
    for name in ("repetition", "presence", "frequency"):
        penalty = {f"{name}_penalty": 2.0}
        assert says(**penalty) != free
        assert says(**penalty, **{f"{name}_context_size": 3}) == free
    assert free[0] not in says(logit_bias={free[0]: -100.0})
    assert all(token % 2 == 0 for token in says(logits_processors=[only_even]))


def test_the_checkpoints_own_repetition_penalty_does_not_count(plain: Model) -> None:
    # mlx-vlm does not read it either.
    defaults = {**plain.loaded.generation_defaults, "repetition_penalty": 2.0}
    loaded = dataclasses.replace(plain.loaded, generation_defaults=defaults)
    settings = {"max_tokens": 40, "temperature": 0.0}
    said = generate(dataclasses.replace(plain, loaded=loaded), "Hello.", **settings)
    assert said.token_ids == generate(plain, "Hello.", **settings).token_ids


@pytest.mark.parametrize("kind", ["plain", "drafted"])
def test_a_stop_token_ends_the_text_and_does_not_show(
    kind: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    settings = {"max_tokens": 12, "temperature": 0.0}
    whole = generate(model, "What is this?", **settings)
    place = next(i for i in range(3, 12) if whole.token_ids[i] not in whole.token_ids[:i])
    stopped = generate(stopping_at(model, whole.token_ids[place]), "What is this?", **settings)
    assert stopped.token_ids == whole.token_ids[: place + 1]
    assert stopped.finish_reason == "stop"
    tokenizer = model.processor.tokenizer
    said = tokenizer.decode(list(whole.token_ids[:place]), skip_special_tokens=True)
    assert stopped.text == said


def test_a_budget_that_ends_with_a_stop_token_is_a_stop(plain: Model) -> None:
    first = generate(plain, "Hello.", max_tokens=1, temperature=0.0)
    assert first.finish_reason == "length"
    model = stopping_at(plain, *first.token_ids)
    stopped = generate(model, "Hello.", max_tokens=1, temperature=0.0)
    assert (stopped.finish_reason, stopped.text) == ("stop", "")


def test_wrong_settings_are_refused_before_anything_is_computed(plain: Model) -> None:
    with pytest.raises(ValueError, match="temperature"):
        stream_generate(plain, "Hello.", temperature=-1.0)
    with pytest.raises(ValueError, match="repetition penalty"):
        stream_generate(plain, "Hello.", repetition_penalty=0.0)
    with pytest.raises(ValueError, match="one of the model's"):
        stream_generate(plain, "Hello.", logit_bias={10**6: 1.0})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        stream_generate(plain, "Hello.", "nowhere.png")
    for wrong in (0, -1, 2.0, "many", True):
        with pytest.raises(ValueError, match="tokens to generate must be a whole number, 1 or"):
            stream_generate(plain, "Hello.", max_tokens=wrong)
    for wrong in (-1, 0.5, None, 2**63):
        with pytest.raises(ValueError, match="seed must be a whole number, 0 or more"):
            stream_generate(plain, "Hello.", seed=wrong)


def test_what_was_loaded_can_be_asked(plain: Model, drafted: Model, tiny_llava: Path) -> None:
    assert (plain.draft_kind, plain.draft_name, plain.drafter) == ("none", "none", None)
    assert (drafted.draft_kind, drafted.name) == ("flash", str(tiny_llava))
    three = Prompt((1,) * 9, image_spans=((1, 2), (3, 5), (5, 8)))
    assert drafted.num_latents(three) == 12
    assert not plain.is_demo
    assert plain.config["model_type"] == "llava"
    found = load(tiny_llava)  # no drafter is known for it
    assert (found.draft_kind, found.draft_name, found.num_latents(three)) == ("ngram", "ngram", 0)
    assert load(tiny_llava, "ngram", draft_block_size=2).drafter.num_drafts == 2
    with pytest.raises(ValueError, match="drafts must be 1 or more; got 0"):
        load(tiny_llava, "ngram", draft_block_size=0)


def test_a_target_can_get_another_drafter(drafted: Model) -> None:
    model = with_drafter(drafted, "ngram", draft_block_size=2)
    assert (model.draft_kind, model.drafter.num_drafts) == ("ngram", 2)
    assert model.loaded is drafted.loaded
    assert with_drafter(drafted).draft_name == "ngram"
    assert with_drafter(drafted, "none").drafter is None
    assert drafted.draft_kind == "flash"
    with pytest.raises(FileNotFoundError, match="/no/such/drafter"):
        with_drafter(drafted, "/no/such/drafter")


def test_the_root_exports_lazily() -> None:
    assert flash_mlx.load is load
    assert flash_mlx.generate is generate
    assert flash_mlx.stream_generate is stream_generate
    assert {"load", "Sampler", "Prompt"} <= set(dir(flash_mlx))
    assert all(getattr(flash_mlx, name) is not None for name in flash_mlx.__all__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        flash_mlx.nothing_like_it  # noqa: B018
    code = (
        "import sys, flash_mlx, flash_mlx.cli\n"
        "heavy = {'mlx', 'mlx_vlm', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import flash_mlx.sampling\n"
        "from flash_mlx import Sampler, load, generate\n"
        "import flash_mlx.generate\n"
        "assert flash_mlx.generate is generate is sys.modules['flash_mlx.generate'].generate"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
