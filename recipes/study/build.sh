#!/usr/bin/env bash
# Compares windows with full attention at equal cost; see README.md. What is done is not done again.
# OUT, SEEDS, STEPS (a multiple of 20), BATCH, LAYERS, HEADS, HEAD_DIM, SCENES and CAPTIONS change its size.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${OUT:-output/study} steps=${STEPS:-400} batch=${BATCH:-16}
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true PYTHONPATH=.

done_once() { # MARK COMMAND...: run a command unless it has succeeded before
  [ -e "$out/$1.done" ] || { "${@:2}" && touch "$out/$1.done"; }
}
mkdir -p "$out"
done_once scenes python recipes/study/scenes.py --output "$out/scenes" --count "${SCENES:-4000}"
done_once encoded python -m localdit.training.encode --data-root "$out/scenes" --image-size 128 \
  --patch-size 1 --pretrained localdit/box --num-workers 0 --output "$out/encoded"
done_once extractor python recipes/study/train_extractor.py --output "$out/extractor"
python recipes/study/variants.py --output "$out" --steps "$steps" --batch-size "$batch" \
  --layers "${LAYERS:-6}" --heads "${HEADS:-4}" --head-dim "${HEAD_DIM:-16}"

score="python recipes/study/score.py --output $out --count ${CAPTIONS:-200}"
$score --autoencoder localdit/box
# All variants of a seed before the next seed: a run that is cut short leaves whole comparisons.
for seed in ${SEEDS:-0 1 2}; do
  for config in "$out"/variants/*.json; do
    name=$(basename "$config" .json)-$seed
    done_once "$name" python train.py --mixed-precision bf16 \
      --data-root "$out/encoded" --image-size 128 --num-workers 0 \
      --pretrained localdit/box --transformer-config "$config" \
      --prediction-type flow --batch-size "$batch" --max-train-steps "$steps" \
      --learning-rate 2e-3 --warmup-steps 20 --gradient-clip 1.0 --token-dropout 0.1 \
      --ema-decay 0.98 --seed "$seed" --output "$out/runs/$name" --resume auto \
      --save-interval $((steps / 20)) --keep-checkpoints 21
    $score --run "$out/runs/$name"
  done
  python recipes/study/report.py --output "$out"
done
