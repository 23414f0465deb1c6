//! Connections both ways by `vhost-device-vsock`. Needs a KVM that runs stock kernels: this host's, or the
//! lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use outboard_tests::backends::{Backend, SCRIPT, assert_worked, echo, guest, program};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place, wait};

const BLOCK: usize = 4096;
const BLOCKS: usize = 64;

#[test]
fn vhost_device_vsock_carries_echoes_both_ways() {
    need!(place::kvm());
    let Some(vsock) = program("vhost-device-vsock") else { return };
    let scratch = Scratch::new();
    let (socket, host) = (scratch.path("vsock"), scratch.path("host"));
    // What the guest sends to port 1234 of the host goes to this socket.
    let echo = echo(UnixListener::bind(scratch.path("host_1234")).unwrap());
    let arguments = [
        "--guest-cid=3".into(),
        format!("--socket={}", socket.display()),
        format!("--uds-path={}", host.display()),
    ];
    let backend = Backend::start(&vsock, scratch, "vsock", &arguments);
    let script = format!("guest vsock-connect 1234 {BLOCKS} && guest vsock-echo 5000");
    let launch = need!(guest("vmw_vsock_virtio_transport", &script));
    let vm = launch.arg("--vhost-user").arg(format!("vsock,socket={}", backend.socket().display())).start();
    vm.expect("blocks=64");
    assert_eq!(echo.join().unwrap(), (BLOCK * BLOCKS) as u64);

    vm.expect("listening");
    let mut stream = UnixStream::connect(&host).unwrap();
    stream.set_read_timeout(Some(wait::patience(SCRIPT))).unwrap();
    stream.write_all(b"CONNECT 5000\n").unwrap();
    let mut answers = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    answers.read_line(&mut line).unwrap();
    assert!(line.starts_with("OK "), "{line:?}");
    for number in 0..BLOCKS {
        let sent: Vec<u8> = (0..BLOCK).map(|at| u8::try_from((number * 7 + at) % 256).unwrap()).collect();
        stream.write_all(&sent).unwrap();
        let mut back = vec![0; BLOCK];
        answers.read_exact(&mut back).unwrap();
        assert!(sent == back, "block {number}");
    }
    drop((stream, answers));
    let ended = vm.end(SCRIPT);
    assert_worked(&ended);
    assert_eq!(ended.field("echoed"), (BLOCK * BLOCKS) as u64, "{ended}");
}
