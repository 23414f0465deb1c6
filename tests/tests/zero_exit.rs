//! The promise of the project: a running queue costs the VMM nothing. Needs KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::Duration;

use outboard_tests::daemon::StorageDaemon;
use outboard_tests::launch::{Ended, Launch, STEP, Thread, first_device};
use outboard_tests::payload::CommandLine;
use outboard_tests::{need, place, wait};
use rustix::process::Signal;

const REQUESTS: u64 = 2000;
const DISK: usize = 16 << 20;

fn drive(disk: &StorageDaemon, operation: &str, requests: u64) -> Ended {
    let line = first_device("blk").arg("op", operation).arg("n", requests).arg("span", 512);
    let ended = Launch::payload(&line).disk(&disk.socket()).run().with_code(0);
    assert_eq!((ended.field("requests"), ended.field("errors")), (requests, 0), "{ended}");
    ended
}

/// `few` and `many` differ only in the number of requests.
fn assert_requests_are_free(few: &Ended, many: &Ended) {
    for run in [few, many] {
        assert_eq!(run.stats().number("/devices/0/requests_through_vmm"), 0, "{run}");
        assert_eq!(run.stats().range("blk0").0, 0, "reads of the register page never exit\n{run}");
    }
    assert_eq!(few.stats().range("blk0"), many.stats().range("blk0"), "exits at the device\n{many}");
    assert_eq!(
        few.stats().number("/devices/0/peer/messages"),
        many.stats().number("/devices/0/peer/messages")
    );
    assert_eq!(few.stats().number("/unclaimed/writes"), many.stats().number("/unclaimed/writes"));
    // The console's text differs by the digits of the numbers in it, and a signal may interrupt a vCPU
    // anywhere.
    let more = many.stats().exits().abs_diff(few.stats().exits());
    assert!(more < 100, "{more} more exits for {REQUESTS} requests\n{many}");
}

#[test]
fn two_thousand_reads_and_as_many_writes_cause_no_exit() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(DISK));
    for operation in ["read", "write"] {
        let none = drive(&disk, operation, 1);
        let many = drive(&disk, operation, REQUESTS);
        // An answer that is there already is taken without waiting for its interrupt.
        assert!(many.field("interrupts") > 0, "interrupts come by irqfd\n{many}");
        assert_requests_are_free(&none, &many);
    }
}

#[test]
fn the_vmm_threads_do_not_wake_for_requests() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(DISK));
    // The machine is looked at while it hangs after its last request.
    let threads = |requests: u64| {
        let line = first_device("blk").arg("n", requests).arg("end", "hang").arg("irq", "off");
        let vm = Launch::payload(&line).disk(&disk.socket()).start();
        vm.expect("errors=0");
        // KVM itself adds a thread of the kernel's to the process.
        let ours = |thread: &Thread| !thread.name.starts_with("vcpu") && !thread.name.starts_with("kvm-");
        vm.threads().into_iter().filter(ours).collect::<Vec<_>>()
    };
    let (few, many) = (threads(1), threads(REQUESTS));
    let names = |threads: &[Thread]| threads.iter().map(|thread| thread.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&few), ["outboard", "peers"], "no thread but these serves the devices");
    assert_eq!(names(&few), names(&many));
    for (few, many) in few.iter().zip(&many) {
        let woken = many.sleeps.saturating_sub(few.sleeps);
        assert!(woken < 20, "{} woke {woken} times for {REQUESTS} requests: {few:?} {many:?}", few.name);
        // Each wake-up for a request would cost some microseconds at the least.
        let cpu = many.cpu.saturating_sub(few.cpu);
        assert!(cpu < Duration::from_millis(20), "{}: {cpu:?} for {REQUESTS} requests", few.name);
    }
}

#[test]
fn several_queues_are_as_free_as_one() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::with_queues(DISK, 4));
    let drive = |requests: u64| {
        let line = first_device("blk")
            .arg("op", "verify")
            .arg("size", 512)
            .arg("n", requests)
            .arg("queues", 4)
            .arg("span", 512);
        let device = format!("blk,socket={},queues=4", disk.socket().display());
        let vm = Launch::payload(&line).arg("--vhost-user").arg(device).start();
        let ended = vm.end(STEP).with_code(0);
        assert_eq!((ended.field("requests"), ended.field("errors")), (requests, 0), "{ended}");
        ended
    };
    assert_requests_are_free(&drive(8), &drive(REQUESTS));
}

/// The same load, seen by its exits at the device, its messages, and all its exits.
fn cost(launch: Launch) -> ((u64, u64), u64, u64) {
    let ended = launch.run().with_code(0);
    assert_eq!(ended.field("errors"), 0, "{ended}");
    let stats = ended.stats();
    assert_eq!(stats.number("/devices/0/requests_through_vmm"), 0, "{ended}");
    assert_eq!(stats.range("blk0").0, 0, "reads of the register page never exit\n{ended}");
    (stats.range("blk0"), stats.number("/devices/0/peer/messages"), stats.exits())
}

#[test]
fn recovery_and_tracing_add_nothing_to_a_request() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(DISK));
    let line = |requests: u64| first_device("blk").arg("op", "verify").arg("n", requests).arg("span", 512);
    let bare = |requests: u64| cost(Launch::payload(&line(requests)).without_trace().disk(&disk.socket()));
    let both =
        |requests: u64| cost(Launch::payload(&line(requests)).disk_with(&disk.socket(), "reconnect=30"));
    let (bare_few, bare_many) = (bare(1), bare(REQUESTS));
    let (both_few, both_many) = (both(1), both(REQUESTS));
    assert_eq!(bare_few.0, bare_many.0, "exits at the device");
    assert_eq!(both_few.0, both_many.0, "exits at the device");
    assert_eq!(bare_many.0, both_many.0, "exits at the device, bare and with both");
    assert_eq!((bare_many.1, both_few.1), (bare_few.1, both_many.1), "messages");
    let more = both_many.2.abs_diff(bare_many.2).max(both_many.2.abs_diff(both_few.2));
    println!("{REQUESTS} requests: {} exits bare, {} with reconnect= and --trace", bare_many.2, both_many.2);
    assert!(more < 100, "{more} more exits");
}

#[test]
fn a_queue_that_has_changed_its_backend_is_as_free_as_before() {
    need!(place::kvm());
    let mut disk = need!(StorageDaemon::start(DISK));
    let line = first_device("blk")
        .arg("op", "verify")
        .arg("n", REQUESTS)
        .arg("size", 512)
        .arg("span", 512)
        .arg("timeout", 30);
    let launch = Launch::payload(&line.arg("end", "hang")).disk_with(&disk.socket(), "reconnect=30");
    let vm = launch.start();
    vm.expect("capacity=");
    disk.kill();
    disk.restart();
    vm.expect("errors=0");
    // Whoever looked for the backend, and watched it begin, has gone.
    let names = || vm.threads().into_iter().map(|thread| thread.name).collect::<Vec<_>>();
    wait::until("no thread is left of the recovery", STEP, || {
        (!names().iter().any(|name| name.starts_with("recover"))).then_some(())
    });
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP).with_code(143);
    let stats = ended.stats();
    assert_eq!(stats.number("/devices/0/recoveries"), 1, "{ended}");
    assert_eq!(stats.number("/devices/0/requests_through_vmm"), 0, "{ended}");
    let (reads, writes) = stats.range("blk0");
    assert!(reads == 0 && writes < 60, "{reads} reads and {writes} writes left the guest\n{ended}");
}

#[test]
fn a_device_on_the_pci_bus_is_as_free() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::with_queues(DISK, 2));
    let drive = |operation: &str, requests: u64| {
        let line = CommandLine::new("blk").arg("pci", 1).arg("op", operation).arg("size", 512);
        let line = line.arg("n", requests).arg("queues", 2).arg("span", 512);
        let device = format!("blk,socket={},queues=2,transport=pci", disk.socket().display());
        let ended = Launch::payload(&line).arg("--vhost-user").arg(device).run().with_code(0);
        assert_eq!((ended.field("requests"), ended.field("errors")), (requests, 0), "{ended}");
        ended
    };
    for operation in ["read", "verify"] {
        let (few, many) = (drive(operation, 2), drive(operation, REQUESTS));
        assert!(many.field("interrupts") > 0, "interrupts come as messages, by irqfd\n{many}");
        for range in ["pci-memory32", "pci-config"] {
            assert_eq!(few.stats().range(range), many.stats().range(range), "exits at {range}\n{many}");
        }
        assert_eq!(many.stats().number("/devices/0/requests_through_vmm"), 0, "{many}");
        let more = many.stats().exits().abs_diff(few.stats().exits());
        assert!(more < 100, "{more} more exits for {REQUESTS} requests\n{many}");
    }
}

#[test]
fn a_driver_that_uses_msix_has_no_thread_watch_interrupt_lines() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(DISK));
    let line = CommandLine::new("blk").arg("pci", 1).arg("n", 20).arg("end", "hang");
    let device = format!("blk,socket={},transport=pci", disk.socket().display());
    let vm = Launch::payload(&line).arg("--vhost-user").arg(device).start();
    vm.expect("errors=0");
    let names: Vec<_> = vm.threads().into_iter().map(|thread| thread.name).collect();
    assert!(
        names.iter().any(|name| name == "vcpu-0") && !names.iter().any(|name| name == "intx"),
        "{names:?}"
    );
}
