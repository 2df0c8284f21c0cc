#!/usr/bin/env bash
# The whole recipe, about three hours on one core. Every stage resumes from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")"
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
runs="${1:-runs}"
python tokenizer.py --output "$runs/tokenizer.json"
language=(python train_language.py --tokenizer "$runs/tokenizer.json")
python pretrain_vision.py --output "$runs/vision" --steps 1300
"${language[@]}" --output "$runs/symbols" --visual symbols --layers 4 --steps 190 --floor 1
"${language[@]}" --output "$runs/deep" --visual symbols --layers 12 --init "$runs/symbols" --steps 50 --floor 1 --offset 100000
python align.py --vision "$runs/vision" --language "$runs/deep" --output "$runs/aligned"
"${language[@]}" --output "$runs/joint" --visual pixels --layers 12 --init "$runs/aligned" --steps 200 --rate 0.01 --offset 200000
python export.py --run "$runs/joint" --tokenizer "$runs/tokenizer.json" --output "$runs/target"
python evaluate.py --model "$runs/target" --limit 200 --json "$runs/grounding.json"
python answers.py --model "$runs/target" --output "$runs/answers.jsonl" --scenes 1200
python train_drafter.py --model "$runs/target" --answers "$runs/answers.jsonl" --output "$runs/drafter" \
    --train '{"iterations": 700, "batch_size": 16}'
