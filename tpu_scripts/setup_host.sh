#!/usr/bin/env bash
#
# Installs jaxalign on the host that this runs on, in a virtual environment of its own.
# tpu_vm.sh and skypilot.yaml call it on every host. Another call brings the package up to
# date. Hosts of TPUs have Python 3.10, which is too old: uv brings one where it must.
set -euo pipefail

package="" extras="" venv="$HOME/.jaxalign" dry_run=""

usage() {
  cat <<'END'
usage: setup_host.sh --package SPEC [--extras tpu,gcs] [--venv DIR] [--dry_run]

  --package SPEC   a wheel, a folder with a pyproject.toml, an address, or a requirement
                   such as jaxalign==0.1.0
  --extras NAMES   optional parts, such as tpu,gcs or cuda,gcs
  --venv DIR       where it goes (~/.jaxalign)
  --dry_run        print every call, and call nothing
END
}

refuse() {
  printf 'setup_host.sh: error: %s. See setup_host.sh --help\n' "$*" >&2
  exit 2
}

parse() {
  local flag
  while (($#)); do
    flag="${1%%=*}"
    case "$flag" in
      --package | --extras | --venv)
        if [[ $1 == *=* ]]; then
          set -- "$flag" "${1#*=}" "${@:2}"
        fi
        if (($# < 2)) || [[ -z $2 || $2 == -* ]]; then
          refuse "$flag wants a value: got ${2:-none}"
        fi
        printf -v "${flag#--}" '%s' "$2"
        shift 2
        ;;
      --dry_run)
        dry_run=yes
        shift
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      *) refuse "unknown argument $1" ;;
    esac
  done
  [[ -n $package ]] || refuse "this setting is missing: --package"
  [[ -z $extras || $extras =~ ^[a-z0-9_,-]+$ ]] ||
    refuse "--extras $extras: expected names with commas between them"
}

# The package with its extras, as an installer reads it.
requirement() {
  local some="${extras:+[$extras]}"
  if [[ $package == *://* ]]; then
    echo "jaxalign$some @ $package"
  elif [[ -e $package ]]; then
    echo "jaxalign$some @ file://$(realpath "$package")"
  elif [[ $package =~ ^jaxalign([=\<\>!~].*)?$ ]]; then
    echo "jaxalign$some${BASH_REMATCH[1]}"
  else
    refuse "--package $package: no such file, and no requirement of jaxalign"
  fi
}

call() {
  local words
  printf -v words ' %q' "$@"
  printf '%s\n' "+$words" >&2
  [[ -n $dry_run ]] || "$@"
}

main() {
  local wanted uv
  parse "$@"
  wanted="$(requirement)"
  uv="$(command -v uv)" || {
    # A folder of its own: the system's Python may refuse to take packages.
    uv="$venv-uv/bin/uv"
    call python3 -m pip install --quiet --upgrade --target "$venv-uv" uv
  }
  call "$uv" venv --quiet --allow-existing --python '>=3.11' "$venv"
  # A wheel of the same version may hold other code than the one installed.
  call "$uv" pip install --quiet --python "$venv/bin/python" \
    --reinstall-package jaxalign "$wanted"
  call "$venv/bin/jaxalign" --version
}

main "$@"
