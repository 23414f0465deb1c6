//! QEMU's own devices under the tiny kernel, served by QEMU over vfio-user. Needs KVM's interface only, and
//! that QEMU.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use outboard_tests::launch::{Ended, Launch, STEP};
use outboard_tests::payload::CommandLine;
use outboard_tests::qemu_server::QemuServer;
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};
use rustix::process::Signal;

fn edu() -> Option<QemuServer> {
    QemuServer::start(Scratch::new(), &["-device edu,id=edu"])
}

fn run(server: &QemuServer, steps: &[&str]) -> Ended {
    let line = steps.iter().fold(CommandLine::new("pci"), |line, step| line.arg("step", step));
    Launch::payload(&line).arg("--vfio-user").arg(server.device(0, ",id=edu")).run().with_code(0)
}

/// What the guest printed as `value=`, in order.
fn values(ended: &Ended) -> Vec<u32> {
    let words = ended.console.split_whitespace().filter_map(|word| word.strip_prefix("value="));
    words.map(|word| u32::from_str_radix(word.trim_start_matches("0x"), 16).unwrap()).collect()
}

#[test]
fn a_device_of_qemu_answers_and_reaches_memory() {
    need!(place::kvm());
    let Some(server) = edu() else { return };
    let ended =
        run(&server, &["c:0", "r:0:0", "w:0:4:0x12345678", "r:0:4", "w:0:8:5", "u:0:0x20:0", "r:0:8"]);
    assert_eq!(values(&ended), [0x11e8_1234, 0x0100_00ed, !0x1234_5678, 120], "{ended}");
}

/// Registers of the device: what raises, shows and ends interrupts.
const RAISE: &str = "w:0:0x60";
const END: &str = "w:0:0x64";

#[test]
fn msix_of_a_device_of_qemu_interrupts() {
    need!(place::kvm());
    // The cause `other` leads to vector 0, is enabled and set. Masked, it waits.
    let cause = ["w:0:0xe4:0x80000", "w:0:0xd0:0x1000000", "w:0:0xc8:0x1000000"];
    let live = [&["v:0:0", "x:0x8000"][..], &cause, &["i:1"]].concat();
    let masked = [&["v:0:1", "x:0x8000"][..], &cause, &["r:0:0xc0", "v:0:0", "i:1"]].concat();
    for steps in [live, masked] {
        let Some(server) = QemuServer::start(Scratch::new(), &["-device e1000e,id=net,romfile="]) else {
            return;
        };
        let ended = run(&server, &steps);
        assert_eq!(ended.field("interrupts"), 1, "{ended}");
    }
}

#[test]
fn a_pin_that_stays_asserted_interrupts_again_and_again() {
    need!(place::kvm());
    let Some(server) = edu() else { return };
    // Two causes, of which the handler ends one: QEMU signals the level once.
    let ended = run(&server, &["p:21:0:0x64:1", "w:0:0x60:3", "i:10", "w:0:0x64:2", "r:0:0x24"]);
    assert!(ended.field("interrupts") >= 10, "{ended}");
    assert_eq!(values(&ended), [0], "{ended}");
}

#[test]
fn msi_and_the_pin_of_a_device_of_qemu_interrupt() {
    need!(place::kvm());
    let Some(server) = edu() else { return };
    let [raise, end] = [RAISE, END].map(|what| format!("{what}:1"));
    let ended = run(&server, &["m:1", &raise, "i:1", "r:0:0x24", &end, &raise, "i:2", &end]);
    assert_eq!((ended.field("interrupts"), values(&ended)), (2, vec![1]), "{ended}");
    let Some(server) = edu() else { return };
    let ended = run(&server, &["p:21:0:0x64:1", &raise, "i:1", "r:0:0x24", &raise, "i:2", &raise, "i:3"]);
    // A KVM that tells of the end before the guest has ended it has each found twice.
    assert!((3..=6).contains(&ended.field("interrupts")) && values(&ended) == [0], "{ended}");
}

#[test]
fn a_qemu_that_dies_or_stops_is_all_ones_and_the_machine_goes_on() {
    need!(place::kvm());
    for (signal, why) in [(Signal::KILL, "closed"), (Signal::STOP, "within 1000 ms")] {
        let Some(server) = edu() else { return };
        let line = CommandLine::new("pci")
            .arg("step", "r:0:0")
            .arg("step", "u:0:0x24:0xffffffff")
            .arg("step", "c:0");
        let vm =
            Launch::payload(&line).arg("--vfio-user").arg(server.device(0, ",id=edu,deadline=1000")).start();
        vm.expect("value=0x10000ed");
        server.signal(signal);
        let ended = vm.end(STEP).with_code(0);
        assert_eq!(values(&ended).last(), Some(&u32::MAX), "{ended}");
        assert!(ended.stats().text("/devices/0/broken").contains(why), "{ended}");
    }
}
