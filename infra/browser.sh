#!/bin/sh
# A Chromium for the tests of pages. Without one they are skipped, with that reason. Safe to repeat.
set -eu

for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null 2>&1; then
        printf 'browser: %s\n' "$(command -v "$name")" >&2
        exit 0
    fi
done
if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" != 0 ]; then
    printf 'browser: no Chromium; install it (Debian, Ubuntu: apt-get install chromium), or its tests are skipped\n' >&2
    exit 0
fi
printf 'browser: installing Chromium\n' >&2
apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null ||
    printf 'browser: that failed; the tests of pages are skipped\n' >&2
