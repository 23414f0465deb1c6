//! The control thread waits for nobody: while sixteen backends hang and a vCPU is held up by them, a signal
//! ends the machine, input reaches the guest, and the guest restarts. Needs KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

use outboard_tests::daemon::{SECTOR, StorageDaemon};
use outboard_tests::launch::{Launch, STEP, Vm, first_devices};
use outboard_tests::machine::{TestMachine, device};
use outboard_tests::payload::CommandLine;
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place, wait};
use rustix::process::Signal;
use vmm::config::{Serial, Socket};

const DISKS: usize = 16;
const CONFIG_WCE: u32 = 1 << 11;
/// How long a backend may take over a request. Anything that waits for all sixteen, one after the other,
/// takes 48 s.
const DEADLINE: Duration = Duration::from_millis(3000);
/// How long the control thread may take over anything, on a quiet host.
const SOON: Duration = Duration::from_millis(200);

/// A machine whose guest has started sixteen disks, which hang from now on.
fn hung(keys: &str) -> Result<(StorageDaemon, Vm), place::Missing> {
    place::kvm()?;
    let images: Vec<_> = (0..DISKS).map(|_| vec![0; 1024 * SECTOR]).collect();
    let daemon = StorageDaemon::serving_all(&images)?;
    let line = first_devices("drive", DISKS).arg("depth", 1).arg("accept", CONFIG_WCE).arg("timeout", 60);
    let keys = format!("deadline={}{keys}", DEADLINE.as_millis());
    let launch =
        (0..DISKS).fold(Launch::payload(&line), |launch, n| launch.disk_with(&daemon.socket_of(n), &keys));
    let mut vm = launch.start();
    vm.expect("ready");
    vm.send(b"S");
    vm.expect("key S status=0xf done");
    daemon.signal(Signal::STOP);
    Ok((daemon, vm))
}

/// What a guest does to all sixteen disks: it resets them, writes their configuration, starts them again,
/// restarts the machine.
const TROUBLE: [&[u8]; 4] = [b"R", b"C", b"S", b"x"];

#[test]
fn a_signal_ends_a_machine_at_once_whatever_its_guest_does_to_hung_disks() {
    for keys in ["", ",reconnect=0"] {
        for trouble in TROUBLE {
            let (daemon, mut vm) = need!(hung(keys));
            vm.send(trouble);
            // A vCPU is in an exchange with the first of them.
            sleep(Duration::from_millis(300));
            let begun = Instant::now();
            vm.signal(Signal::TERM);
            let ended = vm.end(STEP).with_code(143);
            let took = begun.elapsed();
            daemon.signal(Signal::CONT);
            println!("{keys:?} {trouble:?}: the machine ended after {took:?}");
            assert!(took < DEADLINE + wait::patience(SOON), "{keys:?} {trouble:?}: {took:?}\n{ended}");
        }
    }
}

#[test]
fn input_reaches_a_guest_whose_disks_hang() {
    for keys in ["", ",reconnect=0"] {
        let (daemon, mut vm) = need!(hung(keys));
        // The guest writes the configuration of its first disk, and then reads what was typed meanwhile.
        let begun = Instant::now();
        vm.send(b"c");
        sleep(Duration::from_millis(300));
        vm.send(b"k");
        vm.expect("key k status=");
        let took = begun.elapsed();
        println!("{keys:?}: the key was read after {took:?}");
        assert!(took < DEADLINE + wait::patience(SOON), "{keys:?}: {took:?}");
        // A restart gives up on all of them at the same time.
        let begun = Instant::now();
        vm.send(b"x");
        wait::until("the guest starts again", STEP, || {
            (vm.console().text().matches("ready\n").count() == 2).then_some(())
        });
        let took = begun.elapsed();
        println!("{keys:?}: the guest was back after {took:?}");
        // All disks are given up at the same time, and looked for at the same time.
        assert!(took < 4 * DEADLINE, "{keys:?}: {took:?}");
        vm.send(b"q");
        let ended = vm.end(STEP).with_code(0);
        daemon.signal(Signal::CONT);
        let longest = Duration::from_micros(ended.stats().number("/vcpus/0/longest_exit_us"));
        assert!(longest < DEADLINE + wait::patience(SOON), "{longest:?}\n{ended}");
    }
}

#[test]
fn statistics_are_answered_and_a_machine_is_ended_while_its_disks_hang() {
    need!(place::kvm());
    for trouble in TROUBLE {
        let images: Vec<_> = (0..DISKS).map(|_| vec![0; 1024 * SECTOR]).collect();
        let daemon = need!(StorageDaemon::serving_all(&images));
        let (scratch, line) = (Scratch::new(), CommandLine::new("drive").arg("depth", 1));
        let socket = scratch.path("console");
        let machine = (0..DISKS).fold(TestMachine::boot(line.arg("accept", CONFIG_WCE)), |machine, n| {
            let mut disk = device("blk", Socket::Path(daemon.socket_of(n)));
            disk.deadline = DEADLINE;
            machine.device(disk)
        });
        let machine = machine
            .driving(0..DISKS)
            .reboots()
            .with(|config| config.serial = Serial::Socket(socket.clone(), Default::default()));
        let machine = machine.start();
        let mut console = UnixStream::connect(&socket).unwrap();
        console.set_read_timeout(Some(wait::patience(STEP))).unwrap();
        let mut lines = BufReader::new(console.try_clone().unwrap());
        let mut expect = |wanted: &str| {
            let mut line = String::new();
            while !line.contains(wanted) {
                line.clear();
                assert_ne!(lines.read_line(&mut line).unwrap(), 0, "{wanted} did not come");
            }
        };
        // The guest may have said that it is ready before anybody listened.
        console.write_all(b"S").unwrap();
        expect("key S status=0xf done");
        daemon.signal(Signal::STOP);
        console.write_all(trouble).unwrap();
        for _ in 0..10 {
            sleep(Duration::from_millis(100));
            let begun = Instant::now();
            let stats = machine.stats();
            let took = begun.elapsed();
            assert!(took < wait::patience(SOON), "{trouble:?}: statistics took {took:?}");
            assert_eq!(stats.devices.len(), DISKS);
        }
        let begun = Instant::now();
        machine.quit();
        let ended = machine.end();
        let took = begun.elapsed();
        daemon.signal(Signal::CONT);
        println!("{trouble:?}: the machine ended after {took:?}");
        // Queues are stopped in order, all at the same time, once the vCPU's exchange is over.
        assert!(took < 2 * DEADLINE + wait::patience(SOON), "{trouble:?}: {took:?}\n{ended}");
    }
}
