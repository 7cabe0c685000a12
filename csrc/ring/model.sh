#!/bin/sh
# The model of the rings and doorbells (ring.pml) under the model checker spin: the code as it is
# must hold, and each mistake (BUG_) must be found, for its own reason. One line for each run.
#   csrc/ring/model.sh [RUN...]      MODEL_JOBS (2) at a time; all but long-* if none is named
# docs/ring-model.md says what the runs are and how to read a fault.
set -eu

# RUN EXPECT OPTIONS...
table() {
    cat << 'END'
inbox-sizes             holds     -DTO_COORDINATOR=0 -DWAKES=0 -DCELLS=2 -DLONGEST=2
outbox-sizes            holds     -DTO_WORKER=0 -DWAKES=0 -DCELLS=2 -DLONGEST=2
inbox-queue             holds     -DTO_COORDINATOR=0 -DWAKES=0 -DCELLS=2 -DQUEUE=2
inbox-thread            holds     -DTO_COORDINATOR=0 -DTIMEOUTS=1
outbox-thread           holds     -DTO_WORKER=0 -DTIMEOUTS=1
both                    holds     -DWAKES=0
progress-inbox          holds     -DTO_COORDINATOR=0 -DWAKES=0 -DPROGRESS
progress-outbox-thread  holds     -DTO_WORKER=0 -DPROGRESS
long-progress-both      holds     -DWAKES=0 -DPROGRESS
BUG_HEAD_STORE_RELEASE    stuck     -DTO_WORKER=0 -DWAKES=0
BUG_HEAD_LOOK_ACQUIRE     stuck     -DTO_WORKER=0 -DWAKES=0
BUG_SLEEPS_STORE_RELEASE  stuck     -DTO_WORKER=0 -DWAKES=0
BUG_TAKE_LOAD_ACQUIRE     stuck     -DTO_WORKER=0 -DWAKES=0
BUG_TAIL_STORE_RELEASE    stuck     -DTO_WORKER=0 -DWAKES=0
BUG_TAIL_LOOK_ACQUIRE     stuck     -DTO_WORKER=0 -DWAKES=0
BUG_WAITS_STORE_RELEASE   stuck     -DTO_COORDINATOR=0 -DWAKES=0
BUG_HEAD_RELAXED          record    -DTO_WORKER=0 -DWAKES=0 -DCELLS=2 -DLONGEST=2
BUG_TAIL_RELAXED          record    -DTO_WORKER=0 -DWAKES=0 -DCELLS=2 -DLONGEST=2
BUG_ROOM_OVERCOUNTED      counters  -DTO_WORKER=0 -DWAKES=0 -DCELLS=2 -DLONGEST=2
BUG_CONSUMER_LOOKS_FIRST  stuck     -DTO_WORKER=0 -DWAKES=0
BUG_PRODUCER_LOOKS_FIRST  stuck     -DTO_COORDINATOR=0 -DWAKES=0
BUG_WAKE_BEFORE_PUBLISH   stuck     -DTO_WORKER=0 -DWAKES=0
BUG_WAKE_BEFORE_ROOM      stuck     -DTO_COORDINATOR=0 -DWAKES=0
BUG_CLEAR_AFTER_ANNOUNCE  stuck     -DTO_WORKER=0 -DWAKES=0
BUG_CLEAR_AFTER_FLUSH     stuck     -DTO_COORDINATOR=0 -DWAKES=0
BUG_NO_REANNOUNCE         stuck     -DTO_WORKER=0 -DWAKES=0
BUG_NO_OWN_RING           stuck     -DTO_WORKER=0 -DWAKES=0
BUG_NO_ROOM_ANNOUNCED     stuck     -DTO_COORDINATOR=0 -DWAKES=0
BUG_NO_FLUSH              stuck     -DTO_COORDINATOR=0 -DWAKES=0
BUG_POST_OVERTAKES        record    -DTO_COORDINATOR=0 -DWAKES=0 -DQUEUE=2
BUG_NO_WOKEN              stuck     -DTO_WORKER=0
BUG_BELL_BEFORE_WOKEN     stuck     -DTO_WORKER=0
BUG_WOKEN_RESET_LATE      stuck     -DTO_WORKER=0
BUG_CLIENTS_FIRST         progress  -DWAKES=0 -DPROGRESS
END
}

cd "$(dirname "$0")/../.."
for tool in spin gcc; do
    if ! command -v $tool > /dev/null; then
        echo "skipped: no $tool here (Debian has a package of that name)"
        exit 0
    fi
done

replay() { echo "  to see it: cd build/model/$run && spin -t -p -g $options ring.pml"; }

# holds: every state was seen, and none is wrong. Else the reason for which pan stopped.
outcome() {
    case $(grep -m 1 '^pan:1: ' pan.log || true) in
    *'acceptance cycle'*) echo progress ;;
    *'assertion violated 0 '* | *'invalid end state'*) echo stuck ;;
    *'assertion violated (((cell=='*) echo record ;;
    *'assertion violated'*) echo counters ;;
    *)
        if grep -q 'errors: 0' pan.log && ! grep -qE 'not completed|too small' pan.log; then
            echo holds
        else
            echo unfinished
        fi
        ;;
    esac
}

check() {  # RUN: one row of the table
    run=$1
    row=$(table | grep -E "^$run ") || { echo "no run is called $run"; return 1; }
    expect=$(echo "$row" | awk '{ print $2 }')
    options=$(echo "$row" | awk '{ $1 = $2 = ""; print }')
    search="-DSAFETY -O2 -DCOLLAPSE" limits="-m3000000"
    case $run in BUG_*) options="$options -D$run" search="-DSAFETY -O0 -DBFS" limits="" ;; esac
    case $options in *-DPROGRESS*) search="-O2 -DCOLLAPSE" limits="-m3000000 -a -f" ;; esac
    rm -rf "build/model/$run"
    mkdir -p "build/model/$run"
    cp csrc/ring/*.pml "build/model/$run"
    cd "build/model/$run"
    # Word splitting is meant: several options in one variable.
    if ! spin -a $options ring.pml > spin.log 2>&1 ||
        ! gcc -w -DMEMLIM=1200 $search -o pan pan.c; then
        echo "FAILED  $run: does not compile"
        cat spin.log
        return 1
    fi
    timeout 600 ./pan $limits > pan.log 2>&1 || true  # the log says how it went
    rm -f pan pan.?
    found=$(outcome)
    figures=$(sed -nE -e 's/.*depth reached ([0-9]+),.*/depth \1,/p' \
        -e 's/^ *([0-9]+) states, stored.*/\1 states/p' pan.log | tr '\n' ' ')
    if [ "$found" = "$expect" ]; then
        printf '%-8s  %-25s %s\n' "$found" "$run" "$figures"
        return 0
    fi
    printf 'FAILED    %-25s %s where it should be %s: %s\n' "$run" "$found" "$expect" "$figures"
    replay
    return 1
}

case ${1:-} in
--check) check "$2" && exit 0 || exit 1 ;;
'') set -- $(table | awk '!/^long-/ { print $1 }') ;;
esac
if printf '%s\n' "$@" | xargs -P "${MODEL_JOBS:-2}" -n 1 csrc/ring/model.sh --check; then
    echo "model: $# runs as expected"
else
    echo "model: not as expected"
    exit 1
fi
