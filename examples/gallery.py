"""Write docs/gallery.md: pictures that the demo was not trained on, and what it says of them.

python examples/gallery.py
python examples/gallery.py --clips clips    # and what it says of clips of scenes/make_clips.py
"""

import argparse
from pathlib import Path

import flash_mlx
from flash_mlx.video import load_video
from flash_mlx.viz import draw_latents, sheet

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Describe the image in detail."
CLIP_PROMPT = "Describe the video in detail."
HEAD = """# Gallery

Pictures that the bundled demo was not trained on, and what it says of them at temperature 0, word
for word and with its mistakes. Written by [`gallery.py`](../examples/gallery.py); the text is the
same without the drafter, which only makes it faster: *passes* are those of the model, one for
each token without it.
"""
CLIPS = """## Clips

Short videos that it was not trained on, and the frames of them that it is shown:
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gallery.md")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clips", type=Path, help="folder of MP4 files")
    args = parser.parse_args()
    model = flash_mlx.load(args.model, drafting="fixed")
    parts = [HEAD]
    pictures = sorted((ROOT / "examples" / "images").glob("*.png"))
    for picture in pictures:
        parts.append(f"![Drawn shapes](../examples/images/{picture.name})\n")
        parts.append(said_of(model, picture, PROMPT))
    if args.clips:
        parts.append(CLIPS)
        for clip in sorted(args.clips.glob("*.mp4")):
            strip = args.output.with_name(f"gallery_{clip.stem}.png")
            frames = load_video(clip)
            sheet(frames, len(frames)).quantize(64).save(strip, optimize=True)
            parts.append(f"![Frames of a clip]({strip.name})\n")
            parts.append(said_of(model, flash_mlx.Video(clip), CLIP_PROMPT))
    drawing = args.output.with_name("gallery_latents.png")
    draw_latents(model, pictures[:1], PROMPT).quantize(64).save(drawing, optimize=True)
    parts.append(
        "## What the drafter sees\n\nIn place of a picture's rows it reads a few latents, weighted "
        "sums of them. Of the first picture, what each latent reads shines:\n\n"
        f"![The picture, and its latents]({drawing.name})\n"
    )
    args.output.write_text("\n".join(parts), encoding="utf-8")


def said_of(model: flash_mlx.Model, shown: Path | flash_mlx.Video, prompt: str) -> str:
    answer = flash_mlx.generate(model, prompt, shown, max_tokens=256, temperature=0.0)
    stats = answer.stats
    quote = "\n> ".join(answer.text.strip().splitlines())
    return f"> {quote}\n\n{stats.generation_tokens} tokens in {stats.rounds} passes.\n"


if __name__ == "__main__":
    main()
