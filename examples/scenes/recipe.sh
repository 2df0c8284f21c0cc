#!/usr/bin/env bash
# The whole recipe as it was run, about three and a half hours on two cores. Stages of language
# training can be stopped and resumed; `--init` takes an earlier stage or an exported target.
set -euo pipefail
cd "$(dirname "$0")"
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
runs="${1:-runs}"
python tokenizer.py --output "$runs/tokenizer.json"
language=(python train_language.py --tokenizer "$runs/tokenizer.json")
pixels=(--visual pixels --layers 12 --rate 0.012)

python pretrain_vision.py --output "$runs/vision" --steps 1300
"${language[@]}" --output "$runs/symbols" --visual symbols --layers 4 --steps 190 --floor 1
"${language[@]}" --output "$runs/deep" --visual symbols --layers 12 --init "$runs/symbols" \
    --steps 56 --floor 1 --offset 100000
python align.py --vision "$runs/vision" --language "$runs/deep" --output "$runs/aligned" \
    --pictures 800 --steps 2500
"${language[@]}" "${pixels[@]}" --output "$runs/joint" --init "$runs/aligned" \
    --steps 28 --floor 1 --offset 200000
"${language[@]}" "${pixels[@]}" --output "$runs/full" --init "$runs/joint" --kept 256 \
    --steps 130 --offset 300000
# This stage ran as two processes: mlx.launch -n 2 --backend ring --hosts 127.0.0.1 ...
"${language[@]}" "${pixels[@]}" --output "$runs/final" --init "$runs/full" --kept 256 \
    --steps 80 --batch 16 --offset 400000
python export.py --run "$runs/final" --tokenizer "$runs/tokenizer.json" --output "$runs/first"
"${language[@]}" "${pixels[@]}" --output "$runs/more" --init "$runs/first" --kept 256 \
    --steps 480 --offset 500000
python export.py --run "$runs/more" --tokenizer "$runs/tokenizer.json" --output "$runs/target"
python evaluate.py --model "$runs/target" --limit 200 --json "$runs/grounding.json"
for first in 50000000 50100000; do
    python answers.py --model "$runs/target" --output "$runs/answers.jsonl" --scenes 720 --first "$first"
done
python train_drafter.py --model "$runs/target" --answers "$runs/answers.jsonl" --output "$runs/drafter" \
    --train '{"iterations": 3000, "batch_size": 12, "base_share": 0.33, "validate_every": 750}'

# Videos, not part of the bundled demo: the target learns clips of three moments, and goes on with
# pictures. These steps are not enough yet: after as many, with conversations that did not list each
# moment's objects, 1% of the events were right, and 56% of the captions of pictures instead of 81%.
clips=("${pixels[@]}" --clips 2 3 --batch 4 --clip-batch 4)
"${language[@]}" "${clips[@]}" --output "$runs/moments" --init "$runs/target" --kept 96 \
    --steps 320 --floor 0.3 --offset 600000
"${language[@]}" "${clips[@]}" --output "$runs/clips" --init "$runs/moments" --kept 256 \
    --steps 240 --offset 700000
python export.py --run "$runs/clips" --tokenizer "$runs/tokenizer.json" --output "$runs/clip_target"
python evaluate_clips.py --model "$runs/clip_target" --limit 60 --json "$runs/clips.json"
python evaluate.py --model "$runs/clip_target" --limit 200 --json "$runs/pictures_after_clips.json"
# The drafter learns from answers about both.
for first in 50000000 50100000; do
    python answers.py --model "$runs/clip_target" --output "$runs/clip_answers.jsonl" --scenes 480 --first "$first"
done
python answers.py --model "$runs/clip_target" --output "$runs/clip_answers.jsonl" --scenes 720 --clips
python train_drafter.py --model "$runs/clip_target" --answers "$runs/clip_answers.jsonl" --output "$runs/clip_drafter" --init-from "$runs/drafter" \
    --train '{"iterations": 3000, "batch_size": 12, "base_share": 0.33, "validate_every": 750}'
