# shellcheck shell=bash
# One question: can this host's KVM run stock kernels? Prints "host" or "lab".

lab_place() {
    case ${OUTBOARD_LAB:-auto} in host | lab) echo "$OUTBOARD_LAB"; return ;; esac
    # `outboard check` ends with 0 where the host can, with 3 where it cannot.
    if [ -x "${OUTBOARD_BIN:-}" ] && timeout 20 "$OUTBOARD_BIN" check --json </dev/null >/dev/null 2>&1; then
        echo host
    else
        echo lab
    fi
}
