#!/bin/sh
# On a machine with a GPU, within some ten minutes: the tests that need one, then the tables of speed. Not yet run on one.
#   eval/speed/gpu.sh [FOLDER]      where eval/speed/peers.sh put the peers; without it the head is measured alone
set -e
cd "$(dirname "$0")/../.."
python -m pytest -q -m gpu
python eval/speed/head.py --rounds 5 --vocab 128256 --rows 8192 --width 2048 --teacher_width 4096 --supervised 1 ${1:+--peers "$1"}
python eval/speed/step.py --shapes llama
python eval/speed/epoch.py
