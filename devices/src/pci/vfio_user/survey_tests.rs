//! The survey of servers that say odd things.

use std::time::{Duration, Instant};

use super::*;
use crate::testing;
use transport::peer::Limits;
use transport::testing::vfio_user::{Act, Offer, Script, ScriptedServer};
use transport::vfio_user::message::Command;

const CONFIG: usize = 7;

/// A function with MSI-X and a configuration space of this size.
fn offer(size: usize, change: impl FnOnce(&mut [u8])) -> Offer {
    let mut offer = Offer::default();
    let mut config = vec![0; size];
    for (at, bytes) in [
        (0, [0x34, 0x12, 0x78, 0x56].as_slice()),
        (6, &[0x10]),
        (0x34, &[0x40]),
        (0x40, &[0x11, 0, 5, 0, 2, 0, 0, 0, 2, 8, 0, 0]),
    ] {
        config[at..at + bytes.len()].copy_from_slice(bytes);
    }
    change(&mut config);
    offer.regions[CONFIG].size = u64::try_from(size).unwrap();
    offer.regions[CONFIG].memory = config;
    offer
}

fn open_with(
    offer: Offer,
    script: Script,
    limits: &Limits,
) -> (ScriptedServer, Result<FunctionShape, OpenError>) {
    let (server, stream) = ScriptedServer::pair(offer, script).unwrap();
    let client = Client::from_stream(stream, "scripted", limits).unwrap();
    let surveyed = survey(client, Wishes::default(), &testing::memory());
    (server, surveyed.map(|surveyed| surveyed.shape))
}

#[test]
fn what_the_last_client_left_on_is_off_before_memory_is_given() {
    let left = offer(0x100, |config| {
        config[4..6].copy_from_slice(&[0x47, 0x05]);
        config[0x43] = 0x80;
    });
    let (server, shape) = open_with(left, Script::normal(), &Limits::default());
    let shape = shape.unwrap();
    let config = server.region(CONFIG);
    assert_eq!((&config[4..6], config[0x43] & 0x80), ([0, 0].as_slice(), 0));
    let seen: Vec<_> = server.seen().iter().map(|seen| seen.command).collect();
    let last_write = seen.iter().rposition(|command| *command == Command::REGION_WRITE).unwrap();
    let first_map = seen.iter().position(|command| *command == Command::DMA_MAP).unwrap();
    assert!(last_write < first_map, "{seen:?}");
    assert_eq!(shape.msix.map(|msix| msix.vectors), Some(6));
}

#[test]
fn a_function_that_is_quiet_is_not_written_to() {
    let (server, shape) = open_with(offer(0x100, |_| ()), Script::normal(), &Limits::default());
    shape.unwrap();
    assert_eq!(server.count(Command::REGION_WRITE), 0);
}

#[test]
fn a_list_of_extended_capabilities_that_the_server_makes_last_is_cut() {
    // 960 capabilities, one after the other.
    let endless = offer(0x1000, |config| {
        for at in (0x100..0x1000).step_by(4) {
            let header = 0x1_000b | u32::try_from(at + 4).unwrap() << 20;
            config[at..at + 4].copy_from_slice(&header.to_le_bytes());
        }
    });
    let slow = Act::Delay(Duration::from_millis(50));
    // The first 64 reads are those of the header.
    let script =
        (64..1024).fold(Script::normal(), |script, n| script.on_nth(Command::REGION_READ, n, slow.clone()));
    let begun = Instant::now();
    let limit = Duration::from_secs(2);
    let (_server, shape) = open_with(endless, script, &Limits::new(limit));
    let cut = shape.unwrap().oddities;
    assert!(begun.elapsed() < limit * 5, "{:?}", begun.elapsed());
    assert!(cut.iter().any(|oddity| oddity.to_string().contains("cut at")), "{cut:?}");
}
