//! What works in a machine works again after everything that may happen to the machine: the disks and the
//! console of the tiny kernel, and the function of a vfio-user server. A table of checks is done after each
//! row of a table of disruptions; a new way to disturb a machine (a pause, a restore, a migration) is a row.
//! `machine_lifecycle` does the same with a stock guest and more devices. Needs KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use outboard_tests::daemon::StorageDaemon;
use outboard_tests::launch::{Launch, STEP, Vm, first_devices};
use outboard_tests::payload::CommandLine;
use outboard_tests::vfio::{Library, Server};
use outboard_tests::{need, place};

const MIB: usize = 1 << 20;

/// A guest that does one step a key, with two disks of two processes.
struct Life {
    vm: Vm,
    seen: usize,
    disks: [StorageDaemon; 2],
    boots: u64,
    kills: u64,
}

type Step = (&'static str, fn(&mut Life));

/// What must work. The console carries each key to the guest and each answer back.
const CHECKS: [Step; 2] = [
    ("both disks are started", |life| assert_eq!(life.key('S'), "status=0xf done")),
    ("a request is answered", |life| assert_eq!(life.key('b'), "status=0xf answered")),
];

/// What happens to a machine.
const DISRUPTIONS: [Step; 6] = [
    ("nothing", |_| {}),
    ("a reset by the driver", |life| assert_eq!(life.key('R'), "status=0x0 done")),
    ("a reboot in place", Life::reboot),
    ("backends that are killed and found", Life::kill),
    ("a reset after that", |life| assert_eq!(life.key('R'), "status=0x0 done")),
    ("a reboot after that", Life::reboot),
];

impl Life {
    fn find(&mut self, wanted: &str) {
        self.seen = self.vm.console().find(wanted, self.seen, STEP).unwrap_or_else(|why| panic!("{why}"));
    }

    /// Types a key, and gives the answer.
    fn key(&mut self, key: char) -> String {
        self.vm.send(&[u8::try_from(key).unwrap()]);
        self.find(&format!("key {key} "));
        let begin = self.seen;
        self.find("\n");
        self.vm.console().text_from(begin).lines().next().unwrap().to_owned()
    }

    fn reboot(&mut self) {
        self.vm.send(b"x");
        self.find("ready\n");
        self.boots += 1;
    }

    fn kill(&mut self) {
        for disk in &mut self.disks {
            let starts = self.vm.starts(&disk.socket());
            disk.kill();
            disk.restart();
            self.vm.expect_starts(&disk.socket(), starts + 1);
        }
        self.kills += 1;
        // The queues go on by themselves.
        assert_eq!(self.key('b'), "status=0xf answered");
    }
}

#[test]
fn disks_and_console_work_after_all_that_happens_to_a_machine() {
    need!(place::kvm());
    let disks = [need!(StorageDaemon::start(4 * MIB)), need!(StorageDaemon::start(MIB))];
    let line = first_devices("drive", 2).arg("depth", 1).arg("timeout", 60);
    let launch = disks.iter().fold(Launch::payload(&line), |launch, disk| {
        launch.disk_with(&disk.socket(), "reconnect=0,deadline=20000")
    });
    let mut life = Life { vm: launch.start(), seen: 0, disks, boots: 1, kills: 0 };
    life.find("ready\n");
    let rounds = if place::soak() { 100 } else { 3 };
    for (what, disrupt) in DISRUPTIONS.iter().cycle().take(rounds * DISRUPTIONS.len()) {
        println!("{what}");
        disrupt(&mut life);
        for (what, check) in CHECKS {
            println!("  {what}");
            check(&mut life);
        }
    }
    life.vm.send(b"q");
    let ended = life.vm.end(STEP).with_code(0);
    assert_eq!(ended.stats().number("/boots"), life.boots, "{ended}");
    for disk in [0, 1] {
        let of_disk = |what: &str| ended.stats().number(&format!("/devices/{disk}/{what}"));
        assert_eq!((of_disk("recoveries"), of_disk("requests_through_vmm")), (life.kills, 0), "{ended}");
    }
}

/// The steps of the tiny kernel that try a function: its register is as after a reset and can be written, its
/// memory is there, and it interrupts, for which `i:N` waits.
const FUNCTION: [&str; 9] = [
    "r:0:8",
    "w:0:8:0x77",
    "r:0:8",
    "w:1:0x1000:0x5a",
    "r:1:0x1000",
    "v:3:0",
    "x:0x8000",
    "w:0:0x38:3",
    "w:0:8:0",
];

#[test]
fn a_function_works_after_all_that_happens_to_a_machine() {
    need!(place::kvm());
    for library in Library::all() {
        let server = library.engine(&[]);
        // After a reset of the function its driver places the BARs anew. The machine is reset until the
        // server has counted so many resets.
        for (what, disruption) in [
            ("nothing", &[][..]),
            (
                "a reset by the driver",
                &["h:0x64:0x8000", "C:0x10:0xc9000000", "C:0x14:0xca000000", "C:0x24:0xcb000000", "C:4:7"],
            ),
        ] {
            let steps: Vec<_> = [&FUNCTION[..], &["i:1"], disruption, &FUNCTION, &["i:2"]].concat();
            let ended = run(&server, &steps);
            assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{what}\n{ended}");
            assert!(ended.field("interrupts") >= 2, "{what}\n{ended}");
        }
        let reboots: Vec<_> = [&FUNCTION[..], &["i:1", "z:0:0x48:6"]].concat();
        let ended = run(&server, &reboots);
        assert!(ended.stats().number("/boots") > 1, "{ended}");
        assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
    }
}

/// Runs the steps; each check of the function must have read the same.
fn run(server: &Server, steps: &[&str]) -> outboard_tests::launch::Ended {
    let line = steps.iter().fold(CommandLine::new("pci"), |line, step| line.arg("step", step));
    let launch = Launch::payload(&line).arg("--vfio-user").arg(server.device(",id=engine"));
    let ended = launch.run().with_code(0);
    let words = ended.console.split_whitespace().filter_map(|word| word.strip_prefix("value="));
    let values: Vec<_> = words.map(str::to_owned).collect();
    assert!(!values.is_empty() && values.len() % 3 == 0, "{ended}");
    for check in values.chunks(3) {
        assert_eq!(check, ["0x0", "0x77", "0x5a"], "{ended}");
    }
    ended
}
