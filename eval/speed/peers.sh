#!/bin/sh
# Peers for eval/speed/head.py, step.py and plots.py, pinned, in a folder of their own: sh eval/speed/peers.sh FOLDER [PYTHON]
# They run on the torch and transformers that PYTHON has; their own version requirements are ignored (--no-deps).
set -eu
folder=${1:?usage: sh eval/speed/peers.sh FOLDER [PYTHON]}
python=${2:-python}
"$python" -m pip install --quiet --no-deps --target "$folder" \
    torchtune==0.6.1 torchao==0.13.0 torchdata==0.11.0 trl==1.16.0 liger-kernel==0.8.5 \
    omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 tiktoken==0.13.0 blobfile==3.1.0 sentencepiece==0.2.1 kagglehub==0.3.13
"$python" -c "import triton" 2>/dev/null || "$python" -m pip install --quiet --no-deps --target "$folder" triton==3.9.0
