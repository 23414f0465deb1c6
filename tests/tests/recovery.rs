//! Backends that die or stop under load, and are found again (`reconnect=`). Needs KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::Duration;

use outboard_tests::daemon::StorageDaemon;
use outboard_tests::launch::{Ended, Launch, STEP, Vm, first_device};
use outboard_tests::{need, place, wait};
use rustix::process::Signal;

const MIB: usize = 1 << 20;

/// Every device of the tiny kernel has so many requests under way.
const DEPTH: u32 = 16;
/// What no test waits for: the load is ended by a key.
const ENDLESS: u32 = 2_000_000_000;
/// Virtio 1.2 §5.2.3: the driver may write `writeback`, which qemu-storage-daemon and vhost-user-blk let it.
const CONFIG_WCE: u32 = 1 << 11;

/// A guest that writes blocks and reads them back, one after the other, until it is told to stop, behind
/// `keys`.
fn busy(disk: &StorageDaemon, keys: &str, requests: u32) -> Vm {
    let line = first_device("blk").arg("n", requests).arg("op", "verify").arg("timeout", 60);
    let vm = Launch::payload(&line).disk_with(&disk.socket(), keys).start();
    vm.expect("capacity=");
    vm
}

/// A guest with many verified requests under way; every `touch` answers it writes the configuration, for
/// which the backend is asked.
fn load(disk: &StorageDaemon, keys: &str, touch: u32) -> Vm {
    let line = first_device("deep").arg("n", ENDLESS).arg("depth", DEPTH).arg("timeout", 100);
    let line = line.arg("accept", CONFIG_WCE).arg("touch", touch);
    let vm = Launch::payload(&line).disk_with(&disk.socket(), keys).start();
    vm.expect("running");
    vm
}

/// Ends such a load: every request that was begun is given back once, and all places hold what was written
/// last.
fn assert_all_well(mut vm: Vm) -> Ended {
    vm.send(b"q");
    let ended = vm.end(3 * STEP).with_code(0);
    assert_eq!(ended.field("errors"), 0, "{ended}");
    assert!(ended.console.contains(" well\n") && ended.field("done") > 0, "{ended}");
    let stats = ended.stats();
    assert_eq!(stats.number("/devices/0/requests_through_vmm"), 0, "{ended}");
    println!(
        "{} requests, {} recoveries, {:?}",
        ended.field("done"),
        stats.number("/devices/0/recoveries"),
        ended.took
    );
    ended
}

fn rounds(short: u64) -> u64 {
    if place::soak() { 500 } else { short }
}

fn kill_again_and_again(mut disk: StorageDaemon) {
    let kills = rounds(15);
    let mut vm = load(&disk, "reconnect=30", 0);
    for killed in 1..=kills {
        // The moment varies: in the middle of requests, of a recovery, of the rings' start.
        std::thread::sleep(Duration::from_millis(20 + killed * 37 % 180));
        assert!(vm.is_running(), "the machine has ended after {killed} kills");
        let before = vm.starts(&disk.socket());
        disk.kill();
        disk.restart();
        // Half of them after a recovery, however slow the machine; the others at any moment of one.
        if killed % 2 == 0 {
            vm.expect_starts(&disk.socket(), before + 1);
        }
    }
    let ended = assert_all_well(vm);
    assert!(ended.stats().number("/devices/0/recoveries") >= kills / 2, "{ended}");
}

#[test]
fn a_backend_killed_again_and_again_under_a_verified_load_loses_nothing() {
    need!(place::kvm());
    kill_again_and_again(need!(StorageDaemon::start(4 * MIB)));
}

#[test]
fn a_backend_with_inflight_killed_again_and_again_under_a_verified_load_loses_nothing() {
    need!(place::kvm());
    let Some(disk) = StorageDaemon::with_notes(4 * MIB) else { return };
    kill_again_and_again(disk);
}

/// Stops it for a second, again and again; nobody asks it for anything.
fn stop_again_and_again(disk: &StorageDaemon) {
    let vm = load(disk, "reconnect=30,deadline=800", 0);
    for _ in 0..rounds(2) {
        disk.signal(Signal::STOP);
        std::thread::sleep(Duration::from_secs(1));
        disk.signal(Signal::CONT);
        std::thread::sleep(Duration::from_millis(50));
    }
    let ended = assert_all_well(vm);
    // No deadline passed, as nothing was asked of it meanwhile.
    assert_eq!(ended.stats().number("/devices/0/recoveries"), 0, "{ended}");
}

#[test]
fn a_backend_stopped_for_a_second_under_a_verified_load_goes_on() {
    need!(place::kvm());
    stop_again_and_again(&need!(StorageDaemon::start(4 * MIB)));
}

#[test]
fn a_backend_with_inflight_stopped_for_a_second_under_a_verified_load_goes_on() {
    need!(place::kvm());
    let Some(disk) = StorageDaemon::with_notes(4 * MIB) else { return };
    stop_again_and_again(&disk);
}

/// Stops it for longer than the deadline while the guest wants something of it, again and again. One that
/// ends when it is hung up on is started anew.
fn hang_again_and_again(mut disk: StorageDaemon) {
    const DEADLINE: Duration = Duration::from_millis(1500);
    let hangs = usize::try_from(rounds(4)).unwrap();
    let vm = load(&disk, "reconnect=30,deadline=1500", 20);
    let (starts, sockets) = (vm.starts(&disk.socket()), vm.sockets());
    for hung in 1..=hangs {
        std::thread::sleep(Duration::from_millis(u64::try_from(hung).unwrap() * 37 % 100));
        let connections = vm.connections(&disk.socket());
        disk.signal(Signal::STOP);
        // The guest's next write to the configuration finds it out. The connection is closed then; the socket
        // of a backend that takes one connection after the other has taken the next one already.
        wait::until("the hang is noticed", STEP, || {
            let next = vm.connections(&disk.socket()) > connections;
            (next || vm.sockets() < sockets).then_some(())
        });
        disk.signal(Signal::CONT);
        // A hang in the middle of a recovery would go by unnoticed.
        wait::until("the device has a backend again", STEP, || {
            disk.look_after();
            (vm.starts(&disk.socket()) >= starts + hung).then_some(())
        });
    }
    let ended = assert_all_well(vm);
    assert!(ended.stats().number("/devices/0/recoveries") >= u64::try_from(hangs).unwrap(), "{ended}");
    // The guest was held up by the deadline, once at a time.
    let longest = Duration::from_micros(ended.stats().number("/vcpus/0/longest_exit_us"));
    assert!(longest >= DEADLINE && longest < 2 * DEADLINE, "{longest:?}\n{ended}");
}

#[test]
fn a_backend_stopped_for_longer_than_its_deadline_is_found_again() {
    need!(place::kvm());
    hang_again_and_again(need!(StorageDaemon::start(4 * MIB)));
}

#[test]
fn a_backend_with_inflight_stopped_for_longer_than_its_deadline_is_found_again() {
    need!(place::kvm());
    let Some(disk) = StorageDaemon::with_notes(4 * MIB) else { return };
    hang_again_and_again(disk);
}

#[test]
fn a_backend_that_was_only_stopped_goes_on_and_is_not_replaced() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(4 * MIB));
    let vm = busy(&disk, "reconnect=30,deadline=800", 4000);
    disk.signal(Signal::STOP);
    std::thread::sleep(Duration::from_secs(1));
    disk.signal(Signal::CONT);
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
    let sockets = vm.sockets();
    disk.kill();
    vm.expect_lost(sockets, 1);
    let begun = std::time::Instant::now();
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP).with_code(143);
    assert!(begun.elapsed() < wait::patience(Duration::from_secs(3)), "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "recovering", "{ended}");
}
