//! The library as the author of a backend uses it, by the test kit: a machine in the process of the test.
//! Needs KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use outboard_testkit::kernel::{Ask, Blk, CommandLine, Ending, Operation};
use outboard_testkit::machine::{TestMachine, device};
use outboard_tests::daemon::StorageDaemon;
use outboard_tests::disk::MemoryDisk;
use outboard_tests::place::Missing;
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};
use rustix::process::Signal;
use vmm::config::{Config, Image, Serial, Socket, Transport};
use vmm::{End, Event, Machine};

/// Somebody's crate: a workspace of its own, outside of this one, with the example of the kit's documentation
/// as its test. It shares the folder of builds, the lock file and the profiles, so that little is built
/// again.
#[test]
fn the_documented_test_of_a_backend_passes_in_a_workspace_of_its_own() {
    need!(place::kvm());
    let Some(cargo) = std::env::var_os("CARGO") else {
        return Missing::skipped(
            "a workspace of its own",
            "no cargo here: the test was not started by cargo",
        );
    };
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let outside = Scratch::new();
    fs::create_dir_all(outside.path("tests")).unwrap();
    fs::create_dir_all(outside.path("src")).unwrap();
    let _library = outside.file("src/lib.rs", b"");
    fs::copy(root.join("tests/kit/example/own_backend.rs"), outside.path("tests/own_backend.rs")).unwrap();
    fs::copy(root.join("Cargo.lock"), outside.path("Cargo.lock")).unwrap();
    let profiles = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let profiles = profiles.split("\n[").filter(|table| table.starts_with("profile.dev"));
    let profiles = profiles.filter(|table| !table.contains("outboard-servers"));
    let profiles: String = profiles.map(|table| format!("[{table}\n")).collect();
    let ours = ["transport", "devices", "arch", "vmm", "outboard-testkit"];
    // For the outside workspace these are packages of others.
    let ours: String = ours
        .iter()
        .map(|name| format!("[profile.dev.package.{name}]\nopt-level = 0\ndebug = \"line-tables-only\"\n"))
        .collect();
    let manifest = format!(
        r#"[package]
name = "somebodys-backend"
version = "0.1.0"
edition = "2024"

[workspace]

[dev-dependencies]
outboard-testkit = {{ path = "{}/tests/kit" }}
vhost = {{ version = "0.18", features = ["vhost-user-backend"] }}
vhost-user-backend = "0.24"
virtio-queue = "0.18"
vm-memory = {{ version = "0.18", features = ["backend-mmap", "backend-atomic"] }}
vmm-sys-util = "0.15"

{profiles}{ours}"#,
        fs::canonicalize(root).unwrap().display()
    );
    let _manifest = outside.file("Cargo.toml", manifest.as_bytes());
    let test = std::env::current_exe().unwrap();
    let target = test.ancestors().nth(3).expect("a test lies in target/PROFILE/deps");
    let done = Command::new(cargo)
        .args(["test", "--offline", "--test", "own_backend"])
        .current_dir(outside.folder())
        .env("CARGO_TARGET_DIR", target)
        .env_remove("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER")
        .output()
        .unwrap();
    let (said, log) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success() && said.contains("test result: ok. 1 passed"), "{said}\n{log}");
}

#[test]
fn a_machine_made_from_a_configuration_runs_to_its_end() {
    need!(place::kvm());
    let ended = TestMachine::boot(CommandLine::hello()).run();
    assert_eq!(ended.outcome.end, End::PowerOff);
    assert_eq!(ended.outcome.stats.boots, 1);
    assert_eq!(ended.console, "hello from the tiny kernel\n");
}

#[test]
fn a_backend_is_reached_by_a_connected_socket() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(1 << 20));
    let stream = UnixStream::connect(disk.socket()).unwrap();
    let line = CommandLine::blk(Blk { requests: 2000, ..Blk::default() });
    let ended = TestMachine::boot(line).device(device("blk", Socket::Stream(stream))).run();
    assert_eq!((ended.number("requests"), ended.number("errors")), (2000, 0), "{ended}");
    let device = &ended.outcome.stats.devices[0];
    assert_eq!((device.id.as_str(), device.requests_through_vmm), ("blk0", 0));
    assert!(device.peer.messages > 10 && device.peer.worst_wait_us > 0, "{device:?}");
    assert!(ended.trace.contains("SET_VRING_ENABLE"), "{ended}");
}

#[test]
fn the_tiny_kernel_finds_each_device_that_it_is_to_drive() {
    need!(place::kvm());
    // The first and the last are on the PCI bus, where the other one has a pin of its own.
    for driven in 0..3 {
        let disks = [(); 3].map(|()| MemoryDisk::new(1 << 20));
        let line = CommandLine::blk(Blk { requests: 50, operation: Operation::Verify, ..Blk::default() });
        let machine = disks.iter().enumerate().fold(TestMachine::boot(line), |machine, (n, disk)| {
            let mut device = device("blk", Socket::Path(disk.socket()));
            device.transport = if n == 1 { Transport::Mmio } else { Transport::Pci };
            machine.device(device)
        });
        let ended = machine.driving([driven]).run();
        assert_eq!((ended.number("requests"), ended.number("errors")), (50, 0), "{ended}");
        let served: Vec<_> = disks.iter().map(MemoryDisk::served).collect();
        let expected: Vec<_> = (0..3).map(|n| if n == driven { 50 } else { 0 }).collect();
        assert_eq!(served, expected, "{ended}");
    }
}

#[test]
fn what_a_device_answers_is_bytes() {
    need!(place::kvm());
    let disk = MemoryDisk::new(1 << 20);
    // A request without data (virtio 1.2 §5.2.6): a type, a reserved word and a sector. The answer is the
    // status.
    let ask = Ask { queue: 0, request: vec![0; 16] };
    let line = CommandLine::ask(1, &[ask.clone(), ask], 1);
    let ended = TestMachine::boot(line).vhost_user("blk", &disk.socket()).run();
    assert_eq!(ended.answers().complaint(), None, "{ended}");
    assert_eq!(ended.answers().asked(), [[0], [0]], "VIRTIO_BLK_S_OK\n{ended}");
}

#[test]
fn a_socket_pair_whose_other_end_says_nothing_fails_at_the_deadline() {
    need!(place::kvm());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut silent = device("blk", Socket::Stream(ours));
    silent.deadline = Duration::from_millis(200);
    let error = TestMachine::boot(CommandLine::hello()).device(silent).try_start().map(|_| ()).unwrap_err();
    drop(theirs);
    let mut text = Vec::new();
    error.report(&mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert_eq!(error.fault().exit_code(), 4);
    assert!(text.starts_with("outboard: cannot start device blk0\n  because: vhost-user backend "), "{text}");
    assert!(text.contains("did not answer GET_FEATURES within 200 ms"), "{text}");
}

#[test]
fn statistics_are_answered_while_a_machine_runs() {
    need!(place::kvm());
    let disk = MemoryDisk::new(1 << 20);
    let line = CommandLine::blk(Blk { requests: 100, ..Blk::default() }).end(Ending::Hang);
    let machine = TestMachine::boot(line).vhost_user("blk", &disk.socket()).start();
    machine.expect("errors=0");
    let stats = machine.stats();
    assert_eq!((stats.devices[0].id.as_str(), stats.devices[0].requests_through_vmm), ("blk0", 0));
    assert!(stats.exits > 0);
    machine.quit();
    machine.expect_event("the end", |event| *event == Event::Ended(End::Quit));
    assert_eq!(machine.end().outcome.end, End::Quit);
}

#[test]
fn another_thread_ends_a_machine() {
    need!(place::kvm());
    let machine = TestMachine::boot(CommandLine::hello().end(Ending::Hang)).start();
    machine.expect("hello");
    machine.quit();
    assert_eq!(machine.end().outcome.end, End::Quit);
}

#[test]
fn a_crash_is_an_outcome_and_not_an_error() {
    need!(place::kvm());
    let ended = TestMachine::boot(CommandLine::hello().end(Ending::TripleFault)).run();
    let End::Crash(report) = &ended.outcome.end else { panic!("{ended}") };
    assert!(report.starts_with("the guest took a triple fault\nvCPU 0:\n  rip "), "{report}");
}

#[test]
fn a_panic_that_the_guest_reports_is_told_from_a_clean_end() {
    need!(place::kvm());
    let ended = TestMachine::boot(CommandLine::hello().end(Ending::Panic)).run();
    assert_eq!((&ended.outcome.end, ended.outcome.stats.end), (&End::Panicked, "panicked"), "{ended}");
}

#[test]
fn a_reset_ends_a_machine_of_the_library_unless_told_otherwise() {
    need!(place::kvm());
    let ended = TestMachine::boot(CommandLine::hello().end(Ending::Reset)).run();
    assert_eq!((&ended.outcome.end, ended.outcome.stats.boots), (&End::Reset, 1), "{ended}");

    let disk = need!(StorageDaemon::start(1 << 20));
    let line = CommandLine::blk(Blk::default()).arg("boots", 5).arg("boots-at", 3);
    let ended = TestMachine::boot(line).vhost_user("blk", &disk.socket()).reboots().run();
    assert_eq!((&ended.outcome.end, ended.outcome.stats.boots), (&End::PowerOff, 5), "{ended}");
}

#[test]
fn four_machines_in_one_process_do_not_disturb_each_other() {
    need!(place::kvm());
    let threads: Vec<_> = (0..4)
        .map(|_| {
            thread::spawn(|| {
                for _ in 0..5 {
                    let ended = TestMachine::boot(CommandLine::hello()).run();
                    assert_eq!(ended.outcome.end, End::PowerOff, "{ended}");
                    assert_eq!(ended.console, "hello from the tiny kernel\n");
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
    // In a process of its own the count is exact; here the other tests come and go, so the kinds are counted
    // that only machines have.
    let machines = || {
        let open = fs::read_dir("/proc/self/fd").unwrap();
        let names = open.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        names.filter(|name| name.to_string_lossy().contains("kvm-vcpu:77")).count()
    };
    let machine = TestMachine::boot(CommandLine::new("cpus").arg("n", 1).end(Ending::Hang)).with(|config| {
        config.cpus = 78;
        config.memory.size = 64 << 20;
    });
    let machine = machine.start();
    assert_eq!(machines(), 1);
    machine.quit();
    assert_eq!(machine.end().outcome.end, End::Quit);
    assert_eq!(machines(), 0);
    let mut config = Config::new(Image::Bytes(b"no kernel".as_slice().into()));
    config.cpus = 78;
    assert!(Machine::build(config).is_err());
    assert_eq!(machines(), 0);
}

/// A guest that does one step a key waits for a backend that hangs; the machine answers, and ends when it is
/// asked to.
#[test]
fn statistics_are_told_and_the_machine_ends_while_a_backend_hangs() {
    need!(place::kvm());
    let disk = need!(StorageDaemon::start(1 << 20));
    let scratch = Scratch::new();
    let path = scratch.path("console");
    let line = CommandLine::new("drive").arg("depth", 1).arg("accept", 1 << 11).arg("timeout", 60);
    let mut config = Config::new(Image::Bytes(outboard_testkit::kernel::tiny_kernel().into()));
    config.cmdline = Some(line.device(0xd000_0000, 5).to_string());
    config.memory.size = 32 << 20;
    config.serial = Serial::Socket(path.clone(), Default::default());
    let mut backend = device("blk", Socket::Path(disk.socket()));
    backend.deadline = Duration::from_secs(60);
    config.vhost_user.push(backend);
    let machine = Machine::build(config).unwrap();
    let (handle, events) = (machine.handle(), machine.handle().events());
    let thread = thread::spawn(move || machine.run().unwrap());
    let mut console = UnixStream::connect(&path).unwrap();
    let mut step = |keys: &[u8], wanted: &str| {
        console.write_all(keys).unwrap();
        let (mut seen, mut byte) = (Vec::new(), [0]);
        while !seen.ends_with(wanted.as_bytes()) {
            console.read_exact(&mut byte).unwrap();
            seen.push(byte[0]);
        }
    };
    step(b"", "ready\n");
    step(b"s", "key s status=0xf done\n");
    disk.signal(Signal::STOP);
    // A write to the configuration, for which the vCPU waits.
    console.write_all(b"c").unwrap();
    thread::sleep(Duration::from_millis(200));
    let begun = Instant::now();
    let stats = handle.stats().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!((stats.boots, stats.devices[0].state), (1, "idle"));
    assert!(stats.exits > 0 && stats.ranges.iter().any(|range| range.name == "serial" && range.writes > 10));
    let begun = Instant::now();
    handle.quit();
    let outcome = thread.join().unwrap();
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    assert_eq!((outcome.end, outcome.stats.devices[0].state), (End::Quit, "idle"));
    assert_eq!(events.try_iter().collect::<Vec<_>>(), [Event::Ended(End::Quit)]);
    assert!(handle.stats().is_none(), "the machine has ended");
}

#[test]
fn a_reset_by_the_guest_is_an_event() {
    need!(place::kvm());
    let mut config = Config::new(Image::Bytes(outboard_testkit::kernel::tiny_kernel().into()));
    config.cmdline = Some(CommandLine::new("hello").arg("end", "reset").to_string());
    config.on_reset = vmm::config::OnReset::Reboot;
    let machine = Machine::build(config).unwrap();
    let (handle, events) = (machine.handle(), machine.handle().events());
    let thread = thread::spawn(move || machine.run().unwrap());
    for _ in 0..3 {
        assert_eq!(events.recv_timeout(Duration::from_secs(60)).unwrap(), Event::GuestReset);
    }
    handle.quit();
    assert!(thread.join().unwrap().stats.boots > 3);
    assert_eq!(events.try_iter().last(), Some(Event::Ended(End::Quit)));
}

#[test]
fn a_backend_that_is_lost_and_found_and_one_that_is_lost_for_good_are_events() {
    need!(place::kvm());
    for keys in [true, false] {
        let mut disk = need!(StorageDaemon::start(1 << 20));
        let mut config = Config::new(Image::Bytes(outboard_testkit::kernel::tiny_kernel().into()));
        config.cmdline = Some(CommandLine::new("hello").arg("end", "hang").to_string());
        let mut backend = device("blk", Socket::Path(disk.socket()));
        backend.reconnect = keys.then_some(Duration::ZERO);
        config.vhost_user.push(backend);
        let machine = Machine::build(config).unwrap();
        let (handle, events) = (machine.handle(), machine.handle().events());
        let thread = thread::spawn(move || machine.run().unwrap());
        let next = || events.recv_timeout(Duration::from_secs(60)).unwrap();
        disk.kill();
        let id = || "blk0".to_owned();
        if keys {
            assert_eq!(next(), Event::DeviceLost { id: id() });
            disk.restart();
            assert_eq!(next(), Event::DeviceRecovered { id: id() });
        } else {
            let why = "the backend closed the connection".to_owned();
            assert_eq!(next(), Event::DeviceBroken { id: id(), why });
        }
        handle.quit();
        thread.join().unwrap();
        assert_eq!(next(), Event::Ended(End::Quit));
    }
}
