# Lines "VMM FIGURE VALUE" become one table and, in the file named by json, an object of objects.
{ value[$1, $2] = $3; if (!($1 in seen)) { seen[$1] = 1; order[++vmms] = $1 } }

function cell(vmm, figure) { return ((vmm, figure) in value) ? value[vmm, figure] : "-" }

function row(title, figure, target, tiny) {
    printf "%-58s %10s %10s %10s %10s   %s\n", title, cell("outboard", figure), cell("outboard-default", figure), \
        cell("microvm", figure), cell("q35", figure), target
}

END {
    printf "%-58s %10s %10s %10s %10s   %s\n", "counted instructions: 1 ms = 1 000 000", "outboard", "default*", "microvm", "q35", "target"
    row("exec to the first entry into the guest, 57 MB ELF, ms", "first_entry_ms", "<= 100")
    printf "%-58s %10s %10s %10s %10s   %s\n", "exec to the first entry into the guest, tiny kernel, ms", cell("outboard-tiny", "first_entry_ms"), "", "-", "-", "<= 8"
    row("exec to the guest's init, ms", "init_ms", "<= 1350")
    row("exits to userspace until init", "init_exits", "<= 250")
    row("exits to userspace, direct reads of 4 KiB, all of them", "read_exits", "0")
    row("exits to userspace, direct writes of 4 KiB, all of them", "write_exits", "0")
    row("CPU time of the other threads meanwhile, ms", "other_threads_ms", "0")
    row("resident memory without guest RAM, KiB", "rss_kib", "<= 2048")
    row("size of the binary, bytes", "binary_bytes", "<= 3000000")
    row("on this host: build to first entry, tiny kernel, us (noise)", "tiny_first_entry_here_us", "")
    print "* outboard's own default command line; the others have the same words: console=ttyS0 quiet panic=-1"
    printf "runs of the lab that stalled and were repeated: %d\n", stalls

    printf "{\n" >json
    for (i = 1; i <= vmms; i++) {
        vmm = order[i]
        printf "  \"%s\": {", vmm >json
        first = 1
        for (key in value) {
            split(key, part, SUBSEP)
            if (part[1] == vmm) { printf "%s\"%s\": %s", first ? "" : ", ", part[2], value[key] >json; first = 0 }
        }
        printf "},\n" >json
    }
    printf "  \"stalls\": %d\n}\n", stalls >json
}
