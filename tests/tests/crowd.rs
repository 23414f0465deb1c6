//! One machine with many devices: 16 disks that one process serves, each busy, each with its own fate. Needs
//! KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::Duration;

use outboard_tests::daemon::{SECTOR, StorageDaemon};
use outboard_tests::launch::{Ended, Launch, STEP, first_devices};
use outboard_tests::payload::CommandLine;
use outboard_tests::proxy::Proxy;
use outboard_tests::{need, place, wait};
use rustix::process::Signal;
use vmm::config::DEFAULT_DEADLINE;

const DISKS: usize = 16;

/// Disk n has 1024 + n sectors.
fn disks() -> Result<StorageDaemon, place::Missing> {
    let images: Vec<_> = (0..DISKS).map(|n| vec![0; (1024 + n) * SECTOR]).collect();
    StorageDaemon::serving_all(&images)
}

fn line(requests: u32) -> CommandLine {
    first_devices("deep", DISKS).arg("depth", 4).arg("n", requests).arg("timeout", 60)
}

fn assert_out_of_the_vmms_way(ended: &Ended) {
    for n in 0..DISKS {
        assert_eq!(ended.stats().number(&format!("/devices/{n}/requests_through_vmm")), 0, "{ended}");
    }
}

#[test]
fn sixteen_disks_of_one_process_are_busy_at_once() {
    need!(place::kvm());
    let daemon = need!(disks());
    let launch = Launch::payload(&line(60));
    let launch = (0..DISKS).fold(launch, |launch, n| launch.disk(&daemon.socket_of(n)));
    // What a shell gives is not enough for everybody; what it may give is.
    let launch = launch.by_shell(r#"ulimit -Sn 32; exec "$0" "$@""#);
    let ended = launch.start().end(2 * STEP).with_code(0);
    for n in 0..DISKS {
        assert!(ended.console.contains(&format!("signature={} ", 1024 + n)), "disk {n}\n{ended}");
        assert!(ended.console.contains(&format!("device={n} done=60 well\n")), "disk {n}\n{ended}");
    }
    assert_eq!((ended.field("requests"), ended.field("errors")), (16 * 60, 0), "{ended}");
    assert_out_of_the_vmms_way(&ended);
}

#[test]
fn the_loss_of_one_of_sixteen_disks_stalls_none_of_the_others() {
    const LOST: usize = 5;
    need!(place::kvm());
    let daemon = need!(disks());
    // One connection goes by a proxy, so that it can be cut while the process lives on.
    let proxy = Proxy::new(&daemon.socket_of(LOST));
    let launch = Launch::payload(&line(2_000_000));
    let launch = (0..DISKS)
        .fold(launch, |launch, n| launch.disk(&if n == LOST { proxy.socket() } else { daemon.socket_of(n) }));
    let mut vm = launch.start();
    vm.expect("running");
    drop(proxy);
    vm.expect("fault: the device needs a reset");
    vm.send(b"q");
    let ended = vm.end(STEP).with_code(0);
    for n in 0..DISKS {
        let fate = if n == LOST { " fault: the device needs a reset\n" } else { " well\n" };
        let found = ended.console.lines().find(|line| line.starts_with(&format!("device={n} "))).unwrap();
        assert!(format!("{found}\n").ends_with(fate), "{found}\n{ended}");
    }
    assert_out_of_the_vmms_way(&ended);
    // Nobody waited for anybody.
    let longest = Duration::from_micros(ended.stats().number("/vcpus/0/longest_exit_us"));
    assert!(longest < DEFAULT_DEADLINE, "{longest:?}\n{ended}");
}

#[test]
fn a_process_that_serves_sixteen_disks_is_killed_and_all_come_back() {
    need!(place::kvm());
    let mut daemon = need!(disks());
    let launch = Launch::payload(&line(2_000_000));
    let launch = (0..DISKS).fold(launch, |launch, n| launch.disk_with(&daemon.socket_of(n), "reconnect=30"));
    let mut vm = launch.start();
    vm.expect("running");
    let kills = if place::soak() { 50 } else { 3 };
    for killed in 1..=kills {
        std::thread::sleep(Duration::from_millis(100));
        daemon.kill();
        daemon.restart();
        (0..DISKS).for_each(|n| vm.expect_starts(&daemon.socket_of(n), 1 + killed));
    }
    vm.send(b"q");
    let ended = vm.end(2 * STEP).with_code(0);
    assert_eq!(ended.field("errors"), 0, "{ended}");
    for n in 0..DISKS {
        let recoveries = ended.stats().number(&format!("/devices/{n}/recoveries"));
        assert_eq!(recoveries, u64::try_from(kills).unwrap(), "disk {n}\n{ended}");
    }
    assert_out_of_the_vmms_way(&ended);
}

#[test]
fn a_hung_process_of_sixteen_disks_delays_the_end_by_one_deadline_not_by_sixteen() {
    const DEADLINE: Duration = Duration::from_secs(2);
    need!(place::kvm());
    let daemon = need!(disks());
    let line = first_devices("deep", DISKS).arg("depth", 1).arg("n", 2).arg("end", "hang");
    let launch = Launch::payload(&line);
    let launch = (0..DISKS).fold(launch, |launch, n| launch.disk_with(&daemon.socket_of(n), "deadline=2000"));
    let vm = launch.start();
    vm.expect("errors=0");
    daemon.signal(Signal::STOP);
    let begun = std::time::Instant::now();
    vm.signal(Signal::TERM);
    let ended = vm.end(3 * STEP).with_code(143);
    let took = begun.elapsed();
    daemon.signal(Signal::CONT);
    println!("16 hung disks: the end took {took:?}");
    assert!(took < 2 * DEADLINE + wait::patience(Duration::from_secs(1)), "{took:?}\n{ended}");
}
