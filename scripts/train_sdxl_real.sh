#!/usr/bin/env bash
# Train an SDXL adapter on a folder of photos, generate images with it and score them. Requires a GPU with 16 GB or more,
# the weights of SDXL (7 GB, downloaded on first use) and a few photos of one subject.
#
#   scripts/train_sdxl_real.sh photos "a photo of sks toy" runs/sdxl-toy
set -euo pipefail
data=${1:?the folder with the photos}
prompt=${2:?the caption of the photos, with a rare word for the subject}
run=${3:-runs/sdxl-real}
base=${BASE:-stabilityai/stable-diffusion-xl-base-1.0}
krona=${KRONA:-krona}

"$krona" train --preset paper-sdxl --base "$base" --data "$data" --prompt "$prompt" --check
"$krona" train --preset paper-sdxl --base "$base" --data "$data" --prompt "$prompt" \
    --sample-every 250 --export lora,lycoris,diffusekrona -o "$run"
"$krona" inspect "$run/adapter.safetensors"
"$krona" generate "$base" --adapter "$run/adapter.safetensors" --compare --images-per-prompt 4 \
    --prompt "$prompt on a beach" --prompt "$prompt in the snow" -o "$run/images"
"$krona" evaluate "$run/images" --like "$data" --device cuda
