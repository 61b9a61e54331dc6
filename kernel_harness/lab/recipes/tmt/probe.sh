#!/bin/sh
# SPDX-License-Identifier: MIT
# Run the agent and write its exit code as a custom result of tmt. The stream goes to stdout as well: tmt keeps what a guest
# printed even if the guest is lost, but files only if it can still fetch them.
data=${TMT_TEST_DATA:?is set by tmt}

if [ -s "$AGENT" ]; then
    # tee must not hide the exit code
    {
        # shellcheck disable=SC2086 # several arguments
        python3 "$AGENT" run --in metal --write --stream --record /dev/null $RUN_ARGUMENTS 2> "$data/said.txt"
        echo $? > "$data/exit-code"
    } | tee "$data/stream.ndjson"
    code=$(cat "$data/exit-code")
    cat "$data/said.txt" >&2
else
    echo "no agent: put $AGENT beside probe.sh, or give AGENT" | tee "$data/said.txt" >&2
    : > "$data/stream.ndjson"
    code=3
fi

case $code in
    0) result=pass note="as predicted" ;;
    1) result=fail note="findings" ;;
    4) result=skip note="a requirement is missing" ;;
    5) result=fail note="a register was not put back" ;;
    *) result=error note="the agent failed" ;;
esac

cat > "$data/results.yaml" << END
- name: /
  result: $result
  note:
  - exit code $code, $note
  log:
  - said.txt
  - stream.ndjson
END
