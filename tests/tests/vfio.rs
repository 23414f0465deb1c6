//! A vfio-user server's device under the tiny kernel: what is trapped and what is not, interrupts, losses.
//! Needs KVM's interface only. The same device on the crate `vfio_user` and, where `tests/backends/fetch`
//! built it, on libvfio-user.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::{Duration, Instant};

use outboard_tests::launch::{Ended, Launch, STEP};
use outboard_tests::payload::CommandLine;
use outboard_tests::scratch::Scratch;
use outboard_tests::vfio::{Library, Server};
use outboard_tests::{need, place, wait};
use rustix::process::Signal;
use transport::testing::vfio_user::{Act, Offer, RegionOffer, Script, ScriptedServer};
use transport::vfio_user::message::Command;

/// A guest that takes these steps with the engine.
fn launch(server: &Server, more: &str, steps: &[&str]) -> Launch {
    let line = steps.iter().fold(CommandLine::new("pci"), |line, step| line.arg("step", step));
    Launch::payload(&line).arg("--vfio-user").arg(server.device(&format!(",id=engine{more}")))
}

fn run(server: &Server, more: &str, steps: &[&str]) -> Ended {
    launch(server, more, steps).run().with_code(0)
}

/// What the guest printed as `value=`, in order.
fn values(ended: &Ended) -> Vec<u32> {
    let words = ended.console.split_whitespace().filter_map(|word| word.strip_prefix("value="));
    words.map(|word| u32::from_str_radix(word.trim_start_matches("0x"), 16).unwrap()).collect()
}

/// Reads and writes of a BAR that were trapped.
fn trapped(ended: &Ended, bar: usize) -> (u64, u64) {
    let count = |what| ended.stats().number(&format!("/devices/0/pci/bar_{what}/{bar}"));
    (count("reads"), count("writes"))
}

const MAGIC: u32 = u32::from_le_bytes(*b"ENGN");

#[test]
fn a_register_is_read_and_written_through_the_server() {
    need!(place::kvm());
    for library in Library::all() {
        let server = library.engine(&[]);
        let steps = ["c:0", "c:8", "r:0:0", "w:0:8:0x1234", "r:0:8", "r:4:4", "w:4:0:7", "r:4:0", "r:0:0xf0"];
        let ended = run(&server, "", &steps);
        assert_eq!(
            values(&ended),
            [0x0b0f_1234, 0xff00_0001, MAGIC, 0x1234, 0, 7, u32::MAX],
            "the last one is a register that fails\n{ended}"
        );
        assert_eq!((trapped(&ended, 0), trapped(&ended, 4)), ((3, 1), (2, 1)), "{ended}");
        assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
    }
}

/// `BAR 0` registers of the engine.
const RAISE: &str = "w:0:0x38";

#[test]
fn msix_interrupts_come_by_irqfd_and_wait_while_they_are_masked() {
    need!(place::kvm());
    for library in Library::all() {
        let server = library.engine(&[]);
        let [raise, other] = [3, 4].map(|vector| format!("{RAISE}:{vector}"));
        let steps = ["v:3:0", "x:0x8000", &raise, "i:1", &raise, "i:2"];
        let ended = run(&server, "", &steps);
        assert_eq!(ended.field("interrupts"), 2, "{ended}");
        // The vector is masked, then the function; the pending bits are in BAR 5.
        let steps = ["v:3:1", "x:0x8000", &raise, "u:5:0x1000:8", "v:3:0", "i:1", "r:5:0x1000"];
        let ended = run(&server, "", &steps);
        assert_eq!((ended.field("interrupts"), values(&ended)), (1, vec![0]), "{ended}");
        let steps = ["v:3:0", "v:4:0", "x:0xc000", &raise, &other, "u:5:0x1000:0x18", "x:0x8000", "i:1"];
        let ended = run(&server, "", &steps);
        // Both have the same vector of the processor, which may take them for one.
        assert!(ended.field("interrupts") >= 1, "{ended}");
    }
}

#[test]
fn a_storm_of_interrupts_does_not_pass_through_the_vmm() {
    need!(place::kvm());
    for library in Library::all() {
        let server = library.engine(&[]);
        let raised = |number: u32| {
            let often = format!("w:0:0x60:{:#x}", 3 << 24 | number);
            let ended = run(&server, "", &["v:3:0", "x:0x8000", &often, "u:0:0x8:0", "i:1"]);
            assert!(ended.field("interrupts") >= 1, "{ended}");
            (ended.stats().number("/devices/0/peer/messages"), ended.stats().exits())
        };
        let (few, many) = (raised(1), raised(20_000));
        assert_eq!(few.0, many.0, "messages");
        assert!(many.1 < few.1 + 100, "{few:?} {many:?}");
    }
}

#[test]
fn msi_and_the_pin_interrupt_as_well() {
    need!(place::kvm());
    for library in Library::all() {
        let server = library.engine(&[]);
        // libvfio-user knows no MSI.
        let msi = if library == Library::Crate { "m:1" } else { "x:0" };
        if library == Library::Crate {
            let ended = run(&server, "", &[msi, "w:0:0x38:0", "i:1", "w:0:0x38:0", "i:2"]);
            assert_eq!(ended.field("interrupts"), 2, "{ended}");
        }
        // INTA of device 1 is line 21. What is raised again after the end of an interrupt is heard.
        let steps =
            ["p:21:0:0x3c", "w:0:0x38:0", "i:1", "w:0:0x38:0", "i:2", "w:0:0x38:0", "i:3", "u:0:0x3c:0"];
        let ended = run(&server, "", &steps);
        // A level may be seen once more: `devices::pci::vfio_user::pin` has why.
        assert!(ended.field("interrupts") >= 3, "{ended}");
        // One kind after the other in one life.
        let steps = [
            "p:21:0:0x3c",
            "w:0:0x38:0",
            "i:1",
            "v:0:0",
            "x:0x8000",
            "w:0:0x38:0",
            "i:2",
            "x:0",
            msi,
            "w:0:0x38:0",
            "i:3",
        ];
        let ended = run(&server, "", &steps);
        assert!(ended.field("interrupts") >= 3, "{ended}");
    }
}

#[test]
fn mapped_memory_of_a_bar_causes_no_exit_and_moves_with_it() {
    need!(place::kvm());
    for library in Library::all() {
        let server = library.engine(&[]);
        let drive = |number: u32| {
            let [write, read, large] =
                ["W:1:0x1000", "R:1:0x1000", "W:2:0x8000"].map(|step| format!("{step}:{number}"));
            let ended = run(&server, "", &[&write, &read, &large, "r:2:0x8000"]);
            assert_eq!(values(&ended), [number, number], "{ended}");
            assert_eq!((trapped(&ended, 1), trapped(&ended, 2)), ((0, 0), (0, 0)), "{ended}");
            ended.stats().exits()
        };
        let (few, many) = (drive(1), drive(5000));
        assert!(many < few + 100, "{few} exits, then {many}");
        // The server sees what the guest wrote, in the part that is trapped and in the other one, wherever
        // the BAR is.
        let steps = [
            "w:1:0x1ffc:0x11",
            "w:1:0x3000:0x22",
            "C:0x14:0xcf000000",
            "r:1:0x1ffc",
            "r:1:0x3000",
            "w:1:0x8000:0x33",
            "C:4:5",
            "c:0x14",
            "C:0x14:0xce000000",
            "C:4:7",
            "r:1:0x8000",
            "r:1:0x1ffc",
        ];
        let ended = run(&server, "", &steps);
        assert_eq!(values(&ended), [0x11, 0x22, 0xcf00_0000, 0x33, 0x11], "{ended}");
        assert_eq!(trapped(&ended, 1), (1, 1), "only what lies outside the areas\n{ended}");
    }
}

#[test]
fn a_server_that_must_be_quiet_first_holds_up_a_reboot_and_no_more() {
    need!(place::kvm());
    if !Library::all().contains(&Library::LibvfioUser) {
        return;
    }
    let server = Library::LibvfioUser.engine(&["--quiesce", "100"]);
    let steps = [
        "r:0:8",
        "w:0:8:1",
        "v:3:0",
        "x:0x8000",
        "w:0:0x38:3",
        "i:1",
        "h:0x64:0x8000",
        "C:0x10:0xc9000000",
        "C:4:7",
        "r:0:8",
        "z:0:0x48:6",
    ];
    let ended = run(&server, "", &steps);
    // Two resets a boot: of the function, and with the machine.
    assert_eq!((values(&ended), ended.stats().number("/boots")), (vec![0; 8], 4), "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
}

/// How often the server sent this command.
fn asked(ended: &Ended, command: &str) -> usize {
    let trace = std::fs::read_to_string(ended.files.path("trace")).unwrap();
    trace.matches(&format!("<< {command}")).count()
}

/// Has the engine fill memory with a pattern, add it up, and bring it to BAR 2.
const FILL_AND_SUM: [&str; 13] = [
    "w:0:0x20:0x2345000",
    "w:0:0x28:0x40000",
    "w:0:0x30:0xfeedc0de",
    "w:0:0x10:2",
    "u:0:0x0c:2",
    "w:0:0x18:0x2345000",
    "w:0:0x10:3",
    "u:0:0x0c:2",
    "r:0:0x34",
    "w:0:0x20:0x1000",
    "w:0:0x10:5",
    "u:0:0x0c:2",
    "r:2:0x40ffc",
];

#[test]
fn the_server_reaches_memory_by_mapping_and_by_messages() {
    need!(place::kvm());
    for library in Library::all() {
        let server = library.engine(&["--wire", "extended"]);
        for mode in [0, 1] {
            let set = format!("w:0:0x4c:{mode}");
            let steps: Vec<_> = std::iter::once(&set[..]).chain(FILL_AND_SUM).collect();
            let ended = run(&server, "", &steps);
            assert_eq!(values(&ended), [0xc0de_0000, 0xfeed_c0de], "{library:?} mode {mode}\n{ended}");
            let asked = |command| asked(&ended, command);
            let pieces = if mode == 0 { 0 } else { 4 };
            assert_eq!((asked("DMA_WRITE"), asked("DMA_READ")), (pieces, 2 * pieces), "{library:?}\n{ended}");
        }
    }
}

#[test]
fn a_write_of_more_than_a_message_takes_reaches_memory_whole() {
    need!(place::kvm());
    if !Library::all().contains(&Library::LibvfioUser) {
        return;
    }
    let server = Library::LibvfioUser.engine(&[]);
    // 1.5 MiB at once: libvfio-user's second message has the size of the first, and counts half of it.
    let sum = &FILL_AND_SUM[4..9];
    let steps =
        [&["w:0:0x4c:2", FILL_AND_SUM[0], "w:0:0x28:0x180000", FILL_AND_SUM[2], "w:0:0x10:2"], sum].concat();
    let ended = run(&server, "", &[&steps[..6], &["w:0:0x4c:0"], &steps[6..]].concat());
    let due = 0x6_0000_u32.wrapping_mul(0xfeed_c0de);
    assert_eq!(values(&ended), [due], "{ended}");
    assert_eq!(asked(&ended, "DMA_WRITE"), 2, "{ended}");
}

#[test]
fn doorbells_of_the_server_end_in_the_kernel() {
    need!(place::kvm());
    for library in Library::all() {
        let server = library.engine(&["--wire", "extended"]);
        let drive = |number: u32| {
            let write = format!("W:0:0x804:{number}");
            let until = format!("u:0:0x84:{number}");
            let ended = run(&server, "", &[&write, "w:0:0x840:3", &until, "u:0:0xac:1"]);
            (trapped(&ended, 0).1, ended.stats().exits(), trapped(&ended, 0).0)
        };
        let (few, many) = (drive(1), drive(2000));
        assert_eq!((few.0, many.0), (0, 0), "no write of them is trapped");
        assert!(many.1 - many.2 < few.1 - few.2 + 100, "{few:?} {many:?}");
    }
}

#[test]
fn posted_writes_do_not_wait_and_others_do() {
    need!(place::kvm());
    for library in Library::all() {
        let server = library.engine(&[]);
        let waits = |more: &str| {
            let ended = run(&server, more, &["W:0:0x50:1000", "r:0:0x54", "r:0:0x58"]);
            assert_eq!(
                values(&ended),
                [1000, 500_500],
                "each arrives, and before what is read later\n{ended}"
            );
            ended.stats().number("/devices/0/peer/waits")
        };
        let (posted, answered) = (waits(",posted-writes=on"), waits(",posted-writes=off"));
        assert!(answered >= posted + 1000, "{posted} waits, then {answered}");
    }
}

#[test]
fn a_server_that_dies_or_hangs_is_all_ones_and_the_machine_goes_on() {
    need!(place::kvm());
    for library in Library::all() {
        let gone = ["r:0:0", "c:0", "w:0:8:1", "r:1:0x1000", "w:1:0x1000:1", "r:4:0", "x:0x8000", "C:4:0"];
        for (fault, why) in [("w:0:0xf4:1", "closed"), ("w:0:0xf8:6000", "within 1500 ms")] {
            let server = library.engine(&[]);
            let steps: Vec<_> = ["v:3:0", "x:0x8000", fault].iter().chain(&gone[..6]).copied().collect();
            let ended = run(&server, ",deadline=1500", &steps);
            assert_eq!(values(&ended), [u32::MAX; 4], "{ended}");
            assert_eq!(ended.stats().text("/devices/0/state"), "broken", "{ended}");
            assert!(ended.stats().text("/devices/0/broken").contains(why), "{ended}");
            assert!(ended.log.contains("x-DEVICE_BROKEN device engine"), "{ended}");
        }
    }
}

/// The registers of hot-unplug, where the DSDT has them: GONE, PRESENT, EJECT.
const SLOTS: [&str; 3] = ["0x610", "0x614", "0x618"];

#[test]
fn the_loss_of_a_server_is_an_acpi_event_and_the_guest_lets_go_of_the_device() {
    need!(place::kvm());
    let [gone, present, eject] = SLOTS;
    let (is_gone, is_present) = (format!("o:{gone}"), format!("o:{present}"));
    let (until_lost, let_go) = (format!("U:{present}:4"), format!("O:{eject}:2"));
    let lost = [is_present.as_str(), "w:0:0xf4:1", &until_lost];
    let told = ["i:1", &is_gone, &is_gone, &let_go, "c:0", &is_present];
    // A guest that listens, and one that begins to when all is over.
    for steps in [[&["l:9"], &lost[..], &told].concat(), [&lost[..], &["l:9"], &told].concat()] {
        let (server, other) = (Server::engine(&[]), Server::engine(&[]));
        let launch = launch(&server, "", &steps).arg("--vfio-user").arg(other.device(",id=other"));
        let ended = launch.arg("-v").run().with_code(0);
        assert_eq!(values(&ended), [6, 2, 0, u32::MAX, 4], "{ended}");
        assert!(ended.field("interrupts") >= 1, "{ended}");
        assert!(ended.log.contains("the guest has let go of PCI device 00:01.0"), "{ended}");
        assert_eq!(ended.stats().text("/devices/0/state"), "broken", "{ended}");
        assert_eq!(ended.stats().text("/devices/1/state"), "idle", "{ended}");
    }
}

#[test]
fn a_server_that_hangs_or_makes_its_file_shorter_is_an_acpi_event_too() {
    need!(place::kvm());
    let [gone, present, eject] = SLOTS;
    let until_lost = format!("U:{present}:0");
    let told = ["l:9", "i:1", &format!("o:{gone}"), &format!("O:{eject}:2"), "c:0"];
    let hang = [&["w:0:0xf8:6000", "r:0:0", until_lost.as_str()], &told[..]].concat();
    let server = Server::engine(&[]);
    let ended = run(&server, ",deadline=1500", &hang);
    assert_eq!(values(&ended), [u32::MAX, 2, u32::MAX], "{ended}");
    assert!(ended.field("interrupts") >= 1, "{ended}");

    let shorter = [&["r:1:0x1000", "u:1:0x1000:0xffffffff", until_lost.as_str()], &told[..]].concat();
    let server = Server::engine(&[]);
    let vm = launch(&server, "", &shorter).start();
    vm.expect("value=0x0");
    server.truncate("engine-bar1");
    let ended = vm.end(STEP).with_code(0);
    assert_eq!(values(&ended), [0, 2, u32::MAX], "{ended}");
    assert!(ended.stats().text("/devices/0/broken").contains("shorter"), "{ended}");
}

#[test]
fn a_guest_may_let_go_of_a_working_device_and_is_not_told_of_what_cannot_be_told() {
    need!(place::kvm());
    let server = Server::engine(&["--wire", "extended"]);
    let [_, present, eject] = SLOTS;
    let (is_present, let_go) = (format!("o:{present}"), format!("O:{eject}:2"));
    let steps = ["v:3:0", "x:0x8000", "w:1:0x1000:5", "r:1:0x1000", &let_go, "c:0", "r:0:0", &is_present];
    let ended = run(&server, "", &steps);
    assert_eq!(values(&ended), [5, u32::MAX, u32::MAX, 0], "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "ejected", "{ended}");
    // Without ACPI there are no such registers.
    let line = CommandLine::new("pci").arg("off", "port:0x600,0x34");
    let steps = ["c:0", &is_present, &let_go, "c:0"].iter().fold(line, |line, step| line.arg("step", step));
    let launch = Launch::payload(&steps).arg("--vfio-user").arg(server.device(""));
    let ended = launch.args(["--discovery", "cmdline"]).run().with_code(0);
    assert_eq!(values(&ended), [0x0b0f_1234, u32::MAX, 0x0b0f_1234], "{ended}");
}

#[test]
fn a_server_that_makes_its_file_shorter_breaks_its_device_alone() {
    need!(place::kvm());
    for library in Library::all() {
        let (server, other) = (library.engine(&[]), library.engine(&[]));
        let steps = ["w:1:0x1000:5", "r:1:0x1000", "u:1:0x1000:0xffffffff", "r:0:0"];
        let vm = launch(&server, "", &steps).arg("--vfio-user").arg(other.device(",id=other")).start();
        vm.expect("value=0x5");
        server.truncate("engine-bar1");
        let ended = vm.end(STEP).with_code(0);
        assert_eq!(values(&ended), [5, u32::MAX], "{ended}");
        assert!(ended.stats().text("/devices/0/broken").contains("shorter"), "{ended}");
        assert_eq!(ended.stats().text("/devices/1/state"), "idle", "{ended}");
    }
}

#[test]
fn servers_that_are_stopped_hold_up_neither_the_guest_nor_the_end() {
    need!(place::kvm());
    for library in Library::all() {
        let (server, other) = (library.engine(&[]), library.engine(&[]));
        let steps = ["r:0:0", "u:0:8:0xffffffff", "r:0:0"];
        let other_one = other.device(",id=other,deadline=1000");
        let vm = launch(&server, ",deadline=1000", &steps).arg("--vfio-user").arg(other_one).start();
        vm.expect("value=0x4e474e45");
        let begun = Instant::now();
        server.signal(Signal::STOP);
        other.signal(Signal::STOP);
        let ended = vm.end(STEP).with_code(0);
        assert_eq!(values(&ended), [MAGIC, u32::MAX], "{ended}");
        for device in [0, 1] {
            let why = ended.stats().text(&format!("/devices/{device}/broken"));
            assert!(why.contains("within 1000 ms"), "{ended}");
        }
        // One deadline for the guest's read, one for the end of the other device.
        assert!(begun.elapsed() < wait::patience(Duration::from_secs(5)), "{:?}", begun.elapsed());
    }
}

#[test]
fn a_reset_of_the_function_masks_its_vectors_and_forgets_its_bars() {
    need!(place::kvm());
    for library in Library::all() {
        let server = library.engine(&[]);
        // The device control register is at 0x64; BARs 5 and 0 are placed anew.
        let steps = [
            "v:3:0",
            "x:0x8000",
            "r:5:0x3c",
            "h:0x64:0x8000",
            "c:0x24",
            "C:0x24:0xc8000000",
            "C:0x10:0xc9000000",
            "C:4:7",
            "r:5:0x3c",
            "r:0:0x48",
            "v:3:0",
            "x:0x8000",
            "w:0:0x38:3",
            "i:1",
        ];
        let ended = run(&server, "", &steps);
        assert_eq!(values(&ended), [0, 0, 1, 1], "unmasked, nowhere, masked, reset once\n{ended}");
        assert_eq!(ended.field("interrupts"), 1, "{ended}");
    }
}

#[test]
fn fifty_reboots_leave_the_device_as_after_power_on() {
    need!(place::kvm());
    for library in Library::all() {
        let server = library.engine(&[]);
        let before = server.descriptors();
        let steps =
            ["r:0:8", "w:0:8:1", "v:3:0", "x:0x8000", "w:0:0x38:3", "i:1", "w:1:0x1000:5", "z:0:0x48:50"];
        let ended = run(&server, "", &steps);
        assert_eq!(ended.stats().number("/boots"), 51, "{ended}");
        assert_eq!(values(&ended), [0; 51], "the scratch register is clear each time\n{ended}");
        assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
        server.lets_go(before);
    }
}

#[test]
fn a_machine_that_is_killed_leaves_a_server_for_the_next() {
    need!(place::kvm());
    for library in Library::all() {
        let server = library.engine(&["--wire", "extended"]);
        let before = server.descriptors();
        for _ in 0..3 {
            let steps = ["w:0:8:7", "r:0:8", "v:3:0", "x:0x8000", "w:1:0x1000:5", "u:0:8:0"];
            let vm = launch(&server, "", &steps).start();
            vm.expect("value=0x7");
            vm.signal(Signal::KILL);
            drop(vm);
        }
        let ended =
            run(&server, "", &["r:0:8", "r:1:0x1000", "c:4", "r:0:0x5c", "p:21:0:0x3c", "w:0:0x38:0", "i:1"]);
        assert_eq!(values(&ended), [0, 0, 0x0010_0007, 1], "{ended}");
        // A level may be seen once more: `devices::pci::vfio_user::pin` has why.
        assert!(ended.field("interrupts") >= 1, "{ended}");
        server.lets_go(before);
    }
}

#[test]
fn probe_tells_of_both_libraries_what_they_offer() {
    need!(place::kvm());
    for library in Library::all() {
        let server = library.engine(&["--wire", "extended"]);
        let socket = server.socket();
        let told = Launch::new(["probe", "vfio-user", socket.to_str().unwrap()]).run().with_code(0).console;
        for part in [
            "1234:0b0f class ff0000",
            "16 doorbells",
            "mapped 0x1000+0x2000, mapped 0x8000+0x8000",
            "mapped 0x0+0x100000",
            "MSI-X              32",
        ] {
            assert!(told.contains(part), "{library:?}: no {part}\n{told}");
        }
        let alone = told.contains("no writes are posted");
        assert_eq!(alone, library == Library::LibvfioUser, "{told}");
        let told = Launch::new(["probe", "vfio-user", socket.to_str().unwrap(), "--json"]).run().with_code(0);
        serde_json::from_str::<serde_json::Value>(&told.console).unwrap();
    }
}

#[test]
fn reboots_keep_no_descriptors() {
    need!(place::kvm());
    for library in Library::all() {
        let descriptors = |boots: u32| {
            let server = library.engine(&["--wire", "extended"]);
            let until = format!("z:0:0x48:{boots}");
            let steps = ["v:3:0", "x:0x8000", "w:0:0x38:3", "i:1", "w:1:0x1000:5", &until, "c:0x2c"];
            let line = steps
                .iter()
                .fold(CommandLine::new("pci").arg("end", "hang"), |line, step| line.arg("step", step));
            let vm = Launch::payload(&line).arg("--vfio-user").arg(server.device("")).start();
            vm.expect("at=0x2c");
            std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().count()
        };
        assert_eq!(descriptors(1), descriptors(20));
    }
}

#[test]
fn a_server_that_dies_while_the_machine_reboots_is_broken_on_the_next_board() {
    need!(place::kvm());
    for library in Library::all() {
        let mut server = library.engine(&[]);
        let vm = launch(&server, "", &["r:0:0", "w:1:0x1000:5", "z:0:0x48:100000", "c:0"]).start();
        // Some boots later, wherever the machine is.
        vm.expect("value=0x4e474e45");
        std::thread::sleep(Duration::from_millis(500));
        server.kill();
        let ended = vm.end(STEP).with_code(0);
        assert_eq!(values(&ended).last(), Some(&u32::MAX), "{ended}");
        assert_eq!(ended.stats().text("/devices/0/state"), "broken", "{ended}");
    }
}

#[test]
fn options_and_servers_that_do_not_fit_are_refused_with_a_hint() {
    need!(place::kvm());
    let line = CommandLine::new("hello");
    let refused = |device: &str, code: i32, part: &str| {
        let ended = Launch::payload(&line).arg("--vfio-user").arg(device).run().with_code(code);
        assert!(ended.log.contains(part) && ended.log.contains("hint: "), "{device}\n{ended}");
    };
    refused("socket=/nowhere/s", 4, "cannot connect to vfio-user server /nowhere/s");
    refused("nvme,socket=/s", 2, "everything has a key");
    refused("socket=/s,posted-writes=maybe", 2, "posted-writes=maybe");
    let server = Server::engine(&[]);
    let twice = Launch::payload(&line).arg("--vfio-user").arg(server.device(",id=a"));
    let ended = twice.arg("--vfio-user").arg("socket=/s,id=a").run().with_code(2);
    assert!(ended.log.contains("two devices are called a"), "{ended}");
}

/// A function whose configuration space has these bytes, and whose BARs 2 and 4 have no memory of the guest.
fn offer(bytes: &[(usize, &[u8])]) -> Offer {
    let mut offer = Offer::default();
    let mut config = vec![0; 0x100];
    for (at, bytes) in bytes {
        config[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    offer.regions[0] = RegionOffer::absent();
    offer.regions[4] =
        RegionOffer { flags: 3, size: 0x1000, memory: vec![0; 0x1000], ..RegionOffer::absent() };
    offer.regions[7].memory = config;
    offer
}

/// Virtio, with its common configuration at the beginning of BAR 4.
const VIRTIO: [(usize, &[u8]); 4] = [
    (0, &[0xf4, 0x1a, 0x42, 0x10]),
    (6, &[0x10]),
    (0x34, &[0x40]),
    (0x40, &[9, 0, 16, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0]),
];

/// A guest that takes these steps with a scripted server's function. The folder goes last: the server ends by
/// its socket.
fn scripted(offer: Offer, script: Script, more: &str, steps: &[&str]) -> (Scratch, ScriptedServer, Launch) {
    let scratch = Scratch::new();
    let socket = scratch.path("scripted");
    let server = ScriptedServer::listen(&socket, offer, script).unwrap();
    let line =
        steps.iter().fold(CommandLine::new("pci").arg("timeout", 30), |line, step| line.arg("step", step));
    let device = format!("socket={},id=scripted,deadline=5000{more}", socket.display());
    (scratch, server, Launch::payload(&line).arg("--vfio-user").arg(device))
}

#[test]
fn a_driver_that_resets_a_lost_virtio_function_is_not_kept_waiting() {
    need!(place::kvm());
    // As Linux does when it removes the function: a status of 0 is written, and read until it is 0.
    let steps = ["r:4:0x14", "u:4:0x14:0xffffffff", "w:4:0x14:0", "u:4:0x14:0", "r:4:0x14", "c:0"];
    let (_scratch, server, machine) = scripted(offer(&VIRTIO), Script::normal(), "", &steps);
    let vm = machine.start();
    vm.expect("value=0x0");
    server.hang_up();
    let ended = vm.end(STEP).with_code(0);
    assert_eq!(values(&ended), [0, 0, u32::MAX], "{ended}");
}

#[test]
fn a_removal_by_the_servers_administrator_is_no_broken_device_and_a_killed_server_is() {
    need!(place::kvm());
    let [gone, present, eject] = SLOTS;
    let (until_lost, is_gone, let_go) =
        (format!("U:{present}:0"), format!("o:{gone}"), format!("O:{eject}:2"));
    let steps = ["r:4:0", &until_lost, &is_gone, &let_go, "c:0"];
    let (_scratch, server, machine) = scripted(offer(&VIRTIO), Script::normal(), "", &steps);
    let vm = machine.start();
    vm.expect("value=0x0");
    // The process that serves the function lives on.
    server.hang_up();
    let ended = vm.end(STEP).with_code(0);
    assert_eq!(values(&ended), [0, 2, u32::MAX], "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "removed", "{ended}");
    assert!(!ended.log.contains("x-DEVICE_BROKEN"), "{ended}");

    let mut engine = Server::engine(&[]);
    let vm = launch(&engine, "", &["r:4:0", &until_lost, &is_gone]).start();
    vm.expect("value=0x");
    engine.kill();
    let ended = vm.end(STEP).with_code(0);
    assert_eq!(ended.stats().text("/devices/0/state"), "broken", "{ended}");
    assert!(ended.log.contains("x-DEVICE_BROKEN device engine"), "{ended}");
}

#[test]
fn a_server_that_dies_of_its_reset_is_not_asked_for_it_and_may_at_the_end() {
    need!(place::kvm());
    let script = || Script::normal().on(Command::DEVICE_RESET, Act::Close);
    let (_scratch, server, machine) = scripted(offer(&VIRTIO), script(), "", &["r:4:0"]);
    let ended = machine.run().with_code(0);
    assert_eq!(
        (ended.stats().text("/devices/0/state"), server.count(Command::DEVICE_RESET)),
        ("idle", 1),
        "{ended}"
    );
    assert!(!ended.log.contains("x-DEVICE_BROKEN"), "{ended}");
    let (_scratch, server, machine) = scripted(offer(&VIRTIO), script(), ",reset=off", &["r:4:0"]);
    let ended = machine.run().with_code(0);
    assert_eq!(
        (ended.stats().text("/devices/0/state"), server.count(Command::DEVICE_RESET)),
        ("idle", 0),
        "{ended}"
    );
}

#[test]
fn maskings_of_vectors_are_no_requests_and_the_table_may_be_in_a_bar_of_ports() {
    need!(place::kvm());
    // As SPDK has it: the register of BAR 4 reads as I/O. MSI-X of four vectors, table and pending bits in
    // BAR 4.
    let msix: [(usize, &[u8]); 5] = [
        (0, &[0x34, 0x12, 0x78, 0x56]),
        (6, &[0x10]),
        (0x20, &[1]),
        (0x34, &[0x40]),
        (0x40, &[0x11, 0, 3, 0, 4, 0, 0, 0, 4, 8, 0, 0]),
    ];
    let steps = [
        "c:0x40",
        "w:4:0xc:0",
        "w:4:0xc:1",
        "w:4:0xc:0",
        "r:4:0xc",
        "r:4:0x800",
        "r:2:0",
        "w:2:4:1",
        "c:0x20",
    ];
    let (_scratch, _server, machine) = scripted(offer(&msix), Script::normal(), "", &steps);
    let ended = machine.run().with_code(0);
    let told = values(&ended);
    assert_eq!((told[0], &told[1..4]), (0x0003_0011, [0, 0, 0].as_slice()), "{ended}");
    assert_eq!(told[4] & 0xf, 0, "memory of 32 bits: {ended}");
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 2, "{ended}");
    assert_eq!(trapped(&ended, 4), (2, 3), "{ended}");
}

#[test]
fn functions_share_the_interrupt_routes_that_the_host_has() {
    need!(place::kvm());
    let scratch = Scratch::new();
    let msix: [(usize, &[u8]); 4] = [
        (0, &[0x34, 0x12, 0x78, 0x56]),
        (6, &[0x10]),
        (0x34, &[0x40]),
        (0x40, &[0x11, 0, 0xff, 7, 2, 0, 0, 0, 2, 0, 1, 0]),
    ];
    let line = CommandLine::new("pci").arg("step", "c:0x40");
    let (mut servers, mut launch) = (Vec::new(), Launch::payload(&line));
    for number in 0..31 {
        let mut offer = offer(&msix);
        offer.irqs[2] = 2048;
        let socket = scratch.path(&format!("s{number}"));
        servers.push(ScriptedServer::listen(&socket, offer, Script::normal()).unwrap());
        launch = launch.arg("--vfio-user").arg(format!("socket={},deadline=20000", socket.display()));
    }
    let ended = launch.run().with_code(0);
    // 4 096 routes, some of which are pins.
    assert_eq!((values(&ended)[0] >> 16 & 0x7ff) + 1, 130, "{ended}");
    assert_eq!(ended.log.matches("the host has no more interrupt routes").count(), 31, "{ended}");
}
