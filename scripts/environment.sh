# Sourced by scripts/quickstart and scripts/check: makes .venv with pinned versions, or finds it made.
#   source scripts/environment.sh run|dev

kind=$1
venv=.venv
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; found $("$python" --version). Set PYTHON=/path/to/python3.11." >&2
    exit 2
}

# What the environment is made of; another mark means it is out of date.
mark=$(cat pyproject.toml constraints.txt scripts/environment.sh | cksum)
if [ "$(cat "$venv/.made-for-dev" 2>/dev/null)" != "$mark" ] &&
    { [ "$kind" = dev ] || [ "$(cat "$venv/.made-for-run" 2>/dev/null)" != "$mark" ]; }; then
    echo "Setting up $venv (once) …"
    "$python" -m venv "$venv"
    pip="$venv/bin/python -m pip --disable-pip-version-check"
    torch=$(sed -n 's/^torch==//p' constraints.txt)
    if ! nvidia-smi >/dev/null 2>&1 && ! $pip show -q torch 2>/dev/null; then
        # The CPU build is ten times smaller. Some package indexes offer it, others only the CUDA build.
        if ! $pip install -qq "torch==$torch+cpu" 2>/dev/null; then
            echo "No package index here offers torch $torch+cpu; installing the build with CUDA (several GB)."
            echo "To avoid it, set PIP_EXTRA_INDEX_URL to an index of PyTorch's CPU builds."
        fi
    fi
    extra=""
    if [ "$kind" = dev ]; then extra="[dev]"; fi
    $pip install -qq -c constraints.txt -e ".$extra"
    echo "$mark" >"$venv/.made-for-$kind"
fi
PATH="$PWD/$venv/bin:$PATH"
