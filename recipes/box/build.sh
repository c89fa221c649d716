#!/usr/bin/env bash
# Rebuilds the model in the box from scratch, into output/box and localdit/box; see README.md.
# Run it again after an interruption: finished parts are kept, and trainings resume.
# OUT and BOX are the two folders. COUNT, TEXT_STEPS, VAE_STEPS, STEPS, STUDENT_STEPS, BATCH and
# CAPTIONS make it smaller.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${OUT:-output/box} box=${BOX:-localdit/box}
count=${COUNT:-40000} vae_steps=${VAE_STEPS:-4000} batch=${BATCH:-64} captions=${CAPTIONS:-1000}
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true
two_processes="torchrun --standalone --nproc_per_node 2" # faster than one with two threads

. recipes/once.sh

once scenes python recipes/box/draw_scenes.py --processes 2 --count "$count" --output "$out/scenes"
once text python recipes/box/train_text_encoder.py --steps "${TEXT_STEPS:-3000}" --output "$out"
vae=(python recipes/box/train_autoencoder.py --threads 2 --scenes $((count * 3 / 20)))
once vae "${vae[@]}" --steps "$vae_steps" --output "$out/vae"

# shellcheck disable=SC2086
once encoded $two_processes -m localdit.training.encode \
  --data-root "$out/scenes" --image-size 256 --patch-size 2 --output "$out/encoded" \
  --vae "$out/vae" --text-encoder "$out/text_encoder" --tokenizer "$out/tokenizer"

# shellcheck disable=SC2086
once teacher $two_processes train.py --mixed-precision bf16 --optimizer muon \
  --data-root "$out/encoded" --image-size 256 --transformer-config tiny \
  --num-workers 0 --prediction-type v_prediction \
  --batch-size "$batch" --max-train-steps "${STEPS:-3200}" --learning-rate 2e-3 --lr-schedule cosine \
  --warmup-steps 50 --gradient-clip 1.0 --token-dropout 0.1 --ema-decay 0.998 \
  --save-interval 500 --resume auto --output "$out/run"

once decoder "${vae[@]}" --pretrained "$out/vae" --freeze-encoder --full-resolution \
  --generated-by "$out/run/final" --generated $((count * 3 / 80)) --latent-noise 0.05 \
  --edge-weight 12 --lr 3e-3 --steps "$vae_steps" --output "$out/decoder"
once pack python recipes/box/pack.py --pipeline "$out/run/final" --vae "$out/decoder" \
  --output "$box"
once score python recipes/box/score.py --pipeline "$box" --output "$out/score" --count "$captions"

# shellcheck disable=SC2086
once student $two_processes train.py --method distil --distillation trajectory --teacher-steps 8 \
  --mixed-precision bf16 \
  --teacher "$box/transformer" --pretrained "$out/run/final" \
  --data-root "$out/encoded" --image-size 256 --num-workers 0 --token-dropout 0 \
  --batch-size $(((batch + 7) / 8)) --max-train-steps "${STUDENT_STEPS:-700}" --learning-rate 4e-4 \
  --lr-schedule cosine --warmup-steps 30 --gradient-clip 1.0 --ema-decay 0.99 \
  --save-interval 100 --resume auto --output "$out/few_steps"

once pack_student python recipes/box/pack.py --student "$out/few_steps/final" --output "$box"
python recipes/box/score.py --pipeline "$box/few_steps" --output "$out/few_steps/score" \
  --count "$captions"
