#!/usr/bin/env bash
# Rebuilds the model in the box from scratch, into output/box and localdit/box; see README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=output/box
export OMP_NUM_THREADS=1

python recipes/box/draw_scenes.py --output $out/scenes
python recipes/box/train_text_encoder.py --output $out
python recipes/box/train_autoencoder.py --output $out/vae

# One process per core: faster than one process with two threads.
export ACCELERATE_USE_CPU=true
two_processes="torchrun --standalone --nproc_per_node 2"

$two_processes -m localdit.training.encode \
  --data-root $out/scenes --image-size 128 --output $out/encoded \
  --vae $out/vae --text-encoder $out/text_encoder --tokenizer $out/tokenizer

$two_processes train.py --mixed-precision bf16 \
  --data-root $out/encoded --image-size 128 --transformer-config tiny \
  --num-workers 0 --prediction-type v_prediction \
  --batch-size 64 --max-train-steps 5000 --learning-rate 2e-3 --lr-schedule cosine \
  --warmup-steps 200 --gradient-clip 1.0 --token-dropout 0.1 --ema-decay 0.999 \
  --output $out/run

python recipes/box/pack.py --pipeline $out/run/final --output localdit/box
python recipes/box/score.py --pipeline localdit/box --output $out/score --count 1000

$two_processes train.py --method distil --distillation trajectory --teacher-steps 8 \
  --teacher localdit/box/transformer --pretrained localdit/box \
  --data-root $out/encoded --image-size 128 --num-workers 0 --token-dropout 0 \
  --batch-size 8 --max-train-steps 1000 --learning-rate 4e-4 --lr-schedule cosine \
  --warmup-steps 30 --gradient-clip 1.0 --ema-decay 0.99 --output $out/few_steps

python recipes/box/pack.py --student $out/few_steps/final --output localdit/box
python recipes/box/score.py --pipeline localdit/box/few_steps --output $out/few_steps/score
