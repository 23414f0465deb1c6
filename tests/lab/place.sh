# shellcheck shell=bash
# One question: can this host's KVM run stock kernels? Prints "host" or "lab".

lab_place() {
    case ${OUTBOARD_LAB:-auto} in host | lab) echo "$OUTBOARD_LAB"; return ;; esac
    # The report says it in so many words.
    if [ -x "${OUTBOARD_BIN:-}" ] &&
        timeout 20 "$OUTBOARD_BIN" check --json </dev/null 2>/dev/null | tr -d " \n" | grep -q "\"runs_stock_kernels\":true"; then
        echo host
    else
        echo lab
    fi
}
