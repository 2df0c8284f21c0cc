"""Conversations that read nothing twice say what fresh runs say."""

from dataclasses import replace
from itertools import zip_longest
from types import SimpleNamespace

import mlx.core as mx
import pytest

from flash_mlx.around import TargetAround
from flash_mlx.cost import Costs
from flash_mlx.decode import NoDrafter, decode
from flash_mlx.draft import FlashConfig, FlashDrafter, FlashModel, NgramDrafter
from flash_mlx.draft.adaptive import paced
from flash_mlx.draft.stepwise import StepwiseDrafter
from flash_mlx.generate import Model, generate, join, stream_generate, with_drafter
from flash_mlx.loading import read_by
from flash_mlx.messages import Message
from flash_mlx.processing import make_chat_prompt, make_prompt
from flash_mlx.prompt import Prompt
from flash_mlx.sampling import Sampler
from flash_mlx.session import Session
from flash_mlx.store import KeptText, Reading, TextStore, state_bytes
from flash_mlx.targets import LoadedTarget
from peers_reference import CONFIGS, random_model
from tiny import random_image

ONE, TWO = random_image(seed=1), random_image(70, 120, seed=2)
KINDS = ["none", "ngram", "flash", "paced"]
COSTS = Costs(1.0, ((1, 1.0), (2, 1.1), (8, 1.2)), ((1, 0.1), (3, 0.1)))
SETTINGS = {"max_tokens": 24, "temperature": 0.0}


def model_with(loaded: LoadedTarget, kind: str) -> Model:
    bare = Model(loaded, None, "tiny", "none", "none", is_demo=False)
    if kind in ("none", "ngram"):
        return with_drafter(bare, kind)
    mx.random.seed(0)
    target = loaded.target
    if kind in CONFIGS:
        size = target.vocab_size
        stepwise = StepwiseDrafter(random_model(kind), target.embed, target.lm_head, size)
        return replace(bare, loaded=read_by(stepwise, loaded), drafter=stepwise)
    config = FlashConfig(
        target.hidden_size, target.vocab_size, 3, num_latents=4, num_heads=2, head_dim=16
    )
    drafter = FlashDrafter(FlashModel(config), target.embed, target.lm_head)
    if kind == "paced":
        drafter = paced(drafter, lambda _, greedy: COSTS, lookup=NgramDrafter())
    return replace(bare, drafter=drafter, draft_name=kind, draft_kind="flash")


@pytest.mark.parametrize("kind", ["eagle", "vispec"])
def test_drafters_that_draft_token_by_token_keep_what_they_read(
    loaded: LoadedTarget, kind: str
) -> None:
    test_every_turn_says_what_a_fresh_run_says(model_with(loaded, kind))


@pytest.fixture(params=KINDS)
def model(loaded: LoadedTarget, request: pytest.FixtureRequest) -> Model:
    return model_with(loaded, request.param)


def fresh(model: Model, session: Session, text: str, images: tuple = (), **settings) -> tuple:
    """What a run without a store says to the same conversation."""
    turn = (*session.messages, Message("user", text, images))
    return generate(model, make_chat_prompt(model.loaded, turn), **SETTINGS | settings).token_ids


def test_every_turn_says_what_a_fresh_run_says(model: Model) -> None:
    session = Session(model, system="Be brief.")
    for number, (text, images) in enumerate(
        [("What is this?", (ONE,)), ("And that?", ()), ("Compare.", (TWO,)), ("Why?", ())]
    ):
        expected = fresh(model, session, text, images)
        answer = session.ask(text, images, **SETTINGS)
        assert answer.token_ids == expected
        if number == 0:
            assert answer.kept_tokens == 0
        else:
            assert answer.kept_tokens >= 20
    assert [message.role for message in session.messages] == ["system", *["user", "assistant"] * 4]
    assert len(session.store) == 1


def test_a_second_question_looks_at_no_picture(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(model)
    session.ask("What is this?", ONE, **SETTINGS)
    session.reset()
    expected = fresh(model, session, "How many are there?", (ONE,))
    prompt = make_prompt(model.loaded, "How many are there?", [ONE])
    with monkeypatch.context() as patch:
        language = type(model.loaded.target.model)
        patch.setattr(language, "get_input_embeddings", lambda *_, **__: 1 / 0)
        answer = session.ask("How many are there?", ONE, **SETTINGS)
    assert answer.token_ids == expected
    assert prompt.image_spans[0][1] <= answer.kept_tokens < len(prompt)


def test_a_model_is_not_asked_about_another_picture(model: Model) -> None:
    session = Session(model)
    session.ask("What is this?", ONE, **SETTINGS)
    session.reset()
    other = random_image(seed=9)  # of the same size, so the tokens are the same
    expected = fresh(model, session, "What is this?", (other,))
    answer = session.ask("What is this?", other, **SETTINGS)
    assert answer.kept_tokens == 0
    assert answer.token_ids == expected
    assert len(session.store) == 2


def test_penalties_count_the_same_text(model: Model) -> None:
    session = Session(model)
    settings = {"repetition_penalty": 1.3, "presence_penalty": 0.5}
    session.ask("What is this?", ONE, **SETTINGS | settings)
    expected = fresh(model, session, "And now?", **settings)
    answer = session.ask("And now?", **SETTINGS | settings)
    assert answer.token_ids == expected
    assert answer.kept_tokens > 0


def test_what_an_answer_cut_off_had_said_is_remembered(model: Model) -> None:
    session = Session(model)
    responses = session.stream("What is this?", ONE, **SETTINGS)
    said = "".join(next(responses).text for _ in range(3))
    responses.close()
    assert session.messages[-1] == Message("assistant", said.strip())
    expected = fresh(model, session, "Go on.")
    answer = session.ask("Go on.", **SETTINGS)
    assert answer.token_ids == expected
    assert answer.kept_tokens > 0


def test_an_error_leaves_the_conversation_as_it_was(llava: LoadedTarget) -> None:
    session = Session(model_with(llava, "ngram"))
    session.ask("What is this?", ONE, **SETTINGS)
    before, calls = session.messages, iter(range(100))
    fails = [lambda tokens, logits: logits if next(calls) < 2 else 1 / 0]  # at the third token
    with pytest.raises(ZeroDivisionError):
        session.ask("And that?", **SETTINGS, logits_processors=fails)
    assert session.messages == before
    expected = fresh(session.model, session, "And that?")
    assert session.ask("And that?", **SETTINGS).token_ids == expected
    long = "long " * 3000
    with pytest.raises(ValueError, match="must fit in the model's context of 2048"):
        session.ask(long)
    assert len(session.messages) == 4


def test_two_answers_at_once_do_not_share_a_cache(model: Model) -> None:
    session, other = Session(model), Session(model)
    other.store = session.store
    session.ask("What is this?", ONE, **SETTINGS)
    expected = [fresh(model, each, "How many are there?", (ONE,)) for each in (other, other)]
    session.reset()
    streams = [each.stream("How many are there?", ONE, **SETTINGS) for each in (session, other)]
    answers: list[list] = [[], []]
    for pair in zip_longest(*streams):
        for answer, response in zip(answers, pair, strict=True):
            answer += [] if response is None else [response]
    assert [join(answer).token_ids for answer in answers] == expected
    assert sorted(join(answer).kept_tokens > 0 for answer in answers) == [False, True]
    assert len(session.store) == 2


def texts_of(store: TextStore, model: Model, seeds: range) -> list[int]:
    """Ask about a picture a seed; returns which of them the store then has."""
    for seed in seeds:
        image = random_image(seed=seed)
        generate(model, "What is this?", image, store=store, **SETTINGS)
    prompts = {
        seed: make_prompt(model.loaded, "Why?", [random_image(seed=seed)], digests=True)
        for seed in seeds
    }
    kept = store._texts
    return [seed for seed in seeds if any(text.num_shared(prompts[seed]) for text in kept)]


def test_memory_is_bounded_and_the_least_recently_used_goes_first(llava: LoadedTarget) -> None:
    model = model_with(llava, "flash")
    store = TextStore()
    assert texts_of(store, model, range(1)) == [0]
    size = store.nbytes
    assert size == store._texts[0].cache.nbytes + state_bytes(store._texts[0].state)
    assert store._texts[0].cache.nbytes == 4 * 2 * 2 * 16 * 4 * 256  # layers, k and v, heads, ...
    store = TextStore(3 * size)
    assert texts_of(store, model, range(5)) == [2, 3, 4]
    assert store.nbytes == 3 * size
    generate(model, "Why?", random_image(seed=2), store=store, **SETTINGS)  # used again
    assert texts_of(store, model, range(5, 6)) == [5]
    held = [text.images[0][1] for text in store._texts]
    images = [random_image(seed=seed) for seed in (4, 2, 5)]
    asked = [make_prompt(llava, "Why?", [image], digests=True) for image in images]
    assert held == [prompt.image_digests[0] for prompt in asked]
    for limit in (0, size - 1):
        store = TextStore(limit)
        assert texts_of(store, model, range(2)) == []
        assert store.nbytes == 0
    with pytest.raises(ValueError, match="0 or more; got -1 bytes"):
        TextStore(-1)


def test_a_store_serves_one_model_at_a_time(llava: LoadedTarget, qwen: LoadedTarget) -> None:
    store = TextStore()
    for loaded in (llava, qwen):
        for kind in ("ngram", "none"):
            model = model_with(loaded, kind)
            assert generate(model, "What is this?", ONE, store=store, **SETTINGS).kept_tokens == 0
    assert generate(model, "Why?", ONE, store=store, **SETTINGS).kept_tokens > 0


def test_a_short_greeting_in_common_takes_no_conversation_away(llava: LoadedTarget) -> None:
    model, store = model_with(llava, "none"), TextStore()
    generate(model, "Hello! " + "How are you? " * 20, store=store, **SETTINGS)
    assert generate(model, "Hello! Who?", store=store, **SETTINGS).kept_tokens == 0
    assert len(store) == 2


def test_a_prompt_without_digests_shares_no_picture(llava: LoadedTarget) -> None:
    model, store = model_with(llava, "none"), TextStore()
    prompt = make_prompt(llava, "What is this?", [ONE])
    for _ in range(2):
        answers = list(stream_generate(model, prompt, store=store, **SETTINGS))
        assert join(answers).kept_tokens == 0
    assert len(store) == 0


def test_rows_of_a_new_picture_are_read_even_if_its_ids_were_said_before(
    llava: LoadedTarget,
) -> None:
    said = (7, 8, 1, 2, 9, 9, 5, 6)
    for images in ((), (((0, 2), "old"),)):
        text = KeptText(llava.target, NoDrafter(), said, images, llava.target.make_cache(), None)
        spans = (*(span for span, _ in images), (4, 6))
        digests = (*(content for _, content in images), "new")
        assert text.num_shared(Prompt(said, spans, image_digests=digests)) == 4
        spans, digests = spans[:-1], digests[:-1]
        assert text.num_shared(Prompt(said, spans, image_digests=digests)) == 7


def test_a_text_is_not_given_to_another_target_with_the_same_ids(llava: LoadedTarget) -> None:
    store, target, images = TextStore(), llava.target, (((0, 2), "picture"),)
    store.put(KeptText(target, NoDrafter(), (7, 8, 1, 2), images, target.make_cache(), None))
    prompt = Prompt((7, 8, 1, 3), ((0, 2),), image_digests=("picture",))
    assert store.take(TargetAround(target), NoDrafter(), prompt) is None
    assert store.take(target, NoDrafter(), prompt) is not None


def test_rows_that_the_drafter_has_not_heard_of_are_not_kept(llava: LoadedTarget) -> None:
    class Cut(NoDrafter):
        def extend(self, hidden: mx.array, tokens: tuple[int, ...], state: None) -> None:
            heard.append(tokens)
            if len(heard) == 4:
                raise KeyboardInterrupt

    store, heard = TextStore(), []
    prompt = make_prompt(llava, "What is this?", [ONE], digests=True)
    reading = Reading(store, llava.target, Cut(), prompt)
    rounds = decode(
        reading.target,
        reading.drafter,
        prompt,
        sampler=Sampler(),
        key=mx.random.key(0),
        max_tokens=12,
        stop_ids=(),
    )
    with pytest.raises(KeyboardInterrupt):
        list(rounds)
    reading.close()
    (text,) = store._texts
    assert len(text.tokens) == len(prompt) + 3
    assert text.cache.length == len(text.tokens) - 1


def test_answers_are_remembered_without_the_spaces_around_and_forgotten_but_for_the_system(
    llava: LoadedTarget,
) -> None:
    session = Session(model_with(llava, "none"), system="Be brief.")
    turn = (*session.messages, Message("user", "Hi"))
    pieces = [SimpleNamespace(text=" Good "), SimpleNamespace(text="day.\n")]
    assert list(session._remember(turn, iter(pieces))) == pieces
    assert session.messages == (*turn, Message("assistant", "Good day."))
    session.reset()
    assert session.messages == (Message("system", "Be brief."),)
