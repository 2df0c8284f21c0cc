"""`flash-mlx verify`."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from flash_mlx.cli.bench import prompts_option
from flash_mlx.cli.generate import filter_options, model_options
from flash_mlx.cli.options import ListOptions, at_least
from flash_mlx.cli.penalties import penalty_options

if TYPE_CHECKING:
    from flash_mlx.generate import Model
    from flash_mlx.verify import Divergence, Report

CONTEXT_SIZES = ("repetition_context_size", "presence_context_size", "frequency_context_size")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")


class _Command(ListOptions):
    """Its lists: pictures, prompts and temperatures."""

    lists = ("--image", "--prompt", "--temperature")


@click.command("verify", cls=_Command)
@model_options
@click.option(
    "--image", multiple=True, metavar="FILE...", help="Pictures.  [default: the bundled ones]"
)
@prompts_option
@click.option("--limit", type=int, metavar="N", callback=at_least(1), help="Most answers.")
@click.option(
    "--temperature",
    "temperatures",
    type=float,
    multiple=True,
    default=(0.0, 1.0),
    show_default=True,
    callback=at_least(0),
    help="0 compares ids, any other draws tokens and tests their law.",
)
@click.option("--max-tokens", type=int, default=64, show_default=True, callback=at_least(1))
@click.option(
    "--draws",
    type=int,
    default=1000,
    show_default=True,
    callback=at_least(100),
    help="Draws of two tokens for each law.",
)
@filter_options
@penalty_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(
    model: str,
    draft_model: str,
    draft_block_size: int | None,
    loading: dict[str, Any],
    image: tuple[str, ...],
    prompts: tuple[str, ...],
    limit: int | None,
    as_json: bool,
    **settings: Any,
) -> int:
    """Prove on this machine that a drafter does not change what the target says.

    Exit code 0 if nothing was found, or only ties that rounding decides; 1 otherwise.
    """
    from flash_mlx.generate import load
    from flash_mlx.images import load_image
    from flash_mlx.loading import demo_pictures

    count = max(len(image) or len(demo_pictures()), len(prompts))
    files = image or tuple(map(str, demo_pictures()))
    pictures = [load_image(files[i % len(files)]) for i in range(count)[:limit]]
    loaded = load(model, draft_model, draft_block_size=draft_block_size, **loading)
    report = _verify(loaded, pictures, prompts, settings)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        click.echo(_text(loaded, report))
    return 0 if report.passed else 1


def _verify(model: Model, pictures: list[Any], prompts: tuple[str, ...], given: Any) -> Report:
    """Ask about each picture; `given` are the values of the command's options."""
    from flash_mlx import verify
    from flash_mlx.decode import NoDrafter
    from flash_mlx.penalties import make_penalties
    from flash_mlx.processed import processed
    from flash_mlx.processing import make_prompt
    from flash_mlx.sampling import make_sampler

    loaded = model.loaded
    penalties = {name: given[name] for name in (*PENALTIES, *CONTEXT_SIZES)}
    target = processed(model.target, make_penalties(**penalties))
    filters = {name: given[name] for name in ("top_p", "top_k", "min_p")}
    settings = verify.Settings(
        given["temperatures"],
        make_sampler(loaded.generation_defaults, **filters),
        given["max_tokens"],
        given["draws"],
        given["seed"],
        frozenset(loaded.eos_ids),
    )
    questions = [
        make_prompt(loaded, prompts[i % len(prompts)], [picture])
        for i, picture in enumerate(pictures)
    ]
    steps = verify.num_steps(len(questions), settings)
    with click.progressbar(length=steps, label="Verifying", file=sys.stderr) as bar:
        return verify.verify(target, model.drafter or NoDrafter(), questions, settings, bar.update)


def _text(model: Model, report: Report) -> str:
    lines = [f"Target {model.name}, drafter {model.draft_name}"]
    if report.greedy_identical is not None:
        verdict = "identical" if report.greedy_identical else "DIFFERENT"
        lines.append(
            f"Temperature 0: {verdict}: {report.prompts} answers, {report.tokens} tokens, "
            f"{report.drafted} drafts, {report.accepted} of them accepted"
        )
    lines += map(_divergence, report.divergences)
    for law in report.laws:
        what = "one token" if law.tokens == 1 else "two tokens in a row"
        sign = "within" if law.passed else "ABOVE"
        lines.append(
            f"Temperature {law.temperature:g}: law of {what}: total variation "
            f"{law.total_variation:.4f}, {sign} the noise of {law.draws} draws, "
            f"{law.noise_floor:.4f}"
        )
    if report.near_ties:
        lines.append(f"{report.near_ties} near ties, which rounding decides, do not count")
    lines.append("Passed" if report.passed else "FAILED: the text is not the target's own")
    return "\n".join(lines)


def _divergence(each: Divergence) -> str:
    where = f"  Answer {each.prompt}, token {each.position}: "
    if each.logit_gap is None:
        return f"{where}one text ends, the other goes on with id {each.tokens[0]}"
    ours, plain = each.tokens
    kind = "near tie" if each.near_tie else "no tie"
    return (
        f"{where}id {ours} instead of {plain}, {kind}: logits {each.logit_gap:.3g} apart, "
        f"where passes differ by {each.pass_gap:.3g}"
    )
