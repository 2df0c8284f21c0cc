"""How grounded is the demo target? Captions of held-out scenes, scored against two scenes.

    python evaluate.py --model ../../flash_mlx/demo/target --limit 200 --json grounding.json

A caption's mentions are matched one to one with the scene's objects, as well as possible; an object
that nothing mentions counts as wrong in every attribute, and so does a mention without an object.
The same captions scored against the next scene show what guessing would reach.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import flash_mlx
from PIL import Image

from words import (
    CAPTION_PROMPTS,
    NUMBERS,
    OPENINGS,
    PATTERN_WORDS,
    RELATIONS,
    SIZE_WORDS,
    VERB_FORMS,
    WHERE,
)
from render import render
from world import COLOURS, PLACES, SHAPES, Object, Scene, draw_scene

HELD_OUT = 40_000_000  # reporting; 30 million is for tuning, 20 million and 50 million for training


@dataclass(frozen=True)
class Mention:
    """What a caption says of one object; -1 where it does not say."""

    shape: int
    colour: int
    size: int
    pattern: int
    cell: int


def _index(words: list[str], groups: tuple[tuple[str, ...], ...] | tuple[str, ...]) -> int:
    """The first group one of whose words occurs, or -1."""
    for i, group in enumerate(groups):
        if any(word in words for word in ((group,) if isinstance(group, str) else group)):
            return i
    return -1


def mentions(text: str) -> list[Mention]:
    """The objects that a caption places somewhere."""
    found = []
    for sentence in re.split(r"(?<=\.)\s+", text.lower()):
        cells = [
            i for i, phrases in enumerate(WHERE) if any(phrase in sentence for phrase in phrases)
        ]
        words = re.findall(r"[a-z]+", sentence)
        shape, colour = _index(words, SHAPES), _index(words, COLOURS)
        if cells and shape >= 0 and colour >= 0:
            pattern = max(0, _index(words, PATTERN_WORDS))
            found.append(Mention(shape, colour, _index(words, SIZE_WORDS), pattern, cells[0]))
    return found


def stated_count(text: str) -> int:
    """The number of objects in the opening sentence, or -1."""
    opening = text.split(".")[0].lower()
    if re.search(r"\b(single|lonely|just one) ?shape|just one shape", opening):
        return 1
    for number in range(2, len(NUMBERS)):
        if re.search(rf"\b{NUMBERS[number]} (shapes|figures|objects)", opening):
            return number
    return -1


def stated_place(text: str) -> int:
    """The place whose opening the caption uses, or -1."""
    for i, place in enumerate(PLACES):
        for frame in OPENINGS[place]:
            pieces = [re.escape(piece) for piece in re.split(r"\{[nN]\}", frame) if len(piece) > 8]
            # Verbs agree with the count; a frame is recognised by its longest fixed piece.
            longest = max(pieces, key=len)
            for forms in VERB_FORMS:
                plural, singular = map(re.escape, forms)
                longest = longest.replace(plural, f"({plural}|{singular})")
            if re.search(longest, text):
                return i
    return -1


def stated_relation(text: str) -> tuple[str, str, str] | None:
    """(first object, relation, second object) of the caption's relation sentence."""
    for name, frames in RELATIONS.items():
        for frame in frames:
            pattern = (
                re.escape(frame)
                .replace(r"\{a\}", r"(?P<a>\w+ \w+)")
                .replace(r"\{b\}", r"(?P<b>\w+ \w+)")
            )
            if match := re.search(pattern, text):
                return match["a"], name, match["b"]
    return None


def relation_holds(scene: Scene, stated: tuple[str, str, str]) -> bool:
    by_name = {f"{COLOURS[o.colour]} {SHAPES[o.shape]}": o for o in scene.objects}
    a, b = by_name.get(stated[0]), by_name.get(stated[2])
    if a is None or b is None:
        return False
    checks = {
        "left": a.column < b.column,
        "right": a.column > b.column,
        "above": a.row < b.row,
        "below": a.row > b.row,
    }
    return checks[stated[1]]


def _agreement(mention: Mention | None, thing: Object | None) -> tuple[bool, ...]:
    if mention is None or thing is None:
        return (False,) * 5
    return (
        mention.colour == thing.colour,
        mention.shape == thing.shape,
        mention.cell == thing.cell,
        mention.size == thing.size,
        mention.pattern == thing.pattern,
    )


def score(text: str, scene: Scene) -> dict[str, list[bool]]:
    """Right or wrong, for each object and for the caption as a whole."""
    said: list[Mention | None] = list(mentions(text))
    things: list[Object | None] = list(scene.objects)
    size = min(max(len(said), len(things)), 6)
    said = (said + [None] * size)[:size]
    things = (things + [None] * size)[:size]
    best = max(
        (
            [_agreement(m, t) for m, t in zip(order, things, strict=True)]
            for order in itertools.permutations(said)
        ),
        key=lambda rows: sum(sum(row[:3]) for row in rows),
    )
    names = ("colour", "shape", "position", "size", "pattern")
    out = {name: [row[i] for row in best] for i, name in enumerate(names)}
    out["count"] = [stated_count(text) == len(scene.objects)]
    out["place"] = [stated_place(text) == scene.place]
    relation = stated_relation(text)
    out["relation"] = (
        []
        if relation is None and len(scene.objects) == 1
        else [relation is not None and relation_holds(scene, relation)]
    )
    out["whole_caption"] = [all(all(v) for v in out.values())]
    return out


def held_out_scene(index: int) -> tuple[Scene, Image.Image]:
    """Scene and picture `index` of the reporting split."""
    seed = HELD_OUT + index
    scene = draw_scene(random.Random(seed))
    return scene, Image.fromarray(render(scene, seed)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft-model", default="none")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = flash_mlx.load(args.model, draft=args.draft_model)
    scenes, texts = [], []
    for i in range(args.limit):
        scene, picture = held_out_scene(i)
        prompt = CAPTION_PROMPTS[i % len(CAPTION_PROMPTS)]
        scenes.append(scene)
        texts.append(
            flash_mlx.generate(model, prompt, image=picture, max_tokens=256, temperature=0.0).text
        )
    table: dict[str, dict[str, float]] = {}
    for name, shift in (("own_scene", 0), ("other_scene", 1)):
        totals: dict[str, list[bool]] = {}
        for i, text in enumerate(texts):
            for key, values in score(text, scenes[(i + shift) % len(scenes)]).items():
                totals.setdefault(key, []).extend(values)
        table[name] = {key: round(sum(v) / max(1, len(v)), 4) for key, v in totals.items()}
    print(json.dumps(table, indent=2))
    if args.json:
        args.json.write_text(
            json.dumps({"scenes": args.limit, **table, "texts": texts}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
