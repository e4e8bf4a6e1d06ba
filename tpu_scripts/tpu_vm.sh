#!/usr/bin/env bash
#
# Runs one command on all hosts of a Cloud TPU slice, or of several, until its work is
# done: asks for the machine, waits for it, sets it up, runs, starts again where that
# helps, gives the machine back. README.md says what is started again and what mistakes
# cost. A first start and a restart are the same call: the run directory knows the rest.
set -euo pipefail

# The command's statuses that are started again: it asks for that (42), host 0 died and
# JAX ended the others (134), something was killed (137) or told to end (143).
readonly AGAIN=" 42 134 137 143 "
# So often in a row a lost connection is made again, a failed machine asked for again.
readonly MOST=5
# So often a machine that was taken away is deleted and asked for: that may be refused as
# long as it is on its way out.
readonly PATIENCE=30
# `queued-resources ssh` starts the command on so many hosts and waits for them before it
# goes to the next, whatever its --batch-size is: more would wait for each other for ever.
readonly HOSTS_AT_ONCE=64
readonly STATES="ACTIVE|CREATING|ACCEPTED|WAITING_FOR_RESOURCES|PROVISIONING|FAILED"
readonly GOING="SUSPENDING|SUSPENDED|DELETING"
# Seconds between two looks at the machine, and of a run that shows that lines hold.
poll="${TPU_VM_POLL_SECONDS:-10}"
long_run="${TPU_VM_LONG_RUN_SECONDS:-600}"

name="" project="" zone="" accelerator_type="" runtime_version=""
num_slices=1 package="" spot="" keep="" dry_run=""
wanted=()
asked=""   # a machine may be there, and is ours to give back
ready=""   # the machine there is set up
running="" # the command is at work on it
job=""     # the process group that is waited for
watcher="" # the one that asks about the machine meanwhile

usage() {
  cat <<'END'
usage: tpu_vm.sh --name N --project P --zone Z --accelerator_type v6e-16
                 --runtime_version R [options] -- COMMAND [ARGUMENT ...]

Runs COMMAND on every host of TPU slices until it ends with 0, or with a status that
another start would not mend; that status is this script's. The output goes on to N.log.

  --name N              of the queued resource and its nodes
  --project P --zone Z  where it is
  --accelerator_type A  such as v6e-16 (README.md has the names and their hosts)
  --runtime_version R   of the hosts' system, such as v2-alpha-tpuv6e
  --num_slices K        slices that train together (1)
  --spot                cheaper, and taken away at any time
  --package SPEC        what to install: a wheel, a requirement or an address
                        (a wheel built from this checkout)
  --keep                leave the machine there at the end: it costs until it is deleted
  --dry_run             print every call, on a line to paste, and call nothing
END
}

say() { printf 'tpu_vm.sh: %s\n' "$*" >&2; }

refuse() {
  printf 'tpu_vm.sh: error: %s. See tpu_vm.sh --help\n' "$*" >&2
  exit 2
}

# Words as a shell reads them back, in quotes only where they need them.
quoted() {
  local word text=""
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      text+=" $word"
    else
      text+=" ${word@Q}"
    fi
  done
  printf '%s\n' "${text# }"
}

parse() {
  local flag
  while (($#)); do
    flag="${1%%=*}"
    case "$flag" in
      --name | --project | --zone | --accelerator_type | --runtime_version | \
        --num_slices | --package)
        if [[ $1 == *=* ]]; then
          set -- "$flag" "${1#*=}" "${@:2}"
        fi
        # A flag where a value should be is a value that was forgotten.
        if (($# < 2)) || [[ -z $2 || $2 == -* ]]; then
          refuse "$flag wants a value: got ${2:-none}"
        fi
        printf -v "${flag#--}" '%s' "$2"
        shift 2
        ;;
      --)
        wanted=("${@:2}")
        return
        ;;
      *)
        case "$1" in
          --spot | --keep | --dry_run) printf -v "${1#--}" yes ;;
          -h | --help)
            usage
            exit 0
            ;;
          *) refuse "unknown argument $1: the command comes after --" ;;
        esac
        shift
        ;;
    esac
  done
}

# Hosts of one slice; nothing where the name is not known here.
hosts() {
  local kind="${accelerator_type%-*}" size="${accelerator_type##*-}"
  [[ $size =~ ^[0-9]+$ ]] || return 0
  case "$kind" in
    v2 | v3 | v4 | v5p) echo $(((size + 7) / 8)) ;; # counts cores, 8 a host
    v5litepod | v6e)                                # counts chips, 4 a host
      if ((size <= 8)); then echo 1; else echo $(((size + 3) / 4)); fi
      ;;
  esac
}

check() {
  local flag missing="" found
  for flag in name project zone accelerator_type runtime_version; do
    [[ -n ${!flag} ]] || missing+=" --$flag"
  done
  [[ -z $missing ]] || refuse "these settings are missing:$missing"
  ((${#wanted[@]})) || refuse "no command: it comes after --, as in -- jaxalign train"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    refuse "--name $name: expected a small letter, then small letters, digits and -"
  [[ $num_slices =~ ^[1-9][0-9]*$ ]] ||
    refuse "--num_slices $num_slices: expected a whole number from 1"
  if [[ $package == *.whl && $package != *://* && ! -f $package ]]; then
    refuse "--package $package: no such file"
  fi
  found="$(hosts)"
  if ((num_slices > 1 && num_slices * ${found:-0} > HOSTS_AT_ONCE)); then
    refuse "--num_slices $num_slices of $accelerator_type: $((num_slices * found))" \
      "hosts, and gcloud starts a command on $HOSTS_AT_ONCE at a time, of which each" \
      "waits for all. Take gke_jobset.py, or fewer and larger slices"
  fi
  [[ -z $dry_run ]] || return 0
  command -v gcloud >/dev/null ||
    refuse "gcloud is not on the PATH: install the Google Cloud CLI"
  { : >>"$name.log"; } 2>/dev/null ||
    refuse "$name.log cannot be written here: go to a folder where it can"
}

# Makes of the settings every call that there is.
plan() {
  local here checkout remote="" installed="$package" files=()
  here=(--project="$project" --zone="$zone")
  checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  build=()
  if [[ -z $package ]]; then
    local version
    version="$(sed -n 's/^version = "\(.*\)"/\1/p' "$checkout/pyproject.toml")"
    package="$checkout/build/tpu_vm/jaxalign-$version-py3-none-any.whl"
    build=("${PYTHON:-python3}" -m pip wheel --quiet --no-deps
      --ignore-requires-python --wheel-dir "$(dirname "$package")" "$checkout")
    installed="$package"
  fi
  if [[ $package == *.whl && $package != *://* ]]; then
    files+=("$package")
    installed="$(basename "$package")"
  fi
  files+=("$checkout/tpu_scripts/setup_host.sh")

  local queued=(gcloud compute tpus queued-resources)
  local on=(gcloud compute tpus tpu-vm) all=(--worker=all) nodes=(--node-id="$name")
  if ((num_slices > 1)); then
    on=("${queued[@]}") all=(--node=all --worker=all)
    nodes=(--node-count="$num_slices" --node-prefix="$name")
  fi
  create=("${queued[@]}" create "$name" "${here[@]}" "${nodes[@]}"
    --accelerator-type="$accelerator_type" --runtime-version="$runtime_version")
  [[ -z $spot ]] || create+=(--spot)
  describe=("${queued[@]}" describe "$name" "${here[@]}" "--format=value(state.state)")
  delete=("${queued[@]}" delete "$name" "${here[@]}" --force --quiet)
  copy=("${on[@]}" scp "${files[@]}" "$name:" "${here[@]}" "${all[@]}")

  # A line that nothing comes over any more ends with 255 after five minutes.
  local alive="-o ConnectTimeout=30 -o ServerAliveInterval=30 -o ServerAliveCountMax=10"
  on+=(ssh "$name" "${here[@]}" "${all[@]}" "--ssh-flag=$alive")
  remote="bash setup_host.sh --package $(quoted "$installed") --extras tpu,gcs"
  set_up=("${on[@]}" --command="$remote")
  # What a lost connection left behind still holds the chips. It is told from everything
  # else by just that, and has this user; gcloud itself too connects again and starts the
  # command anew. The last || keeps a shell over the command, which says 128 + n for a
  # signal: ssh would say 255, as for a lost connection.
  local chips="/dev/accel* /dev/vfio/[0-9]*"
  remote="fuser -k $chips >/dev/null 2>&1; export PATH=\"\$HOME/.jaxalign/bin:\$PATH\";"
  remote+=" $(quoted "${wanted[@]}") || exit"
  start=("${on[@]}" --command="$remote")
  stop=("${on[@]}" --command="fuser -k -TERM $chips >/dev/null 2>&1; true")
}

print_calls() {
  ((!${#build[@]})) || quoted "${build[@]}"
  quoted "${describe[@]}"
  quoted "${create[@]}"
  quoted "${describe[@]}"
  quoted "${copy[@]}"
  quoted "${set_up[@]}"
  quoted "${start[@]}"
  [[ -n $keep ]] || quoted "${delete[@]}"
}

# Waits in such a way that a signal is heard at once.
await() {
  local status=0
  job="$1"
  wait "$job" 2>/dev/null || status=$?
  job=""
  return "$status"
}

rest() {
  sleep "$poll" >/dev/null 2>&1 &
  await $!
}

call() {
  "$@" </dev/null &
  await $!
}

# Prints the machine's state: GONE where there is none, UNKNOWN where nobody answers.
state() {
  local answer
  if answer="$("${describe[@]}" 2>&1)"; then
    if [[ $answer =~ ($STATES|$GOING) ]]; then
      echo "${BASH_REMATCH[1]}"
      return
    fi
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo GONE
    return
  fi
  say "no answer about $name: $answer"
  echo UNKNOWN
}

# Deletes the machine, in as many tries as it is given.
remove() {
  local tries answer
  say "deleting $name"
  for ((tries = 1; tries <= $1; tries++)); do
    answer="$("${delete[@]}" 2>&1)" && return
    [[ $answer != *NOT_FOUND* && $answer != *"not found"* ]] || return 0
    say "$answer"
    rest
  done
  say "$name could not be deleted. It costs until this succeeds:"
  say "$(quoted "${delete[@]}")"
  return 1
}

# The first machine is asked for once, what it is refused for is the user's to mend; one
# that was taken away is asked for more often.
ask() {
  local tries status before="$asked"
  for ((tries = 1; ; tries++)); do
    say "asking for $name: $num_slices x $accelerator_type${spot:+, spot}"
    asked=yes
    status=0
    call "${create[@]}" >&2 || status=$?
    ((status)) || return 0
    asked="$before"
    if [[ -z $before ]] || ((tries >= PATIENCE)); then
      exit "$status"
    fi
    rest
  done
}

ask_anew() {
  remove "$PATIENCE" || exit 1
  ask
}

# Comes back once the machine that was asked for is ACTIVE.
await_active() {
  local found before="" failed=0
  while :; do
    found="$(state)"
    [[ $found == "$before" ]] || say "$name is $found"
    before="$found"
    case "$found" in
      ACTIVE) return ;;
      FAILED | SUSPENDED | GONE)
        if ((++failed > MOST)); then
          say "$name failed $failed times in a row"
          exit 1
        fi
        rest
        if [[ $found == GONE ]]; then ask; else ask_anew; fi
        ;;
      *) rest ;;
    esac
  done
}

have_machine() {
  local found
  found="$(state)"
  case "$found" in
    GONE | UNKNOWN) ask ;; # where it only did not answer, that is refused
    FAILED | SUSPENDED)
      asked=yes
      ask_anew
      ;;
    *)
      say "$name is there: $found"
      asked=yes
      ;;
  esac
  await_active
}

# Ends a process group whose machine is no longer there: its ssh may hang for ever.
watch() {
  local found
  while sleep "$poll" >/dev/null 2>&1; do
    found="$(state)"
    if [[ $found != ACTIVE && $found != UNKNOWN ]]; then
      say "$name is $found while the connection stands"
      kill -KILL -- "-$1"
      return
    fi
  done
}

# Runs a call on the hosts, its output here and in the log.
on_hosts() {
  local status=0
  ("$@" </dev/null 2>&1 | tee -a "$name.log") &
  job=$!
  watch "$job" &
  watcher=$!
  await "$job" || status=$?
  unwatch
  return "$status"
}

unwatch() {
  [[ -n $watcher ]] || return 0
  kill -KILL -- "-$watcher" 2>/dev/null || true
  wait "$watcher" 2>/dev/null || true
  watcher=""
}

attempt() {
  local status=0
  if [[ -z $ready ]]; then
    say "setting up the hosts of $name"
    on_hosts "${copy[@]}" || return
    on_hosts "${set_up[@]}" || return
    ready=yes
  fi
  say "running, output in $name.log"
  running=yes
  on_hosts "${start[@]}" || status=$?
  running=""
  return "$status"
}

# Finds the machine's state, UNKNOWN only where nobody answers for a while.
look() {
  local tries
  for ((tries = 1; tries <= MOST; tries++)); do
    found="$(state)"
    [[ $found == UNKNOWN ]] || return 0
    rest
  done
}

run() {
  local began found="" lost=0 status
  while :; do
    began=$SECONDS status=0
    attempt || status=$?
    ((status)) || return 0
    ((SECONDS - began < long_run)) || lost=0
    look
    say "status $status, and $name is $found"
    if [[ $found != ACTIVE && $found != UNKNOWN ]]; then
      ready="" lost=0
      ask_anew
      await_active
    elif [[ $found == UNKNOWN || $status == 255 ]]; then
      ((++lost <= MOST)) || return "$status"
      rest
    elif [[ $AGAIN == *" $status "* ]]; then
      lost=0
    else
      return "$status"
    fi
  done
}

# Whatever ends this script, the machine is given back.
leave() {
  local status=$?
  trap - EXIT
  trap '' INT TERM HUP
  [[ -z $job ]] || kill -KILL -- "-$job" 2>/dev/null || true
  unwatch
  if [[ -n $asked && -n $keep ]]; then
    if [[ -n $running ]]; then
      say "ending the run on the hosts of $name"
      "${stop[@]}" </dev/null || say "the run could not be ended"
    fi
    say "$name is kept, and costs until this is called:"
    say "$(quoted "${delete[@]}")"
  elif [[ -n $asked ]]; then
    remove "$MOST" || status=$((status ? status : 1))
  fi
  exit "$status"
}

main() {
  if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    refuse "bash $BASH_VERSION is too old: expected 4.4 or later"
  fi
  parse "$@"
  check
  plan
  if [[ -n $dry_run ]]; then
    print_calls
    return
  fi
  export CLOUDSDK_CORE_DISABLE_PROMPTS=1
  ((!${#build[@]})) || "${build[@]}" # before anything costs
  # Each call is a process group of its own: Ctrl-C is for this script to answer.
  set -m
  trap leave EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  have_machine
  run
}

main "$@"
