"""What a training run learns from and is measured on: questions, answers, traffic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import click

from flash_mlx.cli.progress import progress
from flash_mlx.loading import Model
from flash_mlx.train import Example, TrainConfig
from flash_mlx.train.answers import (
    AnswerFile,
    AnswerSettings,
    Asked,
    PromptMaker,
    answer_all,
    given_answers,
)
from flash_mlx.train.folder import ANSWERS, SKIPPED, list_skipped
from flash_mlx.train.source import Found, find_questions
from flash_mlx.train.traffic import identify, read_traffic
from flash_mlx.train.validate import hold_out


@dataclass(frozen=True, eq=False)
class Questions:
    """What can be used.

    Attributes:
        found: Questions, and what was left out.
        asked: As the target reads them.
        known: Answers by a question's digest, of those that were collected in use.
    """

    found: Found
    asked: list[Asked]
    known: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Data:
    """What a run learns from and is measured on; `facts` tell about it."""

    examples: list[Example]
    held_out: list[Asked]
    facts: dict[str, Any]


def ask(
    model: Model, options: Mapping[str, Any], config: TrainConfig, target_hash: str
) -> Questions:
    """Find the questions, and read their pictures once.

    Raises:
        OSError: Data or traffic is not there.
        ValueError: None can be used, or the order of training needs others as well.
    """
    found, asked = Found(), []
    if options["data"]:
        found = find(options, config)
        with progress("Reading", len(found.questions), "question") as bar:
            asked = PromptMaker(model.loaded, target_hash).ask_all(found, bar.update)
    known = {}
    if options["from_traffic"]:
        folder = options["from_traffic"]
        vocab_size = model.target.vocab_size
        for one, answer in read_traffic(folder, identify(model.loaded.path), found, vocab_size):
            if len(answer) > 1 and one.digest not in known:
                known[one.digest] = answer
                asked.append(one)
    if not asked:
        places = [str(options[name]) for name in ("data", "from_traffic") if options[name]]
        raise ValueError(
            f"There must be something to learn from; nothing in {' and '.join(places)} can be "
            f"used: {_some(found)}."
        )
    seen = sum(bool(one.prompt.image_spans) for one in asked)
    if config.order == "text_first" and not 0 < seen < len(asked):
        raise ValueError(
            f"Training on text first needs questions with and without pictures; got {seen} with "
            f"and {len(asked) - seen} without. Add rows, or mix from the beginning (order=mixed)."
        )
    return Questions(found, asked, known)


def find(options: Mapping[str, Any], config: TrainConfig) -> Found:
    """List what --data holds to ask.

    Raises:
        OSError: There is no such data.
        ValueError: It holds nothing to ask, or is no data set.
    """
    return find_questions(
        options["data"],
        prompts=options["prompts"],
        prompts_per_image=options["prompts_per_image"],
        image_folder=options["image_folder"],
        text_rows=config.order == "text_first",
        limit=options["limit"],
        split=options["split"],
        seed=options["seed"],
    )


def answer(model: Model, options: Mapping[str, Any], questions: Questions) -> Data:
    """Hold some questions out and answer the others.

    Raises:
        ValueError: No answer can be used.
    """
    output, most, seed = options["output"], options["validation_prompts"], options["seed"]
    found, asked, known = questions.found, questions.asked, questions.known
    kept, held_out = hold_out(asked, lambda one: one.question.images or one.digest, most, seed)
    sources = [str(options[name]) for name in ("data", "from_traffic") if options[name]]
    facts = {"source": ", ".join(sources), "questions": len(asked), "held out": len(held_out)}
    examples = [
        Example(one.prompt, known[one.digest], one.digest) for one in kept if _in(one, known)
    ]
    if known:
        facts["answers collected in use"] = len(examples)
    kept = [one for one in kept if not _in(one, known)]
    cut = 0
    if options["answers"] == "dataset":
        facts["answers of"] = "dataset"
        given, cut = given_answers(model.loaded, kept, found, options["max_tokens"])
        examples += given
        facts["answers cut off"] = cut
    elif kept:
        facts["answers of"] = "target"
        how = AnswerSettings(options["temperatures"], options["max_tokens"], seed)
        facts["at temperatures"] = ", ".join(f"{t:g}" for t in how.temperatures)
        file = AnswerFile(options["answer_cache"] or output / ANSWERS, model.target.vocab_size)
        count = len(kept) * len(how.temperatures)
        with progress("Answering", count, "answer") as bar:
            examples += answer_all(model, kept, how, file, lambda _: bar.update())
    facts |= {"examples": len(examples), "tokens": sum(len(e.answer) for e in examples)}
    facts["left out"] = len(found.skipped)
    list_skipped(output, found.skipped)
    if found.skipped:
        click.echo(
            f"Left out {len(found.skipped)}, listed in {output / SKIPPED}: {_some(found)}.",
            err=True,
        )
    if cut:
        click.echo(f"Cut off {cut} answers that were too long.", err=True)
    if not held_out:
        click.echo("There is one picture only, so the drafter is measured on it too.", err=True)
    return Data(examples, (held_out or asked)[:most], facts)


def _in(one: Asked, known: Mapping[str, tuple[int, ...]]) -> bool:
    return one.digest in known


def _some(found: Found) -> str:
    return "; ".join(f"{source}: {reason.rstrip('.')}" for source, reason in found.skipped[:3])
