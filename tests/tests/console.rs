//! The serial console in all its places, and the terminal as it was afterwards. Needs KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use outboard_tests::launch::{Launch, STEP};
use outboard_tests::payload::CommandLine;
use outboard_tests::pty::Pty;
use outboard_tests::{need, place, wait};
use rustix::process::Signal;

/// The bit of ICANON: line editing, off in raw mode.
const CANONICAL: u32 = 2;

fn echo() -> CommandLine {
    CommandLine::new("echo")
}

#[test]
fn what_is_piped_in_comes_out_again() {
    need!(place::kvm());
    let mut vm = Launch::payload(&echo()).start();
    vm.expect("echo ready\n");
    // More than the port's FIFO and the VMM's buffer hold: nothing may be lost.
    let text: String = (0..400).map(|n| format!("line {n:05}\n")).collect();
    vm.send(text.as_bytes());
    vm.send(b"q");
    let ended = vm.end(STEP).with_code(0);
    assert!(ended.console.contains(&text), "{ended}");
}

#[test]
fn a_key_wakes_a_guest_that_waits_for_it() {
    need!(place::kvm());
    let mut vm = Launch::payload(&echo()).start();
    vm.expect("echo ready\n");
    for key in ["1", "2", "3"] {
        // Time to fall asleep; a guest that is still awake takes the key without an interrupt.
        std::thread::sleep(Duration::from_millis(50));
        vm.send(key.as_bytes());
        vm.expect(key);
    }
    vm.send(b"q");
    let ended = vm.end(STEP).with_code(0);
    assert!(ended.field("interrupts") > 0, "{ended}");
}

#[test]
fn a_guest_goes_on_when_its_input_ends() {
    need!(place::kvm());
    let mut vm = Launch::payload(&echo()).start();
    vm.expect("echo ready\n");
    vm.send(b"abc");
    vm.close_stdin();
    vm.expect("abc");
    assert!(vm.is_running());
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP).with_code(143);
    assert_eq!(ended.stats().text("/end"), "signal");
}

#[test]
fn the_input_of_a_reboot_reaches_the_next_boot() {
    need!(place::kvm());
    let mut vm = Launch::payload(&echo().arg("end", "reset")).start();
    vm.expect("echo ready\n");
    vm.send(b"oneq");
    // What the port's FIFO held at the reset is lost, as on any machine.
    let first = vm.expect("echo interrupts=").len();
    vm.console().find("echo ready\n", first, STEP).unwrap();
    vm.send(b"twoq");
    vm.expect("two");
    vm.signal(Signal::TERM);
    assert!(vm.end(STEP).with_code(143).stats().number("/boots") >= 2);
}

#[test]
fn a_terminal_is_raw_for_the_guest_and_restored_by_ctrl_a_x() {
    need!(place::kvm());
    let mut pty = Pty::new();
    let before = pty.settings();
    assert_ne!(before.local & CANONICAL, 0);
    let vm = Launch::payload(&echo()).on_terminal(pty.terminal()).start();
    pty.screen.find("echo ready", 0, STEP).unwrap();
    assert_eq!(pty.settings().local & CANONICAL, 0, "raw while the guest has it");
    // Ctrl-C is the guest's, and Ctrl-A a types a Ctrl-A.
    pty.press(b"a\x03b\x01ac");
    pty.screen.find("a\x03b\x01c", 0, STEP).unwrap();
    pty.press(b"\x01x");
    let ended = vm.end(STEP).with_code(0);
    assert_eq!(ended.stats().text("/end"), "quit");
    assert_eq!(pty.settings(), before);
}

#[test]
fn a_terminal_is_restored_after_every_other_end() {
    need!(place::kvm());
    let hang = || CommandLine::new("hello").arg("end", "hang");
    for (signal, code) in [(Signal::TERM, 143), (Signal::HUP, 129)] {
        let pty = Pty::new();
        let before = pty.settings();
        let vm = Launch::payload(&hang()).on_terminal(pty.terminal()).start();
        pty.screen.find("hello", 0, STEP).unwrap();
        assert_ne!(pty.settings(), before);
        vm.signal(signal);
        vm.end(STEP).with_code(code);
        assert_eq!(pty.settings(), before, "after {signal:?}");
    }
    for (end, code) in [("off", 0), ("triple", 5)] {
        let pty = Pty::new();
        let before = pty.settings();
        let vm =
            Launch::payload(&CommandLine::new("hello").arg("end", end)).on_terminal(pty.terminal()).start();
        vm.end(STEP).with_code(code);
        assert_eq!(pty.settings(), before, "after end={end}");
    }
}

#[test]
fn a_terminal_is_never_touched_by_a_machine_that_cannot_start() {
    let pty = Pty::new();
    let before = pty.settings();
    let vm = Launch::new(["run", "--kernel", "/nonexistent"]).on_terminal(pty.terminal()).start();
    vm.end(STEP).with_code(2);
    assert_eq!(pty.settings(), before);
}

#[test]
fn the_console_in_a_file_replaces_what_was_there() {
    need!(place::kvm());
    let launch = Launch::payload(&CommandLine::new("hello"));
    let path = launch.scratch().file("console", b"an older and much longer text than the new one");
    let serial = format!("file={}", path.display());
    let ended = launch.arg("--serial").arg(serial).run().with_code(0);
    assert_eq!(ended.console, "", "nothing on standard output");
    assert_eq!(fs::read_to_string(path).unwrap(), "hello from the tiny kernel\n");
}

#[test]
fn the_console_nowhere_is_silent() {
    need!(place::kvm());
    let ended = Launch::payload(&CommandLine::new("hello")).args(["--serial", "null"]).run().with_code(0);
    assert_eq!(ended.console, "");
}

/// A client of the console's socket.
struct Client(UnixStream);

impl Client {
    fn connect(path: &Path) -> Self {
        let stream = wait::until("the console's socket", STEP, || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(wait::patience(Duration::from_secs(10)))).unwrap();
        Self(stream)
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// Reads until `wanted` has come; what came before it may be of an earlier client.
    fn expect(&mut self, wanted: &str) {
        let (mut seen, mut byte) = (Vec::new(), [0]);
        while !seen.ends_with(wanted.as_bytes()) {
            self.0.read_exact(&mut byte).unwrap_or_else(|error| {
                panic!("{wanted:?} did not come: {error}; seen: {}", String::from_utf8_lossy(&seen))
            });
            seen.push(byte[0]);
        }
    }
}

#[test]
fn a_client_that_reads_slowly_gets_every_byte() {
    need!(place::kvm());
    let launch = Launch::payload(&echo());
    let path = launch.scratch().path("console");
    let serial = format!("socket={}", path.display());
    let vm = launch.arg("--serial").arg(serial).start();
    let mut client = Client::connect(&path);
    client.expect("echo ready\n");
    let text: String = (0..2000).map(|n| format!("line {n:05}\n")).collect();
    let mut keyboard = client.0.try_clone().unwrap();
    let typed = text.clone();
    let typist = std::thread::spawn(move || keyboard.write_all(format!("{typed}q").as_bytes()).unwrap());
    let mut got = Vec::new();
    loop {
        std::thread::sleep(Duration::from_millis(20));
        let mut some = [0; 1 << 16];
        match client.0.read(&mut some).unwrap() {
            0 => break,
            length => got.extend_from_slice(&some[..length]),
        }
    }
    typist.join().unwrap();
    let ended = vm.end(STEP).with_code(0);
    assert!(String::from_utf8_lossy(&got).contains(&text), "{} bytes\n{ended}", got.len());
}

#[test]
fn a_late_client_gets_what_was_printed_before_it_came() {
    need!(place::kvm());
    let launch = Launch::payload(&CommandLine::new("hello").arg("end", "hang"));
    let path = launch.scratch().path("console");
    let serial = format!("socket={}", path.display());
    let vm = launch.arg("--serial").arg(serial).start();
    std::thread::sleep(Duration::from_millis(300));
    Client::connect(&path).expect("hello from the tiny kernel\n");
    vm.signal(Signal::TERM);
    let ended = vm.end(STEP).with_code(143);
    assert!(!ended.log.contains("warn"), "nothing was lost\n{ended}");
}

#[test]
fn console_bytes_that_nobody_read_are_told_of() {
    need!(place::kvm());
    let launch = Launch::payload(&CommandLine::new("hello"));
    let serial = format!("socket={}", launch.scratch().path("console").display());
    let ended = launch.arg("--serial").arg(serial).run().with_code(0);
    assert!(ended.log.contains("the last 27 bytes of the console"), "{ended}");
}

#[test]
fn the_sockets_path_is_removed_while_it_is_ours_and_replaced_when_it_is_stale() {
    need!(place::kvm());
    let scratch = outboard_tests::scratch::Scratch::new();
    let path = scratch.path("console");
    let start = || {
        let launch = Launch::payload(&CommandLine::new("hello").arg("end", "hang"));
        let vm = launch.arg("--serial").arg(format!("socket={}", path.display())).start();
        wait::until("the console's socket", STEP, || UnixStream::connect(&path).ok());
        vm
    };
    let vm = start();
    fs::rename(&path, scratch.path("moved")).unwrap();
    fs::write(&path, "precious").unwrap();
    vm.signal(Signal::TERM);
    vm.end(STEP).with_code(143);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    fs::remove_file(&path).unwrap();

    start().signal(Signal::KILL);
    assert!(path.exists(), "whoever is killed leaves its socket");
    start();
}

#[test]
fn the_console_in_a_file_survives_its_rotation() {
    need!(place::kvm());
    // A line a boot.
    let launch = Launch::payload(&CommandLine::new("hello").arg("end", "reset"));
    let (path, moved) = (launch.scratch().path("console"), launch.scratch().path("console.1"));
    let vm = launch.arg("--serial").arg(format!("file={}", path.display())).start();
    let grows = |path: &Path| {
        wait::until("a line", STEP, || fs::read_to_string(path).ok().filter(|text| text.ends_with('\n')))
    };
    grows(&path);
    fs::rename(&path, &moved).unwrap();
    grows(&path);
    // As `copytruncate` does it.
    fs::OpenOptions::new().write(true).truncate(true).open(&path).unwrap();
    grows(&path);
    vm.signal(Signal::TERM);
    let _folder = vm.end(STEP).with_code(143);
    for path in [moved, path] {
        let text = fs::read_to_string(path).unwrap();
        assert_eq!(
            text.replace("hello from the tiny kernel\n", ""),
            "",
            "lines are whole, and there is no hole"
        );
    }
}

#[test]
fn a_stream_that_nobody_reads_does_not_keep_a_machine_from_ending() {
    need!(place::kvm());
    let image = outboard_tests::scratch::Scratch::new();
    let kernel = outboard_tests::payload::write_tiny_kernel(image.folder()).unwrap();
    for (stream, arguments) in
        [(">", "--memory 64M"), ("2>", "-vvv --trace -"), (">", "--stats - --serial null")]
    {
        let launch = Launch::new(["run", "--cmdline", "mode=echo", "--kernel"]).arg(&kernel);
        let fifo = launch.scratch().path("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        // Full, and open for reading, but nobody reads.
        let mut full = fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
        full.write_all(&[0; 1 << 16]).unwrap();
        let launch = launch.by_shell(&format!("exec \"$0\" \"$@\" {stream}'{}'", fifo.display()));
        let mut vm = launch.args(arguments.split(' ')).start();
        vm.send(&b"0123456789abcdef".repeat(100));
        std::thread::sleep(Duration::from_millis(500));
        vm.signal(Signal::TERM);
        let ended = vm.end(Duration::from_secs(5));
        // Statistics that nobody read are an error.
        let code = if arguments.contains("--stats") { 1 } else { 143 };
        assert_eq!(ended.code, Some(code), "{stream} {arguments}\n{ended}");
    }
}

#[test]
fn a_terminal_is_raw_again_after_a_stop_and_cooked_during_it() {
    need!(place::kvm());
    let mut pty = Pty::new();
    let before = pty.settings();
    let vm = Launch::payload(&echo()).on_terminal(pty.terminal()).start();
    pty.screen.find("echo ready", 0, STEP).unwrap();
    let raw = pty.settings();
    for stop in [Signal::TSTP, Signal::STOP] {
        vm.signal(stop);
        let status = format!("/proc/{}/status", vm.pid());
        let stopped = || fs::read_to_string(&status).unwrap().contains("State:\tT").then_some(());
        wait::until("the process is stopped", STEP, stopped);
        if stop == Signal::TSTP {
            assert_eq!(pty.settings(), before);
        } else {
            // As a shell does it.
            pty.set(&before);
        }
        vm.signal(Signal::CONT);
        wait::until("a raw terminal", STEP, || (pty.settings() == raw).then_some(()));
        pty.press(b"again");
    }
    pty.screen.find("againagain", 0, STEP).unwrap();
    vm.signal(Signal::TERM);
    vm.end(STEP).with_code(143);
    assert_eq!(pty.settings(), before);
}

#[test]
fn the_console_on_a_socket_takes_one_client_after_the_other() {
    need!(place::kvm());
    let launch = Launch::payload(&echo());
    let path = launch.scratch().path("console");
    let serial = format!("socket={}", path.display());
    let vm = launch.arg("--serial").arg(serial).start();
    let mut first = Client::connect(&path);
    first.send(b"ping");
    first.expect("ping");
    // The second waits for its turn, and has it when the first has gone.
    let mut second = Client::connect(&path);
    second.send(b"pong");
    first.send(b"once more");
    first.expect("once more");
    drop(first);
    second.expect("pong");
    for _ in 0..20 {
        drop(second);
        second = Client::connect(&path);
        second.send(b"hello");
        second.expect("hello");
    }
    second.send(b"q");
    let ended = vm.end(STEP).with_code(0);
    assert!(!path.exists(), "the socket is removed\n{ended}");
    assert_eq!(ended.files.names(), ["stats.json", "trace"]);
}

#[test]
fn a_client_of_the_console_stays_over_a_reboot() {
    need!(place::kvm());
    let launch = Launch::payload(&echo().arg("end", "reset"));
    let path = launch.scratch().path("console");
    let serial = format!("socket={}", path.display());
    let vm = launch.arg("--serial").arg(serial).start();
    let mut client = Client::connect(&path);
    for word in ["one", "two", "three"] {
        client.send(word.as_bytes());
        client.expect(word);
        client.send(b"q");
        client.expect("echo ready\n");
    }
    vm.signal(Signal::TERM);
    assert_eq!(vm.end(STEP).with_code(143).stats().number("/boots"), 4);
}

#[test]
fn statistics_on_standard_output_follow_the_console() {
    need!(place::kvm());
    let line = CommandLine::new("hello");
    let ended = Launch::payload(&line).args(["--serial", "null"]).run().with_code(0);
    assert_eq!(ended.stats().text("/end"), "power-off");
    let image = outboard_tests::scratch::Scratch::new();
    let kernel = outboard_tests::payload::write_tiny_kernel(image.folder()).unwrap();
    let ended = Launch::new(["run", "--stats", "-", "--kernel"]).arg(kernel).run().with_code(0);
    let (console, json) = ended.console.split_once('{').unwrap();
    assert_eq!(console, "hello from the tiny kernel\n");
    let stats = outboard_tests::stats::Stats::parse(&format!("{{{json}"));
    assert_eq!(stats.number("/boots"), 1);
}
