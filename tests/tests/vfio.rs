//! A vfio-user server's device under the tiny kernel: what is trapped and what is not, interrupts, losses. Needs KVM's
//! interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use outboard_tests::launch::{Ended, Launch};
use outboard_tests::payload::CommandLine;
use outboard_tests::vfio::Server;
use outboard_tests::{need, place};

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
    let server = Server::engine(&[]);
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
