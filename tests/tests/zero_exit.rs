//! The promise of the project: a running queue costs the VMM nothing. Needs KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::Duration;

use outboard_tests::daemon::StorageDaemon;
use outboard_tests::launch::{Ended, Launch, STEP, Thread, first_device};
use outboard_tests::{need, place};

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
    // The console's text differs by the digits of the numbers in it, and a signal may interrupt a vCPU anywhere.
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
        let woken = many.slices.saturating_sub(few.slices);
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
