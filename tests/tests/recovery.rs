//! Backends that die or stop under load, and are found again (`reconnect=`). Needs KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::Duration;

use outboard_tests::daemon::StorageDaemon;
use outboard_tests::launch::{Launch, STEP, Vm, first_device};
use outboard_tests::{need, place, wait};
use rustix::process::{Pid, Signal, kill_process};

const MIB: usize = 1 << 20;

/// A guest that writes blocks and reads them back until it is told to stop, behind `keys`.
fn busy(disk: &StorageDaemon, keys: &str, requests: u32) -> Vm {
    let line = first_device("blk").arg("n", requests).arg("op", "verify").arg("timeout", 60);
    let device = format!("blk,socket={},{keys}", disk.socket().display());
    let vm = Launch::payload(&line).arg("--vhost-user").arg(device).start();
    vm.expect("capacity=");
    vm
}

#[test]
fn a_backend_killed_again_and_again_under_a_verified_load_loses_nothing() {
    need!(place::kvm());
    let mut disk = need!(StorageDaemon::start(4 * MIB));
    let kills = if place::soak() { 500 } else { 15 };
    let mut vm = busy(&disk, "reconnect=30", 100_000_000);
    for killed in 1..=kills {
        // The moment varies: in the middle of requests, of a recovery, of the rings' start.
        std::thread::sleep(Duration::from_millis(20 + killed * 37 % 180));
        assert!(vm.is_running(), "the machine has ended after {killed} kills");
        disk.kill();
        disk.restart();
    }
    vm.expect_log("has its backend again");
    // The load has no end of its own: what it found wrong would have ended it.
    let console = vm.console().text();
    assert!(!console.contains("error"), "{console}");
    assert!(vm.is_running());
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP).with_code(143);
    assert!(ended.stats().number("/devices/0/recoveries") > 0, "{ended}");
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0, "{ended}");
}

#[test]
fn a_load_that_survived_its_backend_ends_without_an_error() {
    need!(place::kvm());
    let mut disk = need!(StorageDaemon::start(4 * MIB));
    let vm = busy(&disk, "reconnect=30", 4000);
    disk.kill();
    disk.restart();
    let ended = vm.end(3 * STEP).with_code(0);
    assert_eq!(ended.field("errors"), 0, "{ended}");
    assert_eq!(ended.field("requests"), 4000, "{ended}");
}

#[test]
fn a_backend_that_was_only_stopped_goes_on_and_is_not_replaced() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(4 * MIB));
    let vm = busy(&disk, "reconnect=30,deadline=300", 4000);
    let daemon = Pid::from_raw(disk.pid().try_into().unwrap()).unwrap();
    kill_process(daemon, Signal::STOP).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    kill_process(daemon, Signal::CONT).unwrap();
    let ended = vm.end(3 * STEP).with_code(0);
    assert_eq!(ended.field("errors"), 0, "{ended}");
    // Nothing was asked of it meanwhile, so no deadline passed.
    assert_eq!(ended.stats().number("/devices/0/recoveries"), 0, "{ended}");
}

#[test]
fn a_backend_that_does_not_come_back_in_time_breaks_its_device() {
    need!(place::kvm());
    let mut disk = need!(StorageDaemon::start(4 * MIB));
    let vm = busy(&disk, "reconnect=1", 100_000_000);
    disk.kill();
    let ended = vm.end(STEP).with_code(0);
    assert!(ended.console.contains("needs a reset"), "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "broken", "{ended}");
    assert!(ended.stats().text("/devices/0/broken").contains("within 1 s"), "{ended}");
}

#[test]
fn a_machine_waits_for_a_backend_that_is_started_after_it() {
    need!(place::kvm());
    let mut disk = need!(StorageDaemon::start(4 * MIB));
    disk.kill();
    let device = format!("blk,socket={},reconnect=30", disk.socket().display());
    let line = first_device("blk").arg("n", 10);
    let vm = Launch::payload(&line).arg("--vhost-user").arg(device).start();
    std::thread::sleep(Duration::from_millis(300));
    disk.restart();
    let ended = vm.end(STEP).with_code(0);
    assert_eq!(ended.field("errors"), 0, "{ended}");
}

#[test]
fn a_machine_ends_at_once_while_its_backend_is_looked_for() {
    need!(place::kvm());
    let mut disk = need!(StorageDaemon::start(4 * MIB));
    let vm = busy(&disk, "reconnect=0", 100_000_000);
    disk.kill();
    vm.expect_log("looks for it");
    let begun = std::time::Instant::now();
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP).with_code(143);
    assert!(begun.elapsed() < wait::patience(Duration::from_secs(3)), "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "recovering", "{ended}");
}
