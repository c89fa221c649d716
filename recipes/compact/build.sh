#!/usr/bin/env bash
# Trains on compact latents of scenes, from nothing and from the model in the box; see README.md.
# COUNT, VAE_SCENES, VAE_STEPS, STEPS, EVERY, BATCH, EMA and CAPTIONS make it smaller.
# Run it again after an interruption: finished parts are kept, and trainings resume.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${OUT:-output/compact}
steps=${STEPS:-6000} every=${EVERY:-250}
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true PYTHONPATH=.
two_processes="torchrun --standalone --nproc_per_node 2"
box="--text-encoder localdit/box/text_encoder --tokenizer localdit/box/tokenizer"

. recipes/once.sh

once scenes python recipes/box/draw_scenes.py --side 256 --count "${COUNT:-40000}" \
  --processes 2 --output "$out/scenes"
once vae python recipes/box/train_autoencoder.py --compression 32 --threads 2 \
  --scenes "${VAE_SCENES:-6000}" --steps "${VAE_STEPS:-8000}" --eval-every "$every" \
  --output "$out/vae"
once score_vae python recipes/box/score.py --vae "$out/vae" --side 256 \
  --count "${CAPTIONS:-500}" --output "$out/score_vae"

# shellcheck disable=SC2086
once encoded $two_processes -m localdit.training.encode --data-root "$out/scenes" \
  --image-size 256 --patch-size 1 --vae "$out/vae" $box --output "$out/encoded"

# The same data, order, noise and schedule; only the weights to start from differ.
# shellcheck disable=SC2206
train=($two_processes train.py --mixed-precision bf16 --data-root "$out/encoded" --image-size 256
  --num-workers 0 --prediction-type v_prediction --batch-size "${BATCH:-64}"
  --max-train-steps "$steps" --learning-rate 1e-3 --warmup-steps $((steps / 30)) --gradient-clip 1.0
  --token-dropout 0.1 --ema-decay "${EMA:-0.999}" --save-interval "$every"
  --keep-checkpoints $((steps / every + 2)) --resume auto)
once nothing "${train[@]}" --transformer-config recipes/compact/shape.json --output "$out/nothing"
once transferred "${train[@]}" --transformer localdit/box/transformer --new-latents 1 \
  --output "$out/transferred"

python recipes/compact/compare.py --nothing "$out/nothing" --transferred "$out/transferred" \
  --count "${CAPTIONS:-200}" --output "$out/comparison"
