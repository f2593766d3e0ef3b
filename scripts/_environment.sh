# Sourced by the scripts beside it, from the top of the repository: makes `.venv` and keeps it up to date. A driver whose
# package is not the bridge's own has an environment of its own, `.venv-DRIVER`: two of them have the same import name.

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
  local venv=$1 python
  python=$(find_python)
  say "making $venv with $python"
  # Debian keeps what venv needs in a package of its own.
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
      say "$python cannot make virtual environments: apt install python3-venv"
      return 2
    fi
    say "installing python3-venv with apt"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >&2
  fi
  "$python" -m venv "$venv"
}

# driver_in ARGUMENT...: prints what --driver says among them.
driver_in() {
  local driver=native
  while (($#)); do
    case $1 in
      --driver) driver=${2-} ;;
      --driver=*) driver=${1#*=} ;;
    esac
    shift
  done
  printf '%s\n' "$driver"
}

# venv_of DRIVER: prints where its environment is.
venv_of() { if [[ $1 == native ]]; then echo .venv; else echo ".venv-$1"; fi; }

# need_venv run|dev [DRIVER]: the packages of requirements/KIND.txt, those of the driver, and the project itself.
# Without work to do it only compares a hash.
need_venv() {
  local kind=$1 driver=${2-native} files venv wanted
  files=("requirements/$kind.txt")
  case $driver in
    native) ;;
    librocketmq | grpc) files+=("requirements/$driver.txt") ;;
    *)
      say "there is no driver '$driver': use native, librocketmq or grpc"
      return 2
      ;;
  esac
  venv=$(venv_of "$driver")
  wanted=$(cat "${files[@]}" pyproject.toml | sha256sum)
  if [[ -x $venv/bin/python && $(cat "$venv/$kind.installed" 2>/dev/null) == "$wanted" ]]; then
    return
  fi
  if [[ ! -x $venv/bin/python ]]; then make_venv "$venv"; fi
  say "installing ${files[*]} into $venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes "${files[@]/#/--requirement=}"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
  if [[ $kind == dev && $driver == librocketmq ]]; then place_librocketmq "$venv"; fi
  printf '%s\n' "$wanted" >"$venv/$kind.installed"
}

# The native library, for tests alone: where the driver's package looks first. Users have Apache's own.
place_librocketmq() {
  local venv=$1 package unpacked
  package=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/rocketmq
  unpacked=$(mktemp -d)
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --target "$unpacked" \
    --requirement requirements/librocketmq-library.txt
  # A program that has it loaded goes on with the one before.
  cp --remove-destination "$unpacked/rocketmq/librocketmq.so" "$package/"
  rm -r "$unpacked"
}
