//! Devices that broke without `reconnect=` and have another chance when the machine restarts. Needs KVM's
//! interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::{Duration, Instant};

use outboard_tests::daemon::StorageDaemon;
use outboard_tests::launch::{Launch, STEP, Vm, first_device};
use outboard_tests::{need, place, wait};
use rustix::process::{Pid, Signal, kill_process};

const MIB: usize = 1 << 20;

/// A guest in the middle of its requests that resets the machine when its disk breaks.
fn busy(disk: &StorageDaemon, keys: &str) -> Vm {
    let line =
        first_device("blk").arg("n", 100_000_000).arg("op", "verify").arg("timeout", 60).arg("end", "reset");
    let device = format!("blk,socket={}{keys}", disk.socket().display());
    let vm = Launch::payload(&line).arg("--vhost-user").arg(device).start();
    vm.expect("capacity=");
    vm
}

/// Waits until the console has `count` times what the disk's size is announced with.
fn boots(vm: &Vm, count: usize) {
    wait::until("another boot", STEP, || {
        (vm.console().text().matches("capacity=").count() >= count).then_some(())
    });
}

#[test]
fn a_machine_that_restarts_finds_the_backend_again_that_its_disk_had_lost() {
    need!(place::kvm());
    let mut disk = need!(StorageDaemon::start(4 * MIB));
    let vm = busy(&disk, "");
    for boot in 2..5 {
        disk.kill();
        disk.restart();
        boots(&vm, boot);
    }
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP).with_code(143);
    // Whether it came back in the middle of a request or between two, it did so by a restart.
    assert_eq!(ended.console.matches("needs a reset").count(), 3, "{ended}");
    assert_eq!(ended.stats().number("/devices/0/recoveries"), 3, "{ended}");
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0, "{ended}");
}

#[test]
fn a_machine_restarts_in_bounded_time_whether_its_backend_is_gone_or_stopped() {
    need!(place::kvm());
    let mut disk = need!(StorageDaemon::start(4 * MIB));
    let line =
        first_device("blk").arg("n", 100_000_000).arg("op", "verify").arg("end", "reset").arg("timeout", 60);
    let device = format!("blk,socket={},deadline=1500", disk.socket().display());
    let vm = Launch::payload(&line).arg("--vhost-user").arg(device).start();
    vm.expect("capacity=");
    // Gone: the guest restarts again and again, finding nobody.
    disk.kill();
    wait::until("restarts", STEP, || {
        (vm.console().text().matches("refuses the features").count() >= 3).then_some(())
    });
    disk.restart();
    boots(&vm, 2);
    // Stopped: the connection is there, and nobody answers.
    let daemon = Pid::from_raw(disk.pid().try_into().unwrap()).unwrap();
    kill_process(daemon, Signal::STOP).unwrap();
    let begun = Instant::now();
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP);
    kill_process(daemon, Signal::CONT).unwrap();
    assert!(begun.elapsed() < wait::patience(Duration::from_secs(2)), "{:?}\n{ended}", begun.elapsed());
    assert_eq!(ended.stats().number("/devices/0/recoveries"), 1, "{ended}");
}
