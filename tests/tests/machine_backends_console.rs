//! A console by `vhost-device-console`, its other end on a TCP port. Needs a KVM that runs stock kernels:
//! this host's, or the lab's.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use outboard_tests::backends::{Backend, SCRIPT, assert_worked, guest, program};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place, wait};

const PORT: u16 = 23_456;

#[test]
fn vhost_device_console_carries_a_key_in_and_lines_out() {
    need!(place::kvm());
    let Some(console) = program("vhost-device-console") else { return };
    let scratch = Scratch::new();
    let arguments = [
        format!("--socket-path={}", scratch.path("console").display()),
        "--backend=network".into(),
        format!("--tcp-port={PORT}"),
    ];
    // It numbers its sockets.
    let backend = Backend::start(&console, scratch, "console0", &arguments);
    let script = "exec 3<>/dev/hvc0 && stty raw -echo <&3 || exit 1\n\
                  echo ready >&3\n\
                  dd bs=1 count=1 <&3 >&3 2>/dev/null || exit 2\n\
                  for n in $(seq 200); do echo line $n >&3; done; read line";
    let launch = need!(guest("virtio_console", script));
    let device = format!("console,socket={}", backend.socket().display());
    let mut vm = launch.arg("--vhost-user").arg(device).start();
    // Its port opens with the device.
    let mut stream = wait::until("the console's port opens", Duration::from_secs(30), || {
        TcpStream::connect(("127.0.0.1", PORT)).ok()
    });
    stream.set_read_timeout(Some(wait::patience(SCRIPT))).unwrap();
    let mut answers = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    // It drops what comes before the guest's first words.
    answers.read_line(&mut line).unwrap();
    assert_eq!(line.trim_end(), "ready");
    // One key: this version takes all buffers of the guest for the first input, gives one back, and loses the
    // others; of two bytes at once it makes three (a used entry for each byte, with all bytes so far).
    stream.write_all(b"k").unwrap();
    let mut back = [0];
    answers.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"k");
    for number in 1..=200 {
        line.clear();
        answers.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), format!("line {number}"));
    }
    // Not before all lines are here: it drops what it still holds when the machine ends.
    vm.send(b"\n");
    let ended = vm.end(SCRIPT);
    assert_worked(&ended);
}
