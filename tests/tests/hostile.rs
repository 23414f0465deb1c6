//! A running machine whose scripted backend does what none should: interrupts without end, and configuration
//! changes without end. The guest's other disk goes on. Needs KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use outboard_tests::daemon::StorageDaemon;
use outboard_tests::launch::{Ended, Launch, STEP, Vm, first_device, first_devices};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place, wait};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::Signal;
use transport::testing::{Act, Offer, Script, ScriptedBackend};
use transport::vhost_user::request::BackendRequest;
use transport::vhost_user::request::Request;

const MIB: usize = 1 << 20;

/// A machine with an honest disk under load, and a scripted one that answers no request of the guest.
fn machine(disk: &StorageDaemon, scratch: &Scratch) -> (ScriptedBackend, Vm) {
    let socket = scratch.path("scripted");
    let backend = ScriptedBackend::listen(&socket, Offer::default(), Script::normal()).unwrap();
    let line = first_devices("deep", 2).arg("n", 2_000_000).arg("depth", 8).arg("timeout", 600);
    let vm = Launch::payload(&line).disk(&disk.socket()).disk(&socket).start();
    vm.expect("running");
    wait::until("the scripted rings run", STEP, || {
        (backend.with_ring(0, |ring| ring.is_started()) == Some(true)).then_some(())
    });
    (backend, vm)
}

/// Ends the load: the honest disk has done its work, and all of it well.
fn assert_the_other_disk_is_well(vm: Vm) -> Ended {
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP).with_code(143);
    assert!(!ended.console.contains("fault"), "{ended}");
    assert!(!ended.log.contains("panicked"), "{ended}");
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0, "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
    ended
}

/// What the machine takes of the host's memory, in KiB.
fn resident(vm: &Vm) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn descriptors(vm: &Vm) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().count()
}

#[test]
fn a_storm_of_interrupts_stops_neither_the_guest_nor_the_machine() {
    need!(place::kvm());
    let (disk, scratch) = (need!(StorageDaemon::start(4 * MIB)), Scratch::new());
    let (backend, vm) = machine(&disk, &scratch);
    let (end, rung) = (AtomicBool::new(false), AtomicU64::new(0));
    let written = disk.contents();
    let before = (resident(&vm), descriptors(&vm));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                for _ in 0..1000 {
                    backend.with_ring(0, |ring| ring.ring_call().unwrap_or_default());
                }
                rung.fetch_add(1000, Ordering::Relaxed);
            }
        });
        std::thread::sleep(Duration::from_secs(2));
        end.store(true, Ordering::Relaxed);
    });
    println!("{} interrupts in 2 s", rung.load(Ordering::Relaxed));
    assert!(disk.contents() != written, "the guest went on meanwhile");
    let after = (resident(&vm), descriptors(&vm));
    assert!(after.0 < before.0 + 4096 && after.1 == before.1, "{before:?} before, {after:?} after");
    assert_the_other_disk_is_well(vm);
}

/// Makes it wait: for whoever holds another descriptor of it, too.
fn block(eventfd: &OwnedFd) {
    fcntl_setfl(eventfd, OFlags::RDWR).unwrap();
}

fn saturate(eventfd: &OwnedFd) {
    fcntl_setfl(eventfd, OFlags::RDWR | OFlags::NONBLOCK).unwrap();
    while rustix::io::read(eventfd, &mut [0; 8]).is_ok() {}
    // The guest may have rung it in between.
    rustix::io::write(eventfd, &(u64::MAX - 1).to_ne_bytes()).unwrap_or_default();
}

#[test]
fn stolen_and_saturated_eventfds_stop_neither_the_guest_nor_the_machine() {
    need!(place::kvm());
    for steals in [true, false] {
        let (disk, scratch) = (need!(StorageDaemon::start(4 * MIB)), Scratch::new());
        let (backend, vm) = machine(&disk, &scratch);
        let (kick, call) = (backend.kick(0).unwrap(), backend.call(0).unwrap());
        let (end, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
        let written = disk.contents();
        let before = (resident(&vm), descriptors(&vm));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    for eventfd in [&kick, &call] {
                        if steals {
                            rustix::io::read(eventfd, &mut [0; 8]).unwrap_or_default();
                        } else {
                            saturate(eventfd);
                        }
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
            std::thread::sleep(Duration::from_secs(1));
            end.store(true, Ordering::Relaxed);
        });
        println!("{} rounds in 1 s", rounds.load(Ordering::Relaxed));
        assert!(disk.contents() != written, "the guest went on meanwhile");
        let after = (resident(&vm), descriptors(&vm));
        assert!(after.0 < before.0 + 4096 && after.1 == before.1, "{before:?} before, {after:?} after");
        saturate(&kick);
        saturate(&call);
        [&kick, &call].into_iter().for_each(block);
        let ended = assert_the_other_disk_is_well(vm);
        assert_eq!(ended.stats().text("/devices/1/state"), "idle", "{ended}");
    }
}

#[test]
fn eventfds_that_a_backend_made_blocking_hold_up_no_reset_and_no_start() {
    need!(place::kvm());
    let scratch = Scratch::new();
    let socket = scratch.path("scripted");
    let backend = ScriptedBackend::listen(&socket, Offer::default(), Script::normal()).unwrap();
    let mut vm = Launch::payload(&first_devices("drive", 1).arg("depth", 1)).disk(&socket).start();
    vm.expect("ready");
    vm.send(b"s");
    vm.expect("key s status=0xf");
    for round in 0..3 {
        for eventfd in [backend.kick(0).unwrap(), backend.call(0).unwrap()] {
            saturate(&eventfd);
            block(&eventfd);
        }
        let begun = Instant::now();
        // Every start rings the kick.
        vm.send(b"krsk");
        vm.expect(
            "key k status=0xf done\nkey r status=0x0 done\nkey s status=0xf done\nkey k status=0xf done\n",
        );
        assert!(
            begun.elapsed() < wait::patience(Duration::from_secs(2)),
            "round {round}: {:?}",
            begun.elapsed()
        );
    }
    vm.send(b"q");
    let ended = vm.end(STEP).with_code(0);
    assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
    assert!(backend.breaches().is_empty(), "{:?}", backend.breaches());
}

#[test]
fn a_storm_of_configuration_changes_and_nonsense_stops_neither_the_guest_nor_the_machine() {
    need!(place::kvm());
    let (disk, scratch) = (need!(StorageDaemon::start(4 * MIB)), Scratch::new());
    let (backend, vm) = machine(&disk, &scratch);
    let before = (resident(&vm), descriptors(&vm));
    for round in 0..3000_u64 {
        // Each with another configuration, or there would be nothing to tell.
        backend.set_config(vec![u8::try_from(round % 256).unwrap(); 60]);
        for request in [BackendRequest::CONFIG_CHANGE_MSG, BackendRequest(4711), BackendRequest::IOTLB_MSG] {
            backend.request(request, &[], &[]).unwrap();
            let answered = backend.answer(wait::patience(Duration::from_secs(5))).unwrap();
            assert_eq!(answered.0 == 0, request == BackendRequest::CONFIG_CHANGE_MSG, "{request}");
        }
    }
    let after = (resident(&vm), descriptors(&vm));
    assert!(after.0 < before.0 + 4096 && after.1 == before.1, "{before:?} before, {after:?} after");
    let ended = assert_the_other_disk_is_well(vm);
    assert_eq!(ended.stats().text("/devices/1/state"), "idle", "{ended}");
    assert!(ended.log.lines().count() < 100, "logged once per reason\n{ended}");
}

#[test]
fn a_driver_that_resets_while_a_hung_backend_takes_over_is_not_left_alone() {
    const DEADLINE: Duration = Duration::from_secs(3);
    need!(place::kvm());
    let scratch = Scratch::new();
    let socket = scratch.path("scripted");
    let listen = |script: Script| ScriptedBackend::listen(&socket, Offer::default(), script).unwrap();
    let first = listen(Script::normal());
    let line = first_devices("drive", 1).arg("depth", 1);
    let mut vm = Launch::payload(&line).disk_with(&socket, "reconnect=0,deadline=3000").start();
    vm.expect("ready");
    vm.send(b"s");
    vm.expect("key s status=0xf");
    drop(first);
    // The next one answers until the rings are to start.
    let hung = listen(Script::normal().on(Request::SET_VRING_NUM, Act::Silent));
    wait::until("the rings are to start", STEP, || {
        hung.conversation().iter().any(|request| request == "SET_VRING_NUM").then_some(())
    });
    let begun = Instant::now();
    vm.send(b"r");
    vm.expect("key r status=0x0");
    assert!(begun.elapsed() < 2 * DEADLINE, "{:?}", begun.elapsed());
    drop(hung);
    let third = listen(Script::normal());
    wait::until("the third backend is asked for its features", STEP, || {
        third.conversation().iter().any(|request| request == "SET_OWNER").then_some(())
    });
    vm.send(b"s");
    vm.expect("key s status=0xf done\nkey r status=0x0 done\nkey s status=0xf");
    vm.send(b"q");
    let ended = vm.end(STEP).with_code(0);
    assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
}

#[test]
fn a_backend_stopped_or_killed_at_any_moment_of_a_life_delays_its_end_by_no_more_than_its_deadlines() {
    need!(place::kvm());
    let rounds = if place::soak() { 60 } else { 8 };
    for round in 0..rounds {
        let mut disk = need!(StorageDaemon::start(MIB));
        // Some requests, resets in between, and the end: the guest itself gives up after a second or two.
        let line = first_device("blk").arg("n", 5).arg("rounds", 20).arg("size", 512).arg("timeout", 1);
        let vm = Launch::payload(&line).disk_with(&disk.socket(), "deadline=300").start();
        // From before the connection to after the last request.
        std::thread::sleep(Duration::from_millis(round * 97 % 60));
        let killed = round % 2 == 1;
        if killed {
            disk.kill();
        } else {
            disk.signal(Signal::STOP);
        }
        let ended = vm.end(STEP);
        if !killed {
            disk.signal(Signal::CONT);
        }
        assert!(matches!(ended.code, Some(0 | 4)), "round {round}\n{ended}");
        assert!(!ended.log.contains("panicked"), "round {round}\n{ended}");
        assert!(ended.took < wait::patience(Duration::from_secs(4)), "round {round}\n{ended}");
    }
}
