#!/bin/sh
# SPDX-License-Identifier: MIT
# Put each guest's stream where spec-ctrl-probe ingest takes it by the machine's name.
# usage: collect.sh RUN OUT   (RUN: the folder that tmt run --id names; OUT/GUEST.ndjson is written)
set -eu
mkdir -p "$2"
for output in "$1"/plan/execute/data/guest/*/probe-*/output.txt; do
    guest=${output#*/execute/data/guest/}
    sed -n '/^{"event"/p' "$output" > "$2/${guest%%/*}.ndjson"
done
