//! Backends that change, break, vanish or go silent under a running guest. Needs KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::{Duration, Instant};

use outboard_tests::daemon::{SECTOR, StorageDaemon, is_listening};
use outboard_tests::disk::MemoryDisk;
use outboard_tests::launch::{Launch, STEP, Vm, first_device};
use outboard_tests::proxy::Proxy;
use outboard_tests::{need, place, wait};
use rustix::process::{Pid, Signal, kill_process};

const MIB: usize = 1 << 20;

/// A guest in the middle of its requests.
fn busy(disk: &StorageDaemon) -> Vm {
    let line =
        first_device("blk").arg("n", 100_000_000).arg("op", "verify").arg("size", 512).arg("timeout", 3);
    let vm = Launch::payload(&line).disk(&disk.socket()).start();
    vm.expect("capacity=");
    vm
}

#[test]
fn a_backend_that_dies_breaks_its_device_and_the_guest_hears_of_it() {
    need!(place::kvm());
    let mut disk = need!(StorageDaemon::start(4 * MIB));
    let vm = busy(&disk);
    std::thread::sleep(Duration::from_millis(100));
    disk.kill();
    let begun = Instant::now();
    // The payload waits 3 s for an answer; the broken device tells it earlier.
    let ended = vm.end(STEP).with_code(0);
    assert!(begun.elapsed() < wait::patience(Duration::from_secs(2)), "{:?}\n{ended}", begun.elapsed());
    assert!(ended.console.contains("error: ") && ended.console.contains("needs a reset"), "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "broken");
    assert!(ended.stats().text("/devices/0/broken").contains("closed the connection"), "{ended}");
    assert!(
        ended.log.contains("blk0") && ended.log.contains("closed the connection"),
        "the VMM says it\n{ended}"
    );
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0);
}

#[test]
fn a_dead_backend_does_not_keep_the_machine_from_ending() {
    need!(place::kvm());
    let mut disk = need!(StorageDaemon::start(4 * MIB));
    let line = first_device("blk").arg("end", "hang");
    let vm = Launch::payload(&line).disk(&disk.socket()).start();
    vm.expect("errors=0");
    let sockets = vm.sockets();
    disk.kill();
    vm.expect_lost(sockets, 1);
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP).with_code(143);
    assert_eq!(ended.stats().text("/devices/0/state"), "broken", "{ended}");
}

#[test]
fn a_stopped_backend_delays_no_end_and_its_device_ends_as_it_was() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(4 * MIB));
    let device = format!("blk,socket={},deadline=1500", disk.socket().display());
    let vm = Launch::payload(&first_device("blk").arg("end", "hang")).arg("--vhost-user").arg(device).start();
    vm.expect("errors=0");
    let daemon = Pid::from_raw(disk.pid().try_into().unwrap()).unwrap();
    kill_process(daemon, Signal::STOP).unwrap();
    let begun = Instant::now();
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP);
    let took = begun.elapsed();
    kill_process(daemon, Signal::CONT).unwrap();
    let ended = ended.with_code(143);
    // The exchanges of a machine that ends are cut, which is no fault of the backend.
    assert!(took < wait::patience(Duration::from_secs(1)), "{took:?}\n{ended}");
    assert!(!ended.log.contains("broken"), "{ended}");
    assert_ne!(ended.stats().text("/devices/0/state"), "broken", "{ended}");
}

#[test]
fn of_two_backends_the_death_of_one_leaves_the_other_alone() {
    need!(place::kvm());
    let (first, mut second) = (need!(StorageDaemon::start(4 * MIB)), need!(StorageDaemon::start(4 * MIB)));
    let line = first_device("blk").arg("n", 4000).arg("op", "verify").arg("size", 512).arg("end", "hang");
    let vm = Launch::payload(&line).disk(&first.socket()).disk(&second.socket()).start();
    vm.expect("capacity=");
    let sockets = vm.sockets();
    second.kill();
    let seen = vm.expect("errors=");
    assert!(seen.contains("requests=4000"), "{seen}");
    vm.expect_lost(sockets, 1);
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP).with_code(143);
    assert_eq!(ended.stats().text("/devices/0/state"), "idle");
    assert_eq!(ended.stats().text("/devices/1/state"), "broken");
}

#[test]
fn a_second_machine_at_a_busy_backend_is_told_so() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(4 * MIB));
    let vm = Launch::payload(&first_device("blk").arg("end", "hang")).disk(&disk.socket()).start();
    vm.expect("errors=0");
    let device = format!("blk,socket={},deadline=500", disk.socket().display());
    let second = Launch::payload(&first_device("blk")).arg("--vhost-user").arg(device).run().with_code(4);
    assert!(second.log.contains("hint: is the backend already serving another machine?"), "{second}");
    // The first is none the worse for it.
    vm.signal(Signal::TERM);
    assert_eq!(vm.end(STEP).with_code(143).stats().text("/devices/0/state"), "idle");
}

#[test]
fn a_resized_disk_is_seen_by_the_guest() {
    need!(place::kvm());
    let disk = MemoryDisk::new(4 * MIB);
    let proxy = Proxy::new(&disk.socket());
    let line = first_device("resize").arg("n", 3).arg("timeout", 30);
    let vm = Launch::payload(&line).disk(&proxy.socket()).start();
    vm.expect("capacity=0x2000");
    for size in [8 * MIB, 64 * MIB, MIB] {
        disk.resize(size);
        proxy.change_config();
        vm.expect(&format!("capacity={:#x}", size / SECTOR));
    }
    let ended = vm.end(STEP).with_code(0);
    assert!(!ended.log.contains("warn: "), "{ended}");
}

#[test]
fn another_family_of_backends_serves_as_well() {
    need!(place::kvm());
    let disk = MemoryDisk::new(4 * MIB);
    let line = first_device("blk")
        .arg("n", 2000)
        .arg("op", "verify")
        .arg("size", 512)
        .arg("span", 512)
        .arg("rounds", 5);
    let ended = Launch::payload(&line.arg("timeout", 20)).disk(&disk.socket()).run().with_code(0);
    assert_eq!((ended.field("requests"), ended.field("errors")), (2000, 0), "{ended}");
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0);
    assert_eq!(disk.served(), 2000);
}

#[test]
fn another_family_of_backends_stays_over_reboots() {
    need!(place::kvm());
    let disk = MemoryDisk::new(MIB);
    let line = first_device("blk").arg("n", 5).arg("boots", 10).arg("boots-at", 9).arg("timeout", 20);
    let ended = Launch::payload(&line).disk(&disk.socket()).run().with_code(0);
    assert_eq!((ended.field("boot"), ended.field("errors")), (10, 0), "{ended}");
}

#[test]
fn a_storm_of_configuration_changes_stops_neither_guest_nor_machine() {
    need!(place::kvm());
    let disk = MemoryDisk::new(4 * MIB);
    let proxy = Proxy::new(&disk.socket());
    let line = first_device("deep").arg("n", 2_000_000).arg("depth", 8).arg("timeout", 30);
    let mut vm = Launch::payload(&line).disk(&proxy.socket()).start();
    vm.expect("running");
    // Each with another size, or there would be nothing to tell the guest.
    for n in 0..2000 {
        disk.resize(4 * MIB + n % 2 * SECTOR);
        proxy.change_config();
    }
    // Not before: the guest's work must last as long as the storm.
    vm.send(b"q");
    let ended = vm.end(STEP).with_code(0);
    assert!(ended.field("requests") > 0 && ended.console.contains(" well\n"), "{ended}");
    assert_eq!(ended.field("errors"), 0, "{ended}");
    assert!(ended.field("config-changes") > 0, "{ended}");
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0);
}

#[test]
fn a_running_disk_exchanges_no_messages() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(4 * MIB));
    let messages = |requests: u32| {
        let proxy = Proxy::new(&disk.socket());
        let line = first_device("blk").arg("n", requests).arg("span", 512);
        Launch::payload(&line).disk(&proxy.socket()).run().with_code(0);
        let seen = proxy.seen();
        drop(proxy);
        wait::until("the daemon listens again", STEP, || is_listening(&disk.socket()).then_some(()));
        seen
    };
    let (few, many) = (messages(1), messages(2000));
    assert_eq!(few, many);
    // The order that every known backend takes (PROTOCOLS.md): features, owner, memory, then the ring,
    // enabled last.
    let order: Vec<_> = few.iter().map(|seen| seen.request).collect();
    let place =
        |number: u32| order.iter().position(|seen| *seen == number).unwrap_or_else(|| panic!("no {number}"));
    let (features, owner, memory) = (place(2), place(3), place(5));
    let [size, address, base, kick, call, enable, stop] = [8, 9, 10, 12, 13, 18, 11].map(place);
    assert!(owner < features && features < memory && memory < size, "{order:?}");
    assert!(size < address && address < base && base < call && call < kick && kick < enable, "{order:?}");
    assert!(
        stop > enable + 1,
        "a round trip after the last ENABLE, and the ring stopped at the end: {order:?}"
    );
}

#[test]
fn a_guest_that_abuses_its_device_can_reset_and_use_it() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(4 * MIB));
    for mode in ["abuse", "badring"] {
        let line = first_device(mode).arg("n", 50).arg("op", "verify").arg("size", 512).arg("timeout", 20);
        let ended = Launch::payload(&line).disk(&disk.socket()).run().with_code(0);
        assert_eq!((ended.field("requests"), ended.field("errors")), (50, 0), "{mode}\n{ended}");
        assert!(!ended.console.contains("error: "), "{mode}\n{ended}");
        assert!(!ended.log.contains("panicked"), "{ended}");
        // Logged once per reason, however often it happens.
        assert!(ended.log.lines().count() < 100, "{mode}: {} lines\n{ended}", ended.log.lines().count());
        wait::until("the daemon listens again", STEP, || is_listening(&disk.socket()).then_some(()));
    }
}

#[test]
fn places_without_a_device_read_all_ones() {
    need!(place::kvm());
    let line = outboard_tests::payload::CommandLine::new("poke")
        .arg("at", "port:0x1234")
        .arg("at", "mem:0xc1000000")
        .arg("at", "mem:0xd1000000")
        .arg("at", "port:0x70");
    let ended = Launch::payload(&line).run().with_code(0);
    assert_eq!(ended.console.matches("byte=0xff word=0xffff dword=0xffffffff").count(), 4, "{ended}");
    let stats = ended.stats();
    assert!(stats.number("/unclaimed/reads") >= 12 && stats.number("/unclaimed/writes") >= 12, "{ended}");
}
