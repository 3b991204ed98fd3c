# Shared by the scripts; sourced, never run.
# shellcheck shell=bash

note() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

have() { command -v "$1" >/dev/null 2>&1; }

# The newest of some files or folders.
newest() {
  local path newest=
  for path in "$@"; do
    if [ -z "$newest" ] || [ "$path" -nt "$newest" ]; then newest=$path; fi
  done
  printf '%s\n' "$newest"
}

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

# Installs Debian packages, or newer versions of them; as root.
install_packages() {
  note "installing $*"
  # Old lists name old versions, or ones that are gone.
  as_root apt-get update -qq || note "apt-get update failed; trying with the lists that are there"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
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
  install_packages "${missing[@]}"
}

# What the workspace needs to be built: installs it on Debian and Ubuntu, says what to install elsewhere.
want_build_tools() {
  if have apt-get; then
    # OpenBLAS is not needed to build, but MLX on the CPU crawls without it.
    want_packages g++ git libclang-dev libopenblas0-pthread python3 python3-pip python3-venv || return 1
    # Debian 12's own Rust is too old; its browsers' is not.
    have cargo || want_packages rustc-web cargo-web rust-web-clippy ||
      { note "no cargo: install Rust 1.88 or later (rustup, or the packages above)"; return 1; }
  elif [ "$(uname -s)" = Darwin ]; then
    xcode-select -p >/dev/null 2>&1 ||
      { note "no C++ compiler; please run: xcode-select --install"; return 1; }
    have cargo || { note "no cargo: install Rust 1.88 or later with rustup"; return 1; }
  else
    local tool missing=()
    for tool in c++ cargo git python3; do have "$tool" || missing+=("$tool"); done
    [ ${#missing[@]} -eq 0 ] ||
      { note "missing: ${missing[*]}; also needed: libclang, pip and, for speed, OpenBLAS"; return 1; }
  fi
}
