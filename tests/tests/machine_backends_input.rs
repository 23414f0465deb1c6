//! Keys by `vhost-device-input`, pressed at a keyboard of uinput. Needs a KVM that runs stock kernels: this
//! host's, or the lab's, with Debian's generic kernel for both (`OUTBOARD_LAB_KERNEL=generic`).

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use outboard_tests::backends::{Backend, SCRIPT, assert_worked, generic_guest, hardware, program};
use outboard_tests::capture::Capture;
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};

const KEYS: u64 = 30;

/// `tests/backends/keyboard.c`.
struct Keyboard {
    child: Child,
    events: String,
}

impl Keyboard {
    fn new(scratch: &Scratch) -> Self {
        let program = scratch.file("keyboard", include_bytes!(concat!(env!("OUT_DIR"), "/keyboard-program")));
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let output = Capture::new(child.stdout.take().unwrap());
        output.find("\n", 0, Duration::from_secs(10)).unwrap();
        Self { child, events: output.text().trim().to_owned() }
    }

    fn types(&mut self, key: u64) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{key}").unwrap();
    }
}

impl Drop for Keyboard {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn vhost_device_input_shows_its_keyboard_and_passes_keys_on() {
    need!(place::kvm());
    let Some(input) = program("vhost-device-input") else { return };
    need!(hardware(fs::metadata("/dev/uinput").ok(), "/dev/uinput"));
    let scratch = Scratch::new();
    let mut keyboard = Keyboard::new(&scratch);
    let arguments = [
        format!("--socket-path={}", scratch.path("input").display()),
        format!("--event-list={}", keyboard.events),
    ];
    // It numbers its sockets.
    let backend = Backend::start(&input, scratch, "input0", &arguments);
    let launch = need!(generic_guest("virtio_input,evdev", &format!("guest keys /dev/input/event0 {KEYS}")));
    let device = format!("input,socket={}", backend.socket().display());
    let vm = launch.arg("--vhost-user").arg(device).start();
    vm.expect("waiting");
    // One after the other: it drops what the guest has no buffers for.
    for key in 1..=KEYS {
        keyboard.types(key);
        vm.expect(&format!("key {key}."));
    }
    let ended = vm.end(SCRIPT);
    assert_worked(&ended);
    assert!(ended.console.contains("name: outboard keyboard, vendor 0x1234, product 0x5678"), "{ended}");
    assert_eq!((ended.field("known"), ended.field("keys")), (200, KEYS), "{ended}");
}
