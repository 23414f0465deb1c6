//! The ways in which machine and backend meet, each with a backend that we did not write: we connect, it
//! connects, a descriptor is inherited, the name is abstract, one of the two is late. Needs KVM's interface
//! only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use outboard_tests::backends::Backend;
use outboard_tests::daemon::StorageDaemon;
use outboard_tests::launch::{Ended, Launch, STEP, first_device};
use outboard_tests::proxy::Proxy;
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, payload, place, wait};

const MIB: usize = 1 << 20;

fn load() -> Launch {
    Launch::payload(
        &first_device("blk").arg("n", 100).arg("op", "verify").arg("size", 512).arg("timeout", 30),
    )
}

fn assert_worked(ended: &Ended) {
    assert_eq!((ended.field("requests"), ended.field("errors")), (100, 0), "{ended}");
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0, "{ended}");
}

#[test]
fn a_backend_connects_to_a_machine_that_listens() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(4 * MIB));
    let scratch = Scratch::new();
    let vm = load().disk_with(&scratch.path("here"), "server=on,deadline=20000").start();
    wait::until("the machine listens", STEP, || scratch.path("here").exists().then_some(()));
    let _dialled = Proxy::dialling(&scratch.path("here"), &disk.socket());
    assert_worked(&vm.end(STEP).with_code(0));
    assert!(!scratch.path("here").exists(), "the socket goes with the machine");
}

#[test]
fn a_backend_that_connects_is_lost_and_another_one_connects() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(4 * MIB));
    let scratch = Scratch::new();
    let line = first_device("deep").arg("n", 2_000_000).arg("depth", 8).arg("timeout", 60);
    let launch = Launch::payload(&line).disk_with(&scratch.path("here"), "server=on,reconnect=30");
    let mut vm = launch.start();
    wait::until("the machine listens", STEP, || scratch.path("here").exists().then_some(()));
    let mut dialled = Proxy::dialling(&scratch.path("here"), &disk.socket());
    vm.expect("running");
    for round in 1..=3 {
        std::thread::sleep(Duration::from_millis(100));
        drop(dialled);
        dialled = Proxy::dialling(&scratch.path("here"), &disk.socket());
        vm.expect_starts(&scratch.path("here"), 1 + round);
    }
    vm.send(b"q");
    let ended = vm.end(STEP).with_code(0);
    assert_eq!((ended.field("errors"), ended.stats().number("/devices/0/recoveries")), (0, 3), "{ended}");
}

#[test]
fn a_descriptor_is_inherited() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(4 * MIB));
    let scratch = Scratch::new();
    let console = scratch.path("console");
    // Standard input is what every child inherits; the shell gives it another number.
    let stream = UnixStream::connect(disk.socket()).unwrap();
    let launch = load().on_terminal(stream.into()).arg("--vhost-user").arg("blk,socket=fd=7");
    let launch = launch.arg("--serial").arg(format!("file={}", console.display()));
    let vm = launch.by_shell("exec 7<&0 </dev/null >/dev/null; exec \"$0\" \"$@\"").start();
    let ended = vm.end(STEP).with_code(0);
    let console = fs::read_to_string(console).unwrap();
    assert_eq!(payload::field(&console, "errors"), Some(0), "{console}\n{ended}");
    assert_eq!(payload::field(&console, "requests"), Some(100), "{console}\n{ended}");
}

#[test]
fn a_backend_with_an_abstract_name_is_reached() {
    need!(place::kvm());
    let program = need!(place::storage_daemon());
    let scratch = Scratch::new();
    let image = scratch.file("disk.img", &vec![0; 4 * MIB]);
    let name = format!("outboard-test-{}", std::process::id());
    let arguments = [
        "--blockdev".to_owned(),
        format!("driver=file,node-name=disk,filename={}", image.display()),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={name},addr.abstract=on,writable=on"
        ),
    ];
    let _daemon = Backend::start_only(&program, scratch, "none", &arguments);
    // It has no file to look for: the machine waits until it is there.
    let ended = load().arg("--vhost-user").arg(format!("blk,socket=@{name},reconnect=30")).run().with_code(0);
    assert_worked(&ended);
}

#[test]
fn a_machine_that_listens_waits_for_a_backend_that_is_late() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(4 * MIB));
    let scratch = Scratch::new();
    let vm = load().disk_with(&scratch.path("here"), "server=on,reconnect=30,deadline=800").start();
    // Later than the deadline of a request.
    std::thread::sleep(Duration::from_secs(1));
    let _dialled = Proxy::dialling(&scratch.path("here"), &disk.socket());
    assert_worked(&vm.end(STEP).with_code(0));
}
