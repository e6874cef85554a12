#!/usr/bin/env bash
# Installs the Debian packages that the tests of deployment talk to, or says clearly that it cannot.
set -euo pipefail
packages=(orthanc orthanc-dicomweb chromium dicom3tools)

installed() { dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null | grep -q '^installed$'; }
cannot() {
    echo "error: cannot install ${missing[*]}: $1; install them yourself, or leave their tests out: make test-deploy DEPLOY_TESTS=tests/deploy/test_label_rest.py" >&2
    exit 2
}

command -v dpkg-query >/dev/null || { missing=("${packages[@]}"); cannot "this is not Debian"; }
missing=()
for package in "${packages[@]}"; do installed "$package" || missing+=("$package"); done
[ ${#missing[@]} -eq 0 ] && exit 0
echo "Installing ${missing[*]} ..."
if [ "$(id -u)" -eq 0 ]; then sudo=(); elif sudo -n true 2>/dev/null; then sudo=(sudo -n); else cannot "this needs root"; fi
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update >"$log" 2>&1 || cannot "$(grep -m1 -E '^(E|Err)' "$log" || tail -1 "$log")"
"${sudo[@]}" apt-get install --yes --no-install-recommends "${missing[@]}" >>"$log" 2>&1 ||
    cannot "$(grep -m1 '^E:' "$log" || tail -1 "$log")"
