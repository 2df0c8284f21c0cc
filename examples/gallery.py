"""Write docs/gallery.md: pictures that the demo was not trained on, and what it says of them.

python examples/gallery.py
"""

import argparse
from pathlib import Path

import flash_mlx
from flash_mlx.viz import draw_latents

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Describe the image in detail."
HEAD = """# Gallery

Pictures that the bundled demo was not trained on, and what it says of them at temperature 0, word
for word and with its mistakes. Written by [`gallery.py`](../examples/gallery.py); the text is the
same without the drafter, which only makes it faster: *passes* are those of the model, one for
each token without it.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gallery.md")
    args = parser.parse_args()
    model = flash_mlx.load(drafting="fixed")
    parts = [HEAD]
    pictures = sorted((ROOT / "examples" / "images").glob("*.png"))
    for picture in pictures:
        answer = flash_mlx.generate(model, PROMPT, picture, max_tokens=256, temperature=0.0)
        stats = answer.stats
        parts.append(
            f"![Drawn shapes](../examples/images/{picture.name})\n\n> {answer.text.strip()}\n\n"
            f"{stats.generation_tokens} tokens in {stats.rounds} passes.\n"
        )
    drawing = args.output.with_name("gallery_latents.png")
    draw_latents(model, pictures[:1], PROMPT).quantize(64).save(drawing, optimize=True)
    parts.append(
        "## What the drafter sees\n\nIn place of a picture's rows it reads a few latents, weighted "
        "sums of them. Of the first picture, what each latent reads shines:\n\n"
        f"![The picture, and its latents]({drawing.name})\n"
    )
    args.output.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
