# Records ("record ROUND VMM WHAT VALUE") to the table of `make bench` on standard output, and to JSON in the file `json`.
# A figure is the median of its rounds; a cell without a measurement is empty here and null there.

$1 != "record" { next }
$4 == "void" { void++; next }
{ count[$3, $4]++; value[$3, $4, count[$3, $4]] = $5 + 0 }

function median(vmm, what,    n, i, j, held, sorted) {
    n = count[vmm, what]
    if (!n) return ""
    for (i = 1; i <= n; i++) sorted[i] = value[vmm, what, i]
    for (i = 2; i <= n; i++) {
        held = sorted[i]
        for (j = i - 1; j > 0 && sorted[j] > held; j--) sorted[j + 1] = sorted[j]
        sorted[j + 1] = held
    }
    return n % 2 ? sorted[(n + 1) / 2] : (sorted[n / 2] + sorted[n / 2 + 1]) / 2
}

# One line: title, target for outboard ("" for none), what, divisor, digits, JSON name.
function line(title, target, what, divisor, digits, name,    i, vmm, figure, cells, entry, verdict) {
    entry = ""
    for (i = 1; i <= vmms; i++) {
        vmm = order[i]
        figure = median(vmm, what)
        if (figure != "") figure = sprintf("%." digits "f", figure / divisor)
        cells = cells sprintf(" %13s", figure)
        entry = entry sprintf("%s\"%s\": %s", i > 1 ? ", " : "", vmm, figure == "" ? "null" : figure)
        if (i == 1) verdict = target == "" || figure == "" ? "" : figure + 0 <= target + 0 ? "met" : "missed"
    }
    printf "%-46s%s %9s  %s\n", title, cells, target, verdict
    body = body sprintf("%s\n    \"%s\": {%s, \"target\": %s, \"samples\": %d}", body == "" ? "" : ",", name, entry, target == "" ? "null" : target, count["outboard", what])
}

END {
    vmms = split("outboard microvm q35", order, " ")
    printf "outboard %s beside QEMU %s; guest: Debian %s, ELF, 256 MiB, 1 vCPU; backend: qemu-storage-daemon\n", commit, qemu, kernel
    printf "in the lab, counted instructions (1 = 1 ns); medians of %d rounds; discarded: %d stalled rounds, %d single runs\n\n", rounds, stalled, void
    printf "%-46s %13s %13s %13s %9s\n", "", "outboard", "QEMU microvm", "QEMU q35", "at most"
    line("exec to first entry, Linux (ms)", "100", "linux_ms", 1, 1, "first_entry_linux_ms")
    line("exec to first entry, tiny kernel (ms)", "8", "tiny_ms", 1, 1, "first_entry_tiny_ms")
    line("exec to the guest's init (ms)", "1350", "init_ms", 1, 0, "init_ms")
    line("exits to userspace until init", "250", "init_exits", 1, 0, "init_exits")
    line("exec to init, default command line (ms)", "1350", "lean_ms", 1, 0, "init_default_cmdline_ms")
    line("exits until init, default command line", "250", "lean_exits", 1, 0, "init_exits_default_cmdline")
    line("exits to userspace per 4 KiB direct read", "0", "read_exits", requests, 3, "exits_per_read")
    line("exits to userspace per 4 KiB direct write", "0", "write_exits", requests, 3, "exits_per_write")
    line("CPU, " requests " reads, threads but vCPUs (ms)", "", "read_other_cpu_ns", 1e6, 3, "cpu_reads_other_threads_ms")
    line("CPU, " requests " reads, whole process (ms)", "", "read_cpu_ns", 1e6, 1, "cpu_reads_process_ms")
    line("CPU, " requests " writes, threads but vCPUs (ms)", "", "write_other_cpu_ns", 1e6, 3, "cpu_writes_other_threads_ms")
    line("CPU, " requests " writes, whole process (ms)", "", "write_cpu_ns", 1e6, 1, "cpu_writes_process_ms")
    line("resident memory but guest RAM (KiB)", "2048", "rss_kib", 1, 0, "resident_without_guest_ram_kib")
    line("binary, stripped (MB)", "3", "binary", 1e6, 2, "binary_mb")
    print "\ncommand line: console=ttyS0 quiet panic=-1, the same for all. Default: the words that outboard gives a kernel when"
    print "nothing else is said, given to all; they leave out self-tests of the kernel's ciphers, for all alike."
    print "resident memory counts shared pages too: the program's text, and QEMU's mapping of the kernel file\n"
    if (count["host", "byte_us"]) {
        printf "on this host's own KVM, wall time, noisy; tiny kernel, median of %d:\n", count["host", "byte_us"]
        printf "  exec to the first byte on its console  %8.1f ms   (the first guest instruction is before that)\n", median("host", "byte_us") / 1000
        printf "  start of the build to first entry      %8.1f ms   (outboard's own clock, --stats)\n", median("host", "entry_us") / 1000
        host = sprintf("{\"samples\": %d, \"exec_to_first_console_byte_us\": %d, \"build_to_first_entry_us\": %d}", count["host", "byte_us"], median("host", "byte_us"), median("host", "entry_us"))
    } else {
        print "on this host: no /dev/kvm for us, not measured"
        host = "null"
    }
    printf "{\n  \"commit\": \"%s\", \"qemu\": \"%s\", \"guest_kernel\": \"%s\",\n", commit, qemu, kernel >json
    printf "  \"clock\": \"counted instructions, 1 ns each\", \"requests\": %d,\n", requests >json
    printf "  \"rounds\": %d, \"stalled_rounds\": %d, \"void_runs\": %d,\n", rounds, stalled, void >json
    printf "  \"lab\": {%s\n  },\n  \"host_wall_time\": %s\n}\n", body, host >json
}
