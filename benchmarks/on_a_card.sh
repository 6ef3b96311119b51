#!/usr/bin/env bash
# One run of benchmarks/gpu.py on a borrowed machine with an NVIDIA card and no network.
#
# 1. Here, in the repository's root, with a network (6.4 MB, and 60 kB of sglang's wheel of 39 MB):
#        bash benchmarks/on_a_card.sh fetch
#    It puts into .gpu/, which git ignores, what such a machine lacks beside PyTorch, Triton, NumPy, transformers,
#    Numba, pytest and Hypothesis: the wheels of diffusers and importlib_metadata, and four files of SGLang's.
# 2. Rehearse it here, on a CPU (a minute or two):
#        python benchmarks/gpu.py --rehearse --out /tmp/rehearsal
# 3. There, with .gpu/ carried along and $OUT an empty folder that comes back (eight minutes):
#        bash benchmarks/on_a_card.sh
#    and, with four minutes left, into another folder:
#        OUT=$OUT/sanitize bash benchmarks/on_a_card.sh --sanitize
#    Any arguments are passed on to benchmarks/gpu.py; `--seconds 300` makes a shorter run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
sglang=0.5.23

if [ "${1:-}" = fetch ]; then
    mkdir -p .gpu/whl .gpu/sglang .gpu/tmp
    wheels=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp
        --platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64)
    "$python" -m pip download --quiet "${wheels[@]}" --dest .gpu/whl diffusers==0.42.1 importlib_metadata
    "$python" -m pip download --quiet "${wheels[@]}" --dest .gpu/tmp "sglang==$sglang"
    "$python" - "$sglang" <<'PYTHON'
import sys, zipfile
from pathlib import Path

sys.path.insert(0, "benchmarks")
from gpu_run.sglang_files import FILES

(wheel,) = Path(".gpu/tmp").glob("sglang-*.whl")
with zipfile.ZipFile(wheel) as files:
    for name in FILES:
        files.extract(name, ".gpu/sglang")
Path(".gpu/sglang/VERSION").write_text(sys.argv[1] + "\n")
PYTHON
    rm -r .gpu/tmp
    exit
fi

: "${OUT:?name an empty folder for the results}"
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRITON_CACHE_DIR=/tmp/fluxvae-triton TORCHINDUCTOR_CACHE_DIR=/tmp/fluxvae-inductor
site=/tmp/fluxvae-site
if [ ! -d "$site" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" .gpu/whl/*.whl
fi
export PYTHONPATH="$site:$PWD/src" PATH="$PATH:/usr/local/cuda/bin" # compute-sanitizer
"$python" benchmarks/gpu.py "$@" 2>&1 | tee "$OUT/run.log" | cut -c 1-2000 | tail -n 200
