"""Describe all pictures of a folder; run it again and it goes on where it was.

python examples/caption_folder.py photos captions.jsonl
"""

import sys

import flash_mlx


def main() -> None:
    folder, output = sys.argv[1:]
    model = flash_mlx.load()  # the demo; or load("path/to/target", draft="path/to/drafter")
    prompt = "Describe the image in detail."
    for each in flash_mlx.caption(model, folder, prompt, output=output, resume=True):
        print(f"{each.path}: {each.text or each.error}")


if __name__ == "__main__":
    main()
