#!/usr/bin/env bash
# Writes the lock files: every version and hash, no registry named. Needs uv. Use: scripts/lock.sh [--upgrade]
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { # compile OUTPUT ARGUMENTS...
  local output=$1; shift
  uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-header --quiet --output-file "$output" "$@"
}
# What make demo installs, what make test adds, and what regenerates the stubs (an older protobuf, so apart).
compile requirements/dev.lock --extra bridge --extra daemon --extra fast --extra train --extra search --extra tracing --group build --group test --group types --group lint "$@"
compile requirements/run.lock --extra bridge --extra daemon --extra fast --extra train --group build --constraint requirements/dev.lock "$@"
# What the container image installs.
compile requirements/image.lock --extra daemon --extra tracing --constraint requirements/dev.lock "$@"
uv pip compile --group build --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-emit-find-links --no-header --quiet --output-file requirements/build.lock "$@"
uv pip compile --group audit --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-emit-find-links --no-header --quiet --output-file requirements/audit.lock "$@"
uv pip compile --group proto --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-emit-find-links --no-header --quiet --output-file requirements/proto.lock "$@"
