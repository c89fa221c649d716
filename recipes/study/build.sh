#!/usr/bin/env bash
# Compares windows with full attention at equal cost; see README.md. What is done is not done again.
# OUT, SEEDS, VARIANTS, STEPS (a multiple of 20), BATCH, PATCH, LAYERS, HEADS, HEAD_DIM, SCENES and
# CAPTIONS change its size, OPTIMIZER (muon or adamw) its training. EMOJI names packages of emoji:
# then real pictures take the place of scenes.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${OUT:-output/study} steps=${STEPS:-2000} batch=${BATCH:-32} patch=${PATCH:-1}
optimizer=${OPTIMIZER:-muon}
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true PYTHONPATH=.
parts="--vae $out/vae --text-encoder localdit/box/text_encoder --tokenizer localdit/box/tokenizer"

. recipes/once.sh

once vae python recipes/study/write_autoencoder.py --output "$out/vae"
if [ -n "${EMOJI:-}" ]; then
  # shellcheck disable=SC2086  # several packages
  once pictures python recipes/study/pictures.py --output "$out/pictures" --emoji $EMOJI
  data=$out/pictures/train pictures="--pictures $out/pictures"
else
  once scenes python recipes/study/scenes.py --output "$out/scenes" --count "${SCENES:-20000}"
  data=$out/scenes pictures=
fi
once encoded python -m localdit.training.encode --data-root "$data" --image-size 16 \
  --crop center --patch-size "$patch" $parts --num-workers 0 --output "$out/encoded"
once extractor python recipes/study/train_extractor.py --output "$out/extractor" $pictures
once costs python recipes/study/variants.py --output "$out" --steps "$steps" --batch-size "$batch" \
  --optimizer "$optimizer" --patch-size "$patch" --layers "${LAYERS:-6}" --heads "${HEADS:-2}" \
  --head-dim "${HEAD_DIM:-32}"

variants=${VARIANTS:-full windows pooled full-every-3rd global large-windows large-windows-alternating}

score="python recipes/study/score.py --output $out --count ${CAPTIONS:-200} $pictures"
$score
# All variants of a seed before the next seed: a run that is cut short leaves whole comparisons.
for seed in ${SEEDS:-0 1 2}; do
  for variant in $variants; do
    run=$out/runs/$variant-$seed config=$out/variants/$variant.json
    [ -e "$run/final" ] || python train.py --mixed-precision bf16 --optimizer "$optimizer" \
      --data-root "$out/encoded" --image-size 16 --crop center --num-workers 0 \
      $parts --transformer-config "$config" --prediction-type flow \
      --batch-size "$batch" --max-train-steps "$steps" --learning-rate 2e-3 --warmup-steps 20 \
      --gradient-clip 1.0 --token-dropout 0.1 --ema-decay 0.99 --seed "$seed" \
      --output "$run" --resume auto --save-interval $((steps / 20)) --keep-checkpoints 21
    $score --run "$run"
  done
  python recipes/study/report.py --output "$out"
done
