#!/usr/bin/env bash
# Builds the image of docker/Dockerfile without a Docker engine, on a base from debootstrap, and prints its size in bytes.
# Needs root, debootstrap and buildah. Use: scripts/build_image.sh FOLDER
# The storage and the base stay in FOLDER; the image is localhost/moe-throttle there. DEBIAN_MIRROR names the archive where
# debootstrap's own default is not the one to use.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?folder for base and storage}")
suite=${DEBIAN_SUITE:-bookworm}
mkdir -p "$folder"
buildah=(buildah --storage-driver vfs --root "$folder/storage" --runroot "$folder/run")

root_file_system() { # root_file_system NAME PACKAGES: a small Debian with these packages, once
  local name=$1 packages=$2 tree="$folder/$1-tree"
  [ -e "$folder/$name.tar" ] && return
  rm -rf "$tree"
  debootstrap --variant=minbase --include="$packages" "$suite" "$tree" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} > "$folder/$name.log"
  # as slim images do
  rm -rf "$tree"/var/cache/apt/* "$tree"/var/lib/apt/lists/* "$tree"/var/log/* "$tree"/var/cache/debconf/*-old
  find "$tree/usr/share/doc" -depth -type f ! -name copyright -delete
  rm -rf "$tree"/usr/share/{man,info,locale,groff,lintian,linda}/*
  tar -C "$tree" -cf "$folder/$name.tar.part" .
  mv "$folder/$name.tar.part" "$folder/$name.tar"
  rm -rf "$tree"
}

import_base() { # import_base NAME: the tar as image localhost/NAME
  "${buildah[@]}" inspect --type image "localhost/$1" > /dev/null 2>&1 && return
  local container
  container=$("${buildah[@]}" from scratch)
  "${buildah[@]}" add --quiet "$container" "$folder/$1.tar" / > /dev/null
  "${buildah[@]}" commit --quiet --rm "$container" "localhost/$1" > /dev/null
}

root_file_system base ca-certificates,python3
root_file_system build-base ca-certificates,python3,python3-venv
import_base base
import_base build-base

# the machine's own way to its package index, where it has one
mounts=()
for path in /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
  [ -e "$path" ] && mounts+=(--volume "$path:$path:ro")
done
"${buildah[@]}" bud --isolation chroot --format docker --layers=false --quiet "${mounts[@]}" \
  --build-arg BASE=localhost/base --build-arg BUILD_BASE=localhost/build-base \
  --build-arg VERSION="$(sed -n 's/^__version__ = "\(.*\)"/\1/p' throttle/__init__.py)" \
  --build-arg REVISION="$(git rev-parse HEAD 2> /dev/null || echo unknown)" \
  --file docker/Dockerfile --ignorefile .dockerignore --tag localhost/moe-throttle . > /dev/null
# bytes of its layers, unpacked
"${buildah[@]}" inspect --type image localhost/moe-throttle | python3 -c 'import json, sys
print(sum(layer["size"] for layer in json.loads(json.load(sys.stdin)["Manifest"])["layers"]))'
