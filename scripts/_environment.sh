# Sourced by the scripts beside it, from the top of the repository: makes `.venv` and keeps it up to date.

say() { printf '%s\n' "$*" >&2; }

# Prints a Python that is new enough. A shim on the PATH may stand for a version that is not there: run it.
find_python() {
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  say "Python 3.11 or newer is needed; none of python3.13, python3.12, python3.11, python3 is one"
  return 2
}

make_venv() {
  local python
  python=$(find_python)
  say "making .venv with $python"
  # Debian keeps what venv needs in a package of its own.
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
      say "$python cannot make virtual environments: apt install python3-venv"
      return 2
    fi
    say "installing python3-venv with apt"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >&2
  fi
  "$python" -m venv .venv
}

# need_venv run|dev: the packages of requirements/KIND.txt and the project itself. Without work to do it only
# compares a hash.
need_venv() {
  local kind=$1 wanted
  wanted=$(cat "requirements/$kind.txt" pyproject.toml | sha256sum)
  if [[ -x .venv/bin/python && $(cat ".venv/$kind.installed" 2>/dev/null) == "$wanted" ]]; then
    return
  fi
  if [[ ! -x .venv/bin/python ]]; then make_venv; fi
  say "installing requirements/$kind.txt into .venv"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "requirements/$kind.txt"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
  printf '%s\n' "$wanted" >".venv/$kind.installed"
}
