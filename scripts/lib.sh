# Shared by the scripts; sourced, never run.
# shellcheck shell=bash

note() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

have() { command -v "$1" >/dev/null 2>&1; }

# Runs a command as root: directly, or with sudo where that asks for no password. 1 where neither is possible.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif have sudo && sudo -n true 2>/dev/null; then
    sudo -n "$@"
  else
    return 1
  fi
}

# Installs those of the Debian packages that are missing; 1, and the command to type, where it may not.
want_packages() {
  local package missing=()
  for package in "$@"; do
    dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q ' installed$' || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if ! as_root true; then
    note "missing packages; please run: sudo apt-get install ${missing[*]}"
    return 1
  fi
  note "installing ${missing[*]}"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" ||
    { as_root apt-get update -qq &&
      as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; }
}
