#!/usr/bin/env bash
# Trains SDXL itself on a folder of photographs, draws with the result and scores it. For a person with a GPU of 16 GB
# or more, the weights of SDXL (7 GB are downloaded on first use) and a few photographs of one thing.
#
#   scripts/train_sdxl_real.sh photos "a photo of sks toy" runs/sdxl-toy
set -euo pipefail
data=${1:?the folder with the photographs}
prompt=${2:?their caption, with a rare word for the subject}
run=${3:-runs/sdxl-real}
base=${BASE:-stabilityai/stable-diffusion-xl-base-1.0}
krona=${KRONA:-krona}

"$krona" train --preset paper-sdxl --base "$base" --data "$data" --prompt "$prompt" --check
"$krona" train --preset paper-sdxl --base "$base" --data "$data" --prompt "$prompt" \
    --sample-every 250 --export lora,lycoris,diffusekrona -o "$run"
"$krona" inspect "$run/adapter.safetensors"
"$krona" generate "$base" --adapter "$run/adapter.safetensors" --compare --images-per-prompt 4 \
    --prompt "$prompt on a beach" --prompt "$prompt in the snow" -o "$run/pictures"
"$krona" evaluate "$run/pictures" --like "$data" --device cuda
