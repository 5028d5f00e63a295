#!/usr/bin/env bash
# setup.sh [PACKAGE...]: installs the Debian packages that the build needs, and those named, if any is missing; otherwise
# does nothing, fast.
set -euo pipefail

packages=(
  g++ cmake ninja-build ccache mold pkg-config
  libdnnl-dev libopenblas-openmp-dev                    # matrix products: fp32 and bf16, fp64
  nlohmann-json3-dev libtomlplusplus-dev libcli11-dev libfmt-dev
  libonig-dev libutf8proc-dev libzstd-dev zlib1g-dev   # tokenizer, compressed corpora
  libarchive-dev                                        # .npz
  libgtest-dev libbenchmark-dev
  "$@"
)

if ! command -v dpkg-query >/dev/null; then
  echo "setup: not a Debian system, so nothing was installed; the build needs: ${packages[*]}" >&2
  exit 0
fi
installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null || true)
missing=()
for package in "${packages[@]}"; do
  grep -qxF "installed $package" <<<"$installed" || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null || { ! sudo -n true 2>/dev/null && [ ! -t 0 ]; }; then
    echo "setup: missing packages, and neither root nor sudo to install them. Have them installed:" >&2
    echo "  apt-get install ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" >>"$log" 2>&1; }
if ! { apt update && apt install -y --no-install-recommends "${missing[@]}"; }; then
  cat "$log" >&2
  exit 1
fi
