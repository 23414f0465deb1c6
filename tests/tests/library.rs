//! The library as a backend author's own test uses it: a `Machine` in this process. Needs KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use outboard_tests::daemon::StorageDaemon;
use outboard_tests::launch::{STEP, first_device};
use outboard_tests::library::{InProcess, tiny_machine};
use outboard_tests::payload::{CommandLine, field};
use outboard_tests::{need, place};
use vmm::config::{Config, Image, OnReset, Socket, VhostUser};
use vmm::{End, Machine};

#[path = "../examples/own_backend.rs"]
mod own_backend;

#[test]
fn the_documented_example_runs() {
    need!(place::kvm());
    own_backend::main().unwrap();
}

#[test]
fn a_machine_made_from_a_configuration_runs_to_its_end() {
    need!(place::kvm());
    let (config, console) = tiny_machine(&CommandLine::new("hello"));
    let outcome = Machine::build(config).unwrap().run().unwrap();
    assert_eq!(outcome.end, End::PowerOff);
    assert_eq!(outcome.stats.boots, 1);
    assert_eq!(String::from_utf8_lossy(&console.lock().unwrap()), "hello from the tiny kernel\n");
}

#[test]
fn a_backend_is_reached_by_a_connected_socket() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(1 << 20));
    let (mut config, console) = tiny_machine(&first_device("blk").arg("n", 2000));
    let stream = UnixStream::connect(disk.socket()).unwrap();
    config.vhost_user.push(VhostUser::new("blk", Socket::Stream(stream)).unwrap());
    let outcome = InProcess::start(config, console.clone()).unwrap().end(STEP).unwrap();
    let console = String::from_utf8_lossy(&console.lock().unwrap()).into_owned();
    assert_eq!((field(&console, "requests"), field(&console, "errors")), (Some(2000), Some(0)), "{console}");
    let device = &outcome.stats.devices[0];
    assert_eq!((device.id.as_str(), device.requests_through_vmm), ("blk0", 0));
    assert!(device.peer.messages > 10 && device.peer.worst_wait_us > 0, "{device:?}");
}

#[test]
fn a_socket_pair_whose_other_end_says_nothing_fails_at_the_deadline() {
    need!(place::kvm());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut config, _console) = tiny_machine(&first_device("blk"));
    let mut device = VhostUser::new("blk", Socket::Stream(ours)).unwrap();
    device.deadline = Duration::from_millis(200);
    config.vhost_user.push(device);
    let error = Machine::build(config).map(|_| ()).unwrap_err();
    drop(theirs);
    let mut text = Vec::new();
    error.report(&mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert_eq!(error.fault().exit_code(), 4);
    assert!(text.starts_with("outboard: cannot start device blk0\n  because: vhost-user backend "), "{text}");
    assert!(text.contains("did not answer GET_FEATURES within 200 ms"), "{text}");
}

#[test]
fn another_thread_ends_a_machine() {
    need!(place::kvm());
    let (config, console) = tiny_machine(&CommandLine::new("hello").arg("end", "hang"));
    let machine = InProcess::start(config, console).unwrap();
    machine.expect("hello");
    machine.quit();
    assert_eq!(machine.end(STEP).unwrap().end, End::Quit);
}

#[test]
fn a_crash_is_an_outcome_and_not_an_error() {
    need!(place::kvm());
    let (config, _console) = tiny_machine(&CommandLine::new("hello").arg("end", "triple"));
    let outcome = Machine::build(config).unwrap().run().unwrap();
    let End::Crash(report) = outcome.end else { panic!("{:?}", outcome.end) };
    assert!(report.starts_with("the guest took a triple fault\nvCPU 0:\n  rip "), "{report}");
}

#[test]
fn a_reset_ends_a_machine_of_the_library_unless_told_otherwise() {
    need!(place::kvm());
    let (config, _console) = tiny_machine(&CommandLine::new("hello").arg("end", "reset"));
    let outcome = Machine::build(config).unwrap().run().unwrap();
    assert_eq!((outcome.end, outcome.stats.boots), (End::Reset, 1));

    let disk = need!(StorageDaemon::start(1 << 20));
    let (mut config, _console) = tiny_machine(&first_device("blk").arg("boots", 5).arg("boots-at", 3));
    config.on_reset = OnReset::Reboot;
    let stream = UnixStream::connect(disk.socket()).unwrap();
    config.vhost_user.push(VhostUser::new("blk", Socket::Stream(stream)).unwrap());
    let outcome = Machine::build(config).unwrap().run().unwrap();
    assert_eq!((outcome.end, outcome.stats.boots), (End::PowerOff, 5));
}

#[test]
fn four_machines_in_one_process_do_not_disturb_each_other() {
    need!(place::kvm());
    let threads: Vec<_> = (0..4)
        .map(|_| {
            thread::spawn(|| {
                for _ in 0..5 {
                    let (config, console) = tiny_machine(&CommandLine::new("hello"));
                    assert_eq!(Machine::build(config).unwrap().run().unwrap().end, End::PowerOff);
                    assert_eq!(console.lock().unwrap().as_slice(), b"hello from the tiny kernel\n");
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn nothing_stays_open_after_a_machine_that_failed_to_start_or_has_run() {
    need!(place::kvm());
    // In a process of its own the count is exact; here the other tests come and go, so the kinds are counted that only
    // machines have.
    let machines = || {
        let open = std::fs::read_dir("/proc/self/fd").unwrap();
        let names = open.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
        names.filter(|name| name.to_string_lossy().contains("kvm-vcpu:77")).count()
    };
    let (mut config, _console) = tiny_machine(&CommandLine::new("cpus").arg("n", 1));
    config.cpus = 78;
    config.memory.size = 64 << 20;
    let machine = Machine::build(config).unwrap();
    assert_eq!(machines(), 1);
    machine.run().unwrap();
    assert_eq!(machines(), 0);
    let mut config = Config::new(Image::Bytes(b"no kernel".as_slice().into()));
    config.cpus = 78;
    assert!(Machine::build(config).is_err());
    assert_eq!(machines(), 0);
}
