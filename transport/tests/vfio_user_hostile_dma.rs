//! A vfio-user server that asks for memory that is not its own, floods, and reads no more. As in `vfio_user_hostile.rs`.

#![cfg(test)]

mod support;

use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use support::vfio_user::End::LostAnywhere;
use support::vfio_user::{ALONE, BRIEF, PATIENT, row};
use support::{GuestMemory, open_fds};
use transport::memory::{GuestAddr, SharedRegion};
use transport::peer::Limits;
use transport::peer::deadline::Deadline;
use transport::testing::vfio_user::{Act, Ask, Offer, Script, ScriptedServer};
use transport::vfio_user::message::{Command, Header};
use transport::vfio_user::{Client, DmaRights, RegionIndex, Served, Sharing};
use zerocopy::IntoBytes;

type C = Command;

/// Asks that a client must refuse, and the errno.
fn bad_asks() -> Vec<(&'static str, Ask, u32)> {
    let of = Ask::of;
    let write = |address: u64, count: u64, data: &[u8]| {
        of(C::DMA_WRITE, [&address.to_ne_bytes()[..], &count.to_ne_bytes(), data].concat())
    };
    vec![
        ("count 0", Ask::read(0x1000, 0), 22),
        ("count above the limit", Ask::read(0x1000, (1 << 20) + 1), 22),
        ("count 2^64 - 1", Ask::read(0x1000, u64::MAX), 22),
        ("a range that wraps", Ask::read(u64::MAX - 3, 8), 14),
        ("unmapped", Ask::read(1 << 40, 8), 14),
        ("half mapped", Ask::read((2 << 20) - 4, 8), 14),
        ("across two regions", Ask::read((2 << 20) - 4, 0x1000), 14),
        ("write where only reading is allowed", Ask::write(4 << 32, &[1; 8]), 14),
        ("a read with data", of(C::DMA_READ, vec![0; 24]), 22),
        ("a read cut short", of(C::DMA_READ, vec![0; 15]), 22),
        ("no payload", of(C::DMA_WRITE, Vec::new()), 22),
        ("less data than said", write(0, 16, &[0; 8]), 22),
        ("a file too short", Ask::read(8 << 32, 8), 14),
        ("an unknown command", of(Command(0), Vec::new()), 38),
        ("a command of the future", of(Command(4711), vec![1; 100]), 38),
        ("a client's command", of(C::REGION_READ, vec![0; 16]), 38),
        ("a client's command, reset", of(C::DEVICE_RESET, Vec::new()), 38),
    ]
}

#[test]
fn dma_is_served_in_the_middle_of_every_command_and_checked() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for twin in [false, true] {
        for command in [C::DEVICE_GET_INFO, C::DMA_MAP, C::DMA_UNMAP, C::REGION_READ, C::DEVICE_RESET] {
            let mut asks = vec![Ask::write(0x1000, b"hello"), Ask::read(0x1000, 5)];
            asks.push(Ask { flags: 0x10, ..Ask::write(0x2000, b"posted") });
            // As libvfio-user sends the last piece of more than one message takes.
            let padded = [&0x3000_u64.to_ne_bytes()[..], &3_u64.to_ne_bytes(), b"padding"].concat();
            asks.push(Ask::of(C::DMA_WRITE, padded));
            asks.extend(bad_asks().into_iter().map(|(_, ask, _)| ask));
            // Maps come first: the fourth of them, or whatever comes after.
            let nth = if command == C::DMA_MAP { 3 } else { 0 };
            let script = Script::normal().on_nth(command, nth, Act::Asks(asks));
            let (server, stream) = ScriptedServer::pair(Offer { twin, ..Offer::default() }, script).unwrap();
            let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
            let memory = GuestMemory::new(4 << 20);
            let fd = memory.map.regions()[0].shared_fd();
            let part = |n: u64, offset| SharedRegion::new(GuestAddr(n), 2 << 20, Arc::clone(fd), offset);
            let (read_write, read) = (DmaRights::ReadWrite, DmaRights::Read);
            client.dma_map(&part(0, 0), read_write, Sharing::Messages).unwrap();
            client.dma_map(&part(4 << 32, 2 << 20), read, Sharing::Messages).unwrap();
            // Beyond the end of its file: nobody checks that before.
            client.dma_map(&part(8 << 32, 4 << 20), read_write, Sharing::Messages).unwrap();
            client.dma_map(&part(9 << 32, 0), read_write, Sharing::Descriptor).unwrap();
            client.device_info().unwrap();
            client.read(RegionIndex(0), 0, &mut [0; 4]).unwrap();
            client.reset().unwrap();
            client.dma_unmap(GuestAddr(9 << 32), 2 << 20).unwrap();
            let answers = server.answers();
            let what = format!("{command} twin={twin}");
            assert_eq!(memory.read(0x1000, 5), b"hello", "{what}");
            assert_eq!(memory.read(0x2000, 6), b"posted", "{what}");
            assert_eq!(memory.read(0x3000, 4), b"pad\0", "{what}");
            assert_eq!((answers[0].header.flags, answers[0].payload.len()), (1, 16), "{what}");
            assert_eq!(&answers[1].payload[16..], b"hello", "{what}");
            assert_eq!((answers[2].header.flags, answers[2].payload[8]), (1, 3), "{what}");
            for ((bad, _, errno), answer) in bad_asks().into_iter().zip(&answers[3..]) {
                assert_eq!((answer.header.flags, answer.header.errno), (0x21, errno), "{what} {bad}");
                assert!(answer.payload.is_empty() && answer.fds == 0, "{what} {bad}");
            }
            assert_eq!(answers.len(), 3 + bad_asks().len(), "{what}");
            let stats = client.stats();
            assert_eq!((stats.dma_reads, stats.dma_writes, stats.exchanges.failures), (1, 3, 0), "{what}");
        }
    }
}

#[test]
fn commands_of_the_server_that_break_the_frame_end_the_connection() {
    let read = || Ask::read(0, 8);
    let at = C::DEVICE_GET_INFO;
    let lost = |words| LostAnywhere(words);
    let fds = Ask { fds: 1, ..read() };
    row(
        "with fds",
        Offer::default,
        Script::normal().on(at, Act::Asks(vec![fds])),
        PATIENT,
        &lost("file descriptors"),
    );
    let twin = || Offer { twin: true, ..Offer::default() };
    let script = Script::normal().on(at, Act::AsksOnMain(vec![read()]));
    row("on the wrong socket", twin, script, PATIENT, &lost("with flags"));
    let large = Header { size: 0x8000_0000, ..Header::command(1, C::DMA_WRITE, 0) };
    let script = Script::normal().on(at, Act::Before(large.as_bytes().to_vec()));
    row("of 2 GiB", Offer::default, script, PATIENT, &lost("bytes where"));
    let reserved = Header { flags: 0x100, ..Header::command(1, C::DMA_READ, 0) };
    let script = Script::normal().on(at, Act::Before(reserved.as_bytes().to_vec()));
    row("with reserved flags", Offer::default, script, PATIENT, &lost("with flags"));
    let reply = Header { flags: 1, ..Header::command(0x1234, C::DMA_READ, 0) };
    let script = Script::normal().on(at, Act::Before(reply.as_bytes().to_vec()));
    row("a reply to nothing", Offer::default, script, PATIENT, &lost("an answer to nothing"));
}

#[test]
fn a_server_that_floods_us_and_takes_no_answers_is_found_at_the_deadline() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = open_fds();
    for (twin, size) in [(false, 8u64), (false, 1 << 20), (true, 1 << 20)] {
        // More than fits into all buffers together.
        let flood = Act::FloodOfAsks(Ask::read(0, size), if size == 8 { 1_000_000 } else { 10_000 });
        let script = Script::normal().on(C::DEVICE_GET_INFO, flood);
        let (server, stream) = ScriptedServer::pair(Offer { twin, ..Offer::default() }, script).unwrap();
        let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
        let memory = GuestMemory::new(2 << 20);
        client.dma_map_all(&memory.map, Sharing::Messages).unwrap();
        let begin = Instant::now();
        let error = client.until(&Deadline::after(BRIEF * 4)).device_info().unwrap_err();
        assert!(error.to_string().contains("did not answer DEVICE_GET_INFO within"), "{error}");
        assert!(begin.elapsed() < PATIENT && error.is_fatal());
        assert!(client.stats().dma_bytes < 32 << 20, "no more than it may leave with us");
        drop((client, server));
    }
    assert_eq!(open_fds(), before);
}

#[test]
fn a_server_that_stops_reading_is_found_at_the_deadline_and_posted_writes_stay_bounded() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for with_receiver in [false, true] {
        let script = Script::normal().on(C::DEVICE_RESET, Act::StopReading);
        let (server, stream) = ScriptedServer::pair(Offer::default(), script).unwrap();
        // A short deadline for what is not answered only.
        let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
        let brief = || client.until(&Deadline::after(BRIEF));
        let receiver = with_receiver.then(|| client.receiver().unwrap());
        assert!(brief().reset().unwrap_err().is_silence());
        let mut posted = 0u64;
        let error = loop {
            match brief().post_write(RegionIndex(0), 0, &[0; 8]) {
                Ok(()) => posted += 1,
                Err(error) => break error,
            }
            assert!(posted < 1_000_000, "where does it all go?");
        };
        assert!(error.is_silence(), "{error}");
        assert!(error.to_string().contains("did not take REGION_WRITE within"), "{error}");
        let error = brief().read(RegionIndex(0), 0, &mut [0; 4]).unwrap_err();
        assert!(error.is_silence(), "{error}");
        drop(receiver);
        drop((client, server));
    }
}

#[test]
fn a_receiver_hears_the_server_while_nobody_asks() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = open_fds();
    for twin in [false, true] {
        let (server, stream) =
            ScriptedServer::pair(Offer { twin, ..Offer::default() }, Script::normal()).unwrap();
        let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
        let memory = GuestMemory::new(2 << 20);
        client.dma_map_all(&memory.map, Sharing::Messages).unwrap();
        let mut receiver = client.receiver().unwrap();
        assert!(client.receiver().is_err(), "one is enough");
        server.ask(&Ask::write(0x3000, b"unasked")).unwrap();
        let deadline = transport::peer::deadline::Deadline::after(PATIENT);
        transport::peer::deadline::wait_readable(receiver.as_fd(), &deadline).unwrap();
        assert_eq!(receiver.serve().unwrap(), Served::Messages(1));
        assert_eq!(memory.read(0x3000, 7), b"unasked");
        assert_eq!(receiver.serve().unwrap(), Served::Messages(0), "it never blocks");
        // While somebody waits, that one reads.
        client.read(RegionIndex(0), 0, &mut [0; 4]).unwrap();
        let hang_up = client.hang_up().unwrap();
        server.hang_up();
        transport::peer::deadline::wait_readable(receiver.as_fd(), &deadline).unwrap();
        let error = receiver.serve().unwrap_err();
        assert!(
            error.to_string().contains("closed the connection at a moment when nothing was asked"),
            "{error}"
        );
        assert_eq!(receiver.serve().unwrap(), Served::HungUp);
        let mut fds = [rustix::event::PollFd::new(&hang_up, rustix::event::PollFlags::empty())];
        assert_eq!(rustix::event::poll(&mut fds, None).unwrap(), 1);
        let lost = client.reset().unwrap_err();
        assert!(lost.to_string().contains("is lost, DEVICE_RESET was not sent"), "{lost}");
    }
    assert_eq!(open_fds(), before);
}

#[test]
fn the_end_is_told_to_everybody_who_waits() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let script = Script::normal().on_nth(C::REGION_READ, 7, Act::Delay(Duration::from_millis(50)));
    let script = script.on_nth(C::REGION_READ, 8, Act::Close);
    let (_server, stream) = ScriptedServer::pair(Offer::default(), script).unwrap();
    let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
    let begin = Instant::now();
    let outcomes: Vec<bool> = std::thread::scope(|scope| {
        let readers: Vec<_> =
            (0..16).map(|_| scope.spawn(|| client.read(RegionIndex(0), 0, &mut [0; 4]).is_ok())).collect();
        readers.into_iter().map(|reader| reader.join().unwrap()).collect()
    });
    assert_eq!(outcomes.iter().filter(|ok| **ok).count(), 8);
    assert!(begin.elapsed() < PATIENT);
}
