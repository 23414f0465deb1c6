# shellcheck shell=bash
# One run of the lab: QEMU's software emulation boots a stock kernel with KVM, and one command in it. Whatever
# happens, no QEMU and no temporary file is left: traps here, a parent-death signal on QEMU, and the next run
# removes what a killed one left.

lab_run() {
    LAB_FILES=() LAB_BINS=() LAB_ENV=() LAB_LAYERS=()
    LAB_MEM=${OUTBOARD_LAB_MEM:-2G} LAB_ICOUNT="" LAB_TIMEOUT=${OUTBOARD_LAB_TIMEOUT:-600} LAB_TTY="" LAB_VERBOSE=""
    LAB_OUT="" LAB_CWD=/root LAB_OUTER=${OUTBOARD_LAB_KERNEL:-6.12} LAB_WORDS="" LAB_ACCEL=tcg
    while [ $# -gt 0 ]; do
        case $1 in
            --file) LAB_FILES+=("$2"); shift 2 ;;
            --bin) LAB_BINS+=("$2"); shift 2 ;;
            --env) LAB_ENV+=("$2"); shift 2 ;;
            --cwd) LAB_CWD=$2; shift 2 ;;
            --out) LAB_OUT=$2; shift 2 ;;
            --with) LAB_LAYERS+=("$2"); shift 2 ;;
            --kernel) LAB_OUTER=$2; shift 2 ;;
            --cmdline) LAB_WORDS=$2; shift 2 ;;
            --mem) LAB_MEM=$2; shift 2 ;;
            --icount) LAB_ICOUNT=$2; shift 2 ;;
            --timeout) LAB_TIMEOUT=$2; shift 2 ;;
            --tty) LAB_TTY=1; shift ;;
            -v) LAB_VERBOSE=1; shift ;;
            --) shift; break ;;
            -*) die "unknown option $1 (tests/lab/lab help)" ;;
            *) break ;;
        esac
    done
    [ $# -gt 0 ] || die "run what? lab run [OPTION…] -- CMD [ARG…]"
    [ -z "$LAB_TTY" ] || [ -t 0 ] || die "--tty needs a terminal on standard input"

    # Seconds without a heartbeat that make a stall; counted seconds pass more slowly.
    if [ -n "$LAB_ICOUNT" ]; then LAB_STALL=${OUTBOARD_LAB_STALL:-60}; else LAB_STALL=${OUTBOARD_LAB_STALL:-30}; fi
    lab_run_sweep
    mkdir -p "$LAB_CACHE/run"
    LAB_RUN=$(mktemp -d "$LAB_CACHE/run/$$.XXXXXX")
    trap lab_run_cleanup EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    LAB_WORK=$LAB_RUN
    lab_run_image "$@"

    # A caller that repeats by itself, with other timing, says OUTBOARD_LAB_ATTEMPTS=1.
    local attempt attempts=${OUTBOARD_LAB_ATTEMPTS:-2}
    for ((attempt = 1; attempt <= attempts; attempt++)); do
        lab_run_once
        [ "$LAB_VERDICT" = stalled ] || break
        lab_run_keep_log
        if [ $attempt -lt $attempts ]; then
            say "the lab stalled (no heartbeat for $LAB_STALL s); its kernel log is in $LAB_KEPT_LOG; repeating once"
        fi
    done
    case $LAB_VERDICT in
        exit\ *) lab_run_results; exit "${LAB_VERDICT#exit }" ;;
        timeout) lab_run_keep_log; say "the command did not end within $LAB_TIMEOUT s; kernel log: $LAB_KEPT_LOG"; exit 124 ;;
        stalled) say "the lab stalled (no heartbeat for $LAB_STALL s); kernel log: $LAB_KEPT_LOG"; exit 123 ;;
        *)
            lab_run_keep_log
            tail -n 25 "$LAB_KEPT_LOG" >&2
            [ ! -s "$LAB_RUN/qemu.log" ] || cat "$LAB_RUN/qemu.log" >&2
            die "the lab ended without a status; the end of its kernel log is above, all of it in $LAB_KEPT_LOG"
            ;;
    esac
}

# Temporary folders are named after the process that made them.
lab_run_sweep() {
    local dir owner
    for dir in "$LAB_CACHE"/run/*/; do
        owner=${dir%/}
        owner=${owner##*/}
        owner=${owner%%.*}
        case $owner in '' | *[!0-9]*) continue ;; esac
        kill -0 "$owner" 2>/dev/null || [ -d "/proc/$owner" ] || rm -rf "$dir"
    done
}

lab_run_cleanup() {
    trap '' HUP INT TERM
    [ -z "${LAB_QEMU:-}" ] || { kill -9 "$LAB_QEMU" && wait "$LAB_QEMU"; } 2>/dev/null || true
    [ -z "${LAB_STTY:-}" ] || stty "$LAB_STTY" <&8 2>/dev/null || true
    [ -z "${LAB_RUN:-}" ] || rm -rf "$LAB_RUN"
}

lab_run_keep_log() {
    LAB_KEPT_LOG=$LAB_CACHE/log/$(date +%H%M%S)-$$.kernel.log
    mkdir -p "$LAB_CACHE/log"
    cp "$LAB_RUN/kernel.log" "$LAB_KEPT_LOG" 2>/dev/null || : >"$LAB_KEPT_LOG"
    find "$LAB_CACHE/log" -type f -mmin +1440 -delete
}

quoted() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

# The run's own archive goes first, uncompressed: the kernel takes any number of archives, but nothing may
# follow an lz4 one that is not lz4.
lab_run_image() {
    local tree=$LAB_RUN/tree item host lab layer variable
    mkdir -p "$tree/lab/run" "$tree/$LAB_CWD"
    for item in "${LAB_FILES[@]}"; do
        host=${item%%:*} lab=${item#*:}
        [ "$lab" != "$item" ] || lab=$(realpath -s "$host")
        [ -e "$host" ] || die "--file $host: no such file"
        lab_stage "$tree" "$host" "$lab"
    done
    for item in "${LAB_BINS[@]}"; do
        host=${item%%:*} lab=${item#*:}
        [ "$lab" != "$item" ] || lab=$(realpath -s "$host")
        [ -f "$host" ] || die "--bin $host: no such file"
        lab_stage_program "$tree" "$host" "$lab"
    done
    {
        lab_variables /lab/kernel | while IFS= read -r variable; do echo "export $(quoted "$variable")"; done
        for variable in "${LAB_ENV[@]}"; do
            case $variable in
                *=*) ;;
                *) [ -n "${!variable+set}" ] || continue; variable="$variable=${!variable}" ;;
            esac
            echo "export $(quoted "$variable")"
        done
        echo "export OUTBOARD_IN_LAB=1"
        echo "cd $(quoted "$LAB_CWD")"
        printf exec
        for item in "$@"; do printf ' %s' "$(quoted "$item")"; done
        echo
    } >"$tree/lab/run/command"
    [ -z "$LAB_OUT" ] || : >"$tree/lab/run/out"
    if [ -n "$LAB_TTY" ]; then
        read -r rows columns < <(stty size) || true
        echo "sane rows ${rows:-24} columns ${columns:-80}" >"$tree/lab/run/tty"
    fi
    # Libraries that the base has already need not travel twice.
    (cd "$tree" && find -L . -mindepth 1 | sort | grep -vxF -f <(sed 's/^/./' "$LAB_CACHE/image/base.list" | grep '^\./\(lib\|usr/lib\)') |
        cpio -o -H newc -L -R 0:0 --quiet) >"$LAB_RUN/initrd" || die "cannot pack the files of the run"
    cat "$LAB_CACHE/image/modules-$LAB_OUTER" >>"$LAB_RUN/initrd" || die "no kernel $LAB_OUTER here"
    for layer in "${LAB_LAYERS[@]}"; do
        cat "$LAB_CACHE/image/$layer" >>"$LAB_RUN/initrd" || die "--with $layer: no such layer"
    done
    cat "$LAB_CACHE/image/base" >>"$LAB_RUN/initrd"
}

# Without XSAVE: the emulated AMD-V lets a guest write XCR0 without KVM noticing, and guests then warn at
# length of a state that does not fit.
lab_run_once() {
    local port qemu=() helpers=() tails=()
    qemu=(qemu-system-x86_64 -accel "$LAB_ACCEL" -cpu "${OUTBOARD_LAB_CPU:-max,-xsave}" -M q35 -smp 1 -m "$LAB_MEM"
        -nodefaults -no-user-config -no-reboot -display none
        -kernel "$LAB_CACHE/kernel/$LAB_OUTER/bzimage" -initrd "$LAB_RUN/initrd"
        -append "console=ttyS0 no_timer_check panic=-1 rdinit=/init random.trust_cpu=on mitigations=off $LAB_WORDS"
        -serial "file:$LAB_RUN/kernel.log" -device virtio-serial-pci,event_idx=off)
    [ -z "$LAB_ICOUNT" ] || qemu+=(-icount "shift=$LAB_ICOUNT,sleep=off")
    for port in status out err files; do
        : >"$LAB_RUN/$port"
        qemu+=(-chardev "file,id=$port,path=$LAB_RUN/$port" -device "virtserialport,chardev=$port,name=lab.$port")
    done
    [ -p "$LAB_RUN/nudge" ] || mkfifo "$LAB_RUN/nudge" "$LAB_RUN/clock"
    qemu+=(-chardev "pipe,id=nudge,path=$LAB_RUN/nudge" -device "virtserialport,chardev=nudge,name=lab.nudge")
    : >"$LAB_RUN/kernel.log"
    rm -f "$LAB_RUN/verdict"
    exec 8<&0
    if [ -n "$LAB_TTY" ]; then
        LAB_STTY=$(stty -g)
        qemu+=(-chardev "stdio,id=tty,signal=off" -device "virtconsole,chardev=tty")
        setpriv --pdeathsig KILL "${qemu[@]}" <&8 2>"$LAB_RUN/qemu.log" &
    else
        setpriv --pdeathsig KILL "${qemu[@]}" </dev/null >"$LAB_RUN/qemu.log" 2>&1 &
    fi
    LAB_QEMU=$!
    if [ -z "$LAB_TTY" ]; then
        tail -f -s 0.1 --pid="$LAB_QEMU" -c +1 "$LAB_RUN/out" & tails+=($!)
        tail -f -s 0.1 --pid="$LAB_QEMU" -c +1 "$LAB_RUN/err" >&2 & tails+=($!)
    fi
    [ -z "$LAB_VERBOSE" ] || { tail -f -s 0.1 --pid="$LAB_QEMU" -c +1 "$LAB_RUN/kernel.log" >&2 & tails+=($!); }
    lab_run_watch </dev/null >/dev/null 2>&1 & helpers+=($!)
    lab_run_nudge </dev/null >/dev/null 2>&1 & helpers+=($!)
    wait "$LAB_QEMU" 2>/dev/null || true
    LAB_QEMU=""
    kill "${helpers[@]}" 2>/dev/null || true
    wait "${helpers[@]}" "${tails[@]}" 2>/dev/null || true
    if [ -e "$LAB_RUN/verdict" ]; then
        LAB_VERDICT=$(cat "$LAB_RUN/verdict")
    else
        LAB_VERDICT=$(grep -a '^exit [0-9]*$' "$LAB_RUN/status" | tail -n 1) || LAB_VERDICT=lost
    fi
}

# Beside QEMU: ends it when the heartbeat stops or the time is up, and says which. On a busy host a lab may
# need a minute to boot: what its processor (the thread that has waited most) spent waiting for one of the
# host's is no silence of its own.
lab_run_watch() {
    local size=-1 now begun at before waited waiting=0 quiet=0
    begun=$(lab_run_clock) before=$begun
    exec 7<>"$LAB_RUN/clock"
    while kill -0 $$ && kill -0 "$LAB_QEMU"; do
        read -r -t 1 -u 7 || true
        at=$(lab_run_clock)
        # Threads of it come and go meanwhile.
        waited=$({ cat "/proc/$LAB_QEMU/task/"*/schedstat || true; } | awk '$2 > most { most = $2 } END { printf "%d", most / 1000000 }')
        quiet=$((quiet + at - before - (waited > waiting ? waited - waiting : 0)))
        before=$at waiting=$waited
        now=$(stat -c %s "$LAB_RUN/status")
        [ "$now" = "$size" ] || quiet=0
        size=$now
        if [ $quiet -ge $((LAB_STALL * 1000)) ]; then
            echo stalled >"$LAB_RUN/verdict"
        elif [ "$LAB_TIMEOUT" -gt 0 ] && [ $((at - begun)) -ge $((LAB_TIMEOUT * 1000)) ]; then
            echo timeout >"$LAB_RUN/verdict"
        else
            continue
        fi
        kill -9 "$LAB_QEMU"
        return
    done
}

# Beside QEMU: an interrupt for the lab now and then. QEMU changes a virtual CPU's pending interrupts without
# its lock at each entry into and exit from a nested guest (helper_vmrun, do_vmexit); one that another thread
# raises just then is lost, and the lab, if that was its timer's, waits for ever. Any other interrupt has the
# lost one delivered, too.
lab_run_nudge() {
    local pause=0.2
    [ -z "$LAB_ICOUNT" ] || pause=2
    exec 7<>"$LAB_RUN/nudge" 9<>"$LAB_RUN/clock"
    while kill -0 $$ && kill -0 "$LAB_QEMU"; do
        read -r -t "$pause" -u 9 || true
        echo >&7
    done
}

# Milliseconds, from some time on.
lab_run_clock() { awk '{ printf "%d", $1 * 1000 }' /proc/uptime; }

lab_run_results() {
    [ -n "$LAB_OUT" ] || return 0
    mkdir -p "$LAB_OUT"
    tar -C "$LAB_OUT" -xf "$LAB_RUN/files" || die "the files in /out did not come back whole"
}
