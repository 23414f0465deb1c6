//! How machines start, start again and end, seen from outside, with the tiny kernel. Needs KVM's interface
//! only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::Duration;

use outboard_tests::daemon::{StorageDaemon, is_listening};
use outboard_tests::launch::{Launch, STEP, first_device};
use outboard_tests::payload::CommandLine;
use outboard_tests::{need, place, wait};
use rustix::process::Signal;

#[test]
fn a_guest_that_powers_off_ends_with_code_0() {
    need!(place::kvm());
    let ended = Launch::payload(&CommandLine::new("hello")).run().with_code(0);
    assert_eq!(ended.console, "hello from the tiny kernel\r\n".replace('\r', ""), "{ended}");
    assert_eq!(ended.stats().text("/end"), "power-off");
    assert_eq!(ended.stats().number("/boots"), 1);
    assert!(!ended.log.contains("warn"), "a clean end warns of nothing\n{ended}");
}

#[test]
fn a_reset_ends_the_machine_when_asked_to() {
    need!(place::kvm());
    let line = CommandLine::new("hello").arg("end", "reset");
    let ended = Launch::payload(&line).arg("--no-reboot").run().with_code(0);
    assert_eq!(ended.stats().text("/end"), "reset");
    assert_eq!(ended.console.matches("hello").count(), 1, "{ended}");
}

#[test]
fn a_reset_boots_in_place_with_the_same_backend() {
    need!(place::kvm());
    let boots = if place::soak() { 500 } else { 50 };
    let disk = need!(StorageDaemon::start(1 << 20));
    let line = first_device("blk").arg("n", 20).arg("boots", boots).arg("boots-at", 2047);
    let ended = Launch::payload(&line).disk(&disk.socket()).run().with_code(0);
    assert_eq!(ended.console.matches("boot=").count(), boots, "{ended}");
    assert_eq!(ended.field("boot"), u64::try_from(boots).unwrap());
    assert_eq!((ended.field("requests"), ended.field("errors")), (22, 0), "{ended}");
    let stats = ended.stats();
    assert_eq!(stats.number("/boots"), u64::try_from(boots).unwrap());
    assert_eq!(stats.number("/devices/0/requests_through_vmm"), 0);
    assert!(!ended.log.contains("warn"), "nothing to warn of\n{ended}");
}

#[test]
fn a_machine_that_reboots_does_not_gather_descriptors_or_threads() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(1 << 20));
    let open = |boots: u32| {
        let line = first_device("blk").arg("boots", boots).arg("boots-at", 7).arg("end", "hang");
        let vm = Launch::payload(&line).disk(&disk.socket()).start();
        vm.expect("errors=0");
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().count();
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", vm.pid())).unwrap();
        let shared = maps.lines().filter(|line| line.contains("rw-s")).count();
        (descriptors, vm.threads().len(), shared)
    };
    assert_eq!(open(2), open(8));
}

#[test]
fn a_panic_that_the_guest_reports_ends_the_machine_with_code_5() {
    need!(place::kvm());
    let ended = Launch::payload(&CommandLine::new("hello").arg("end", "panic")).run().with_code(5);
    assert!(ended.log.contains("outboard: the guest's kernel panicked\n  hint: "), "{ended}");
}

#[test]
fn a_triple_fault_is_reported_with_registers_and_code_5() {
    need!(place::kvm());
    let ended = Launch::payload(&CommandLine::new("hello").arg("end", "triple")).run().with_code(5);
    let report = &ended.log[ended.log.find("outboard: the guest crashed").unwrap()..];
    assert!(report.contains("  because: the guest took a triple fault\n"), "{ended}");
    for register in ["vCPU 0", "rip ", "rsp ", "rax ", "cr0 ", "cr3 ", "efer"] {
        assert!(report.contains(register), "{register}\n{ended}");
    }
    assert_eq!(ended.stats().text("/end"), "crash");
}

#[test]
fn signals_end_a_hanging_guest_in_order() {
    need!(place::kvm());
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let vm =
            Launch::payload(&CommandLine::new("hello").arg("end", "hang")).arg("--cpus").arg("2").start();
        vm.expect("hello");
        vm.signal(signal);
        let ended = vm.end(STEP).with_code(128 + signal.as_raw());
        assert_eq!(ended.stats().text("/end"), "signal", "{ended}");
    }
}

#[test]
fn a_signal_that_was_ignored_at_the_start_stays_ignored() {
    need!(place::kvm());
    let line = CommandLine::new("hello").arg("end", "hang");
    let mut vm = Launch::payload(&line).by_shell("trap '' HUP; exec \"$0\" \"$@\"").start();
    vm.expect("hello");
    vm.signal(Signal::HUP);
    std::thread::sleep(Duration::from_millis(300));
    assert!(vm.is_running());
    vm.signal(Signal::TERM);
    vm.end(STEP).with_code(143);
}

#[test]
fn a_limit_of_the_host_is_one_sentence_and_code_3() {
    need!(place::kvm());
    for (limit, word) in [("-f 20480", "LimitFSIZE"), ("-n 16", "LimitNOFILE"), ("-v 131072", "ulimit -v")] {
        let launch = Launch::payload(&CommandLine::new("hello"));
        let ended = launch.by_shell(&format!("ulimit {limit}; exec \"$0\" \"$@\"")).run();
        assert_eq!(ended.code, Some(3), "{limit}\n{ended}");
        assert!(ended.log.contains("outboard: cannot ") && ended.log.contains(word), "{limit}\n{ended}");
    }
}

#[test]
fn the_backend_is_free_for_the_next_machine_after_a_signal() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(1 << 20));
    let vm = Launch::payload(&first_device("blk").arg("end", "hang")).disk(&disk.socket()).start();
    vm.expect("errors=0");
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP).with_code(143);
    assert_eq!(ended.stats().text("/devices/0/state"), "idle", "the queue was stopped in order\n{ended}");
    wait::until("the daemon listens again", STEP, || is_listening(&disk.socket()).then_some(()));
    let next = Launch::payload(&first_device("blk").arg("n", 10)).disk(&disk.socket()).run().with_code(0);
    assert_eq!(next.field("requests"), 10);
}

#[test]
fn every_cpu_that_was_asked_for_runs() {
    need!(place::kvm());
    for cpus in [1, 2, 4] {
        let line = CommandLine::new("cpus").arg("n", cpus).arg("timeout", 20);
        let ended = Launch::payload(&line).arg("--cpus").arg(cpus.to_string()).run().with_code(0);
        assert_eq!(ended.field("cpus"), cpus, "{ended}");
        assert_eq!(ended.stats().0["vcpus"].as_array().unwrap().len(), usize::try_from(cpus).unwrap());
    }
}

/// The sum of usable memory and its highest end, as the guest was told.
fn memory(ended: &outboard_tests::launch::Ended) -> (u64, u64) {
    let number = |word: &str| u64::from_str_radix(word.split_once("=0x").unwrap().1, 16).unwrap();
    let usable = ended.console.lines().filter(|line| line.starts_with("memory ") && line.contains("type=1"));
    let ranges: Vec<_> = usable
        .map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            (number(words[1]), number(words[2]))
        })
        .collect();
    let hole = 3 << 30..4_u64 << 30;
    for (start, size) in &ranges {
        assert!(start + size <= hole.start || *start >= hole.end, "memory in the hole\n{ended}");
    }
    (
        ranges.iter().map(|(_, size)| size).sum(),
        ranges.iter().map(|(start, size)| start + size).max().unwrap(),
    )
}

#[test]
fn memory_beyond_3_gib_lies_above_the_hole() {
    need!(place::kvm());
    let info = |memory: &str| {
        Launch::payload(&CommandLine::new("info")).arg("--memory").arg(memory).run().with_code(0)
    };
    let legacy = 1 << 20;
    for (size, mib, end) in [
        ("32M", 32, 32 << 20),
        ("128M", 128, 128 << 20),
        ("3G", 3072, 3 << 30),
        ("3074M", 3074, (4 << 30) + (2 << 20)),
        ("6G", 6144, 7 << 30),
    ] {
        let ended = info(size);
        let (sum, highest) = memory(&ended);
        assert_eq!(highest, end, "{size}\n{ended}");
        assert!((mib << 20) - sum < legacy, "{size}: {sum} bytes are usable\n{ended}");
    }
}

#[test]
fn an_initramfs_reaches_the_guest_whole() {
    need!(place::kvm());
    let launch = Launch::payload(&CommandLine::new("info"));
    let contents: Vec<u8> = (0..300_001_u32).map(|byte| u8::try_from(byte % 253).unwrap()).collect();
    let initramfs = launch.scratch().file("initramfs", &contents);
    let ended = launch.arg("--initramfs").arg(initramfs).run().with_code(0);
    let sum: u32 = contents.iter().map(|byte| u32::from(*byte)).sum();
    assert!(ended.console.contains(&format!("size={} sum={sum}", contents.len())), "{ended}");
}

#[test]
fn a_guest_without_acpi_finds_its_device_on_the_command_line() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(1 << 20));
    let line = CommandLine::new("info").arg("words", "kept");
    let launch = Launch::payload(&line).disk(&disk.socket()).args(["--discovery", "cmdline"]);
    let ended = launch.run();
    assert!(ended.console.contains("words=kept"), "{ended}");
    assert!(ended.console.contains("virtio_mmio.device=4K@0xd0000000:5"), "{ended}");
}

#[test]
fn two_machines_run_side_by_side() {
    need!(place::kvm());
    let disks = [need!(StorageDaemon::start(4 << 20)), need!(StorageDaemon::start(4 << 20))];
    let machines: Vec<_> = disks
        .iter()
        .map(|disk| {
            let line =
                first_device("blk").arg("n", 2000).arg("op", "verify").arg("size", 512).arg("span", 512);
            Launch::payload(&line).disk(&disk.socket()).start()
        })
        .collect();
    for machine in machines {
        let ended = machine.end(STEP).with_code(0);
        assert_eq!((ended.field("requests"), ended.field("errors")), (2000, 0), "{ended}");
        assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0);
    }
}

#[test]
fn what_the_guest_writes_is_on_the_disk() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(1 << 20));
    let before = disk.contents();
    let line = first_device("blk").arg("op", "write").arg("n", 16).arg("span", 16).arg("sector", 256);
    let ended = Launch::payload(&line).disk(&disk.socket()).run().with_code(0);
    assert_eq!(ended.field("errors"), 0, "{ended}");
    let (after, written) = (disk.contents(), 256 * 512..256 * 512 + 16 * 4096);
    assert_eq!(before[..written.start], after[..written.start]);
    assert_eq!(before[written.end..], after[written.end..]);
    // Place n holds dwords that begin with a mix of its number.
    for (place, block) in (0..16_u32).zip(after[written].chunks(4096)) {
        let first = (256 + 8 * place + place).wrapping_mul(0x85eb_ca6b).wrapping_add(0x5bd1_e995);
        let dword = |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().unwrap());
        assert_eq!((dword(0), dword(4)), (first, first.wrapping_add(0x9e37_79b9)), "place {place}");
    }
}
