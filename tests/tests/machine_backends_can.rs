//! A CAN bus by `vhost-device-can`, on a virtual interface. No stock kernel of today has a driver, so the
//! tiny kernel sends a frame. Needs the generic kernel in the lab (`OUTBOARD_LAB_KERNEL=generic`).

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::process::Command;

use outboard_tests::backends::{Backend, SCRIPT, hardware, program};
use outboard_tests::launch::{Launch, first_device};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};

#[test]
fn vhost_device_can_sends_a_frame() {
    need!(place::kvm());
    let Some(can) = program("vhost-device-can") else { return };
    let made = place::in_lab()
        && Command::new("sh")
            .args(["-c", "ip link add vcan0 type vcan && ip link set vcan0 up"])
            .status()
            .unwrap()
            .success();
    need!(hardware(made.then_some(()), "vcan"));
    let scratch = Scratch::new();
    let arguments =
        [format!("--socket-path={}", scratch.path("can").display()), "--can-devices=vcan0".into()];
    // It numbers its sockets.
    let backend = Backend::start(&can, scratch, "can0", &arguments);
    // On the control queue SET_CTRL_MODE_START; then TX of four bytes by station 0x123, as CAN_CLASSIC (bit
    // 0) has it.
    let line = first_device("ask").arg("queues", 3).arg("accept", 1).arg("answer", 1);
    let line = line.arg("request", "2:0102").arg("request", "0:01000400000000000000000023010000deadbeef");
    let device = format!("can,socket={}", backend.socket().display());
    let ended = Launch::payload(&line).arg("--vhost-user").arg(device).start().end(SCRIPT);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_eq!(
        (ended.field("device"), ended.field("requests"), ended.field("errors")),
        (36, 2, 0),
        "{ended}"
    );
    assert_eq!(ended.console.matches("answer 00").count(), 2, "both said OK\n{ended}");
    let sent = fs::read_to_string("/sys/class/net/vcan0/statistics/tx_packets").unwrap();
    assert_eq!(sent.trim(), "1", "{ended}");
}
