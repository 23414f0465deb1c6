//! A vfio-user server whose device does wrong: regions, doorbells, accesses, interrupts, maps, migration. As in
//! `vfio_user_hostile.rs`.

#![cfg(test)]

mod support;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use support::vfio_user::End::{Fails, Lost, LostAnywhere, Works};
use support::vfio_user::{ALONE, PATIENT, eventfds, row};
use support::{GuestMemory, open_fds};
use transport::memory::{GuestAddr, MemoryMap, SharedRegion};
use transport::peer::Limits;
use transport::testing::vfio_user::{Act, Offer, RegionOffer, Script, ScriptedServer};
use transport::vfio_user::message::Command;
use transport::vfio_user::migration::{DmaRange, MigrationState};
use transport::vfio_user::{Client, IrqIndex, RegionIndex, Served, Sharing};
use zerocopy::IntoBytes;

type C = Command;

fn bar(change: impl FnOnce(&mut RegionOffer)) -> Offer {
    let mut offer = Offer::default();
    change(&mut offer.regions[0]);
    offer
}

fn file(size: u64) -> Option<Arc<OwnedFd>> {
    let fd = rustix::fs::memfd_create("region", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    Some(Arc::new(fd))
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The payload of a region info reply: argsz, flags, cap_offset, then what follows the struct.
fn info(argsz: u32, flags: u32, cap_offset: u32, rest: &[u8]) -> Act {
    let mut payload = words(&[argsz, flags, 0, cap_offset]);
    payload.extend(0x4000u64.to_ne_bytes());
    payload.extend(0u64.to_ne_bytes());
    payload.extend(rest);
    Act::Payload(payload)
}

fn on_info(act: Act) -> Script {
    Script::normal().on_nth(C::DEVICE_GET_REGION_INFO, 0, act)
}

#[test]
fn region_sizes_and_offsets_of_any_kind_are_taken_for_what_they_are() {
    for size in [1, 8, 0x3000, 1 << 52, 1 << 63, u64::MAX] {
        let offer = || bar(|bar| (bar.size, bar.areas) = (size, None));
        row(
            &format!("size {size:#x}"),
            offer,
            Script::normal(),
            PATIENT,
            &match size {
                // The scripted doorbell is at 8.
                1 | 8 => Lost(C::DEVICE_GET_REGION_IO_FDS, "sub-region offset"),
                _ => Works,
            },
        );
    }
    let no_config = || {
        let mut offer = Offer::default();
        offer.regions[7] = RegionOffer::absent();
        offer
    };
    row("no configuration space", no_config, Script::normal(), PATIENT, &Works);
    let far = || bar(|bar| bar.offset = u64::MAX - 0xfff);
    let end = Lost(C::DEVICE_GET_REGION_INFO, "region offset");
    row("an offset that wraps with an area", far, Script::normal(), PATIENT, &end);
    let odd = || bar(|bar| bar.offset = 0x10);
    row("an offset inside a page", odd, Script::normal(), PATIENT, &Works);
}

#[test]
fn areas_are_clipped_to_what_can_be_mapped() {
    let wrap = u64::MAX - 0xfff;
    let many: Vec<(u64, u64)> = (0..1000).map(|_| (0, 0x1000)).collect();
    for areas in [
        vec![],
        vec![(0, 0)],
        vec![(0x800, 0x100)],
        vec![(0x800, 0x2000)],
        vec![(0x3000, 0x10_0000)],
        vec![(0x10_0000, 0x1000)],
        vec![(0, 0x3000), (0x1000, 0x1000), (0x2000, 0x2000)],
        vec![(0x3000, 0x1000), (0, 0x1000)],
        many,
    ] {
        let what = format!("areas {:x?}", &areas[..areas.len().min(4)]);
        row(&what, || bar(|bar| bar.areas = Some(areas.clone())), Script::normal(), PATIENT, &Works);
    }
    let end = Lost(C::DEVICE_GET_REGION_INFO, "region offset");
    row(
        "an area that wraps",
        || bar(|bar| bar.areas = Some(vec![(wrap, 0x2000)])),
        Script::normal(),
        PATIENT,
        &end,
    );
    let scattered: Vec<(u64, u64)> = (0..1000).map(|n| (n * 0x2000, 0x1000)).collect();
    let offer =
        || bar(|bar| (bar.size, bar.file, bar.areas) = (1 << 24, file(1 << 24), Some(scattered.clone())));
    row("a thousand areas", offer, Script::normal(), PATIENT, &Lost(C::DEVICE_GET_REGION_INFO, "area count"));
    let huge: Vec<(u64, u64)> = (0..10_000).map(|_| (0, 0x1000)).collect();
    let offer = || bar(|bar| bar.areas = Some(huge.clone()));
    row("ten thousand areas", offer, Script::normal(), PATIENT, &Lost(C::DEVICE_GET_REGION_INFO, "argsz"));
}

#[test]
fn files_of_the_wrong_kind_or_size_are_not_mapped() {
    for size in [0, 1, 0x1000, 0x2fff] {
        let offer = || bar(|bar| bar.file = file(size));
        row(&format!("a file of {size:#x} bytes"), offer, Script::normal(), PATIENT, &Works);
    }
    let of = |fd: OwnedFd| bar(|bar| bar.file = Some(Arc::new(fd)));
    let end = || Lost(C::DEVICE_GET_REGION_INFO, "a file that cannot be mapped");
    // Each row makes its file inside, where it is counted.
    row("a directory", || of(std::fs::File::open("/").unwrap().into()), Script::normal(), PATIENT, &end());
    row("a pipe", || of(rustix::pipe::pipe().unwrap().0), Script::normal(), PATIENT, &end());
    row(
        "a socket",
        || of(std::os::unix::net::UnixStream::pair().unwrap().0.into()),
        Script::normal(),
        PATIENT,
        &end(),
    );
    row("no file", || bar(|bar| bar.file = None), Script::normal(), PATIENT, &Works);
    let two = Script::normal().on_nth(C::DEVICE_GET_REGION_INFO, 1, Act::Fds(1));
    row("two files", Offer::default, two, PATIENT, &Lost(C::DEVICE_GET_REGION_INFO, "file descriptors"));
}

#[test]
fn a_file_that_comes_once_for_each_area_is_one_file() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let areas = vec![(0, 0x1000), (0x2000, 0x1000)];
    let mapped = |more: Vec<Arc<OwnedFd>>, file: Arc<OwnedFd>| {
        let offer = bar(|bar| {
            (bar.areas, bar.file, bar.more_files) = (Some(areas.clone()), Some(file), more);
        });
        let (_server, stream) = ScriptedServer::pair(offer, Script::normal()).unwrap();
        let client = Client::from_stream(stream, "server", &Limits::new(PATIENT)).unwrap();
        let info = client.region_info(RegionIndex(0));
        info.map(|info| info.areas.iter().map(|area| (area.offset, area.size)).collect::<Vec<_>>())
    };
    let (one, other) = (file(0x4000).unwrap(), file(0x4000).unwrap());
    assert_eq!(mapped(vec![one.clone()], one.clone()).unwrap(), areas, "as libvfio-user sends it");
    assert_eq!(mapped(vec![other], one.clone()).unwrap(), [(0, 0x1000)], "another file is not mapped");
    let error = mapped(vec![one.clone(), one.clone()], one).unwrap_err();
    assert!(error.to_string().contains("file descriptors where 0 to 2"), "{error}");
}

#[test]
fn capability_chains_end_or_are_refused() {
    let lost = |words| Lost(C::DEVICE_GET_REGION_INFO, words);
    let head = |id: u16, next: u32| {
        [id.to_ne_bytes(), 1u16.to_ne_bytes()]
            .concat()
            .into_iter()
            .chain(next.to_ne_bytes())
            .collect::<Vec<u8>>()
    };
    let offset = "capability offset";
    for (what, act, end) in [
        ("another region", Act::Patch(8, vec![3]), lost("region 0x3")),
        ("argsz 0", info(0, 3, 0, &[]), lost("argsz")),
        ("argsz 31", info(31, 3, 0, &[]), lost("argsz")),
        ("argsz of 4 GiB", info(u32::MAX, 15, 32, &[]), lost("argsz")),
        ("an offset into the struct", info(40, 15, 16, &head(1, 0)), lost(offset)),
        ("an unaligned offset", info(48, 15, 33, &[0; 16]), lost(offset)),
        ("an offset at the end", info(40, 15, 40, &head(9, 0)), lost(offset)),
        ("an offset past the end", info(40, 15, 4096, &head(9, 0)), lost(offset)),
        ("a chain to itself", info(40, 15, 32, &head(9, 32)), lost(offset)),
        ("a chain that goes back", info(48, 15, 40, &[head(9, 0), head(9, 32)].concat()), lost(offset)),
        (
            "an area count that wraps",
            info(48, 15, 32, &[head(1, 0), words(&[0x1000_0000, 0])].concat()),
            lost("area count"),
        ),
        (
            "an area count past the end",
            info(48, 15, 32, &[head(1, 0), words(&[1, 0])].concat()),
            lost("area count"),
        ),
        ("an unknown capability", info(40, 15, 32, &head(9, 0)), Works),
    ] {
        row(what, Offer::default, on_info(act), PATIENT, &end);
    }
    let long: Vec<u8> = (1..4000u32).flat_map(|n| head(9, 32 + 8 * n)).chain(head(9, 0)).collect();
    let argsz = 32 + u32::try_from(long.len()).unwrap();
    let script = on_info(info(argsz, 15, 32, &long));
    row("a chain of 4000", Offer::default, script, PATIENT, &lost("does not end"));
    let growing = Script::normal()
        .on_nth(C::DEVICE_GET_REGION_INFO, 0, info(100, 15, 0, &[]))
        .on_nth(C::DEVICE_GET_REGION_INFO, 1, info(200, 15, 0, &[]))
        .on_nth(C::DEVICE_GET_REGION_INFO, 2, info(300, 15, 0, &[]));
    row("a size that grows", Offer::default, growing, PATIENT, &lost("grows with each answer"));
    let differing = Script::normal().on_nth(C::DEVICE_GET_REGION_INFO, 1, Act::Patch(16, vec![0, 0x10]));
    row("two answers that differ", Offer::default, differing, PATIENT, &Works);
}

#[test]
fn doorbells_outside_their_region_or_their_fds_are_refused() {
    /// A reply with entries of 40 bytes: offset, size, fd index, type.
    fn entries(argsz: u32, count: u32, list: &[(u64, u64, u32, u32)]) -> Act {
        let mut payload = words(&[argsz, 0, 0, count]);
        for (offset, size, fd, kind) in list {
            payload.extend([*offset, *size].into_iter().flat_map(u64::to_ne_bytes));
            payload.extend(words(&[*fd, *kind, 0, 0, 0, 0]));
        }
        Act::Payload(payload)
    }
    let lost = |words| Lost(C::DEVICE_GET_REGION_IO_FDS, words);
    let long: Vec<(u64, u64, u32, u32)> = (0..600).map(|n| (n * 4, 4, 0, 0)).collect();
    for (what, act, end) in [
        ("entries of no size", entries(16, 1, &[(0, 4, 0, 0)]), lost("entry size")),
        ("entries of 24 bytes", entries(40, 1, &[(0, 4, 0, 0)]), lost("entry size")),
        ("entries of 1000 bytes", entries(1016, 1, &[(0, 4, 0, 0); 25]), lost("entry size")),
        ("an fd that did not come", entries(56, 1, &[(0, 4, 1, 0)]), lost("fd index")),
        ("fd index 2^32 - 1", entries(56, 1, &[(0, 4, u32::MAX, 0)]), lost("fd index")),
        ("past the region", entries(56, 1, &[(0x4000, 4, 0, 0)]), lost("sub-region offset")),
        ("across its end", entries(56, 1, &[(0x3ffe, 4, 0, 0)]), lost("sub-region offset")),
        ("an end that wraps", entries(56, 1, &[(u64::MAX, 4, 0, 0)]), lost("sub-region offset")),
        ("an access of 3 bytes", entries(56, 1, &[(0, 3, 0, 0)]), lost("sub-region size")),
        ("more entries than payload", entries(96, 2, &[(0, 4, 0, 0)]), lost("")),
        ("2^32 - 1 entries", entries(56, u32::MAX, &[(0, 4, 0, 0)]), lost("entry count")),
        ("600 entries", entries(16 + 600 * 40, 600, &long), lost("entry count")),
        ("an unknown type", entries(56, 1, &[(0, 4, 0, 77)]), Works),
        ("the same place twice", entries(96, 2, &[(0, 4, 0, 0), (0, 4, 0, 0)]), Works),
        ("a shadow in the short form", entries(56, 1, &[(0, 4, 0, 2)]), Works),
        ("another region", Act::Patch(8, vec![1]), lost("region 0x1")),
    ] {
        row(
            what,
            Offer::default,
            Script::normal().on_nth(C::DEVICE_GET_REGION_IO_FDS, 0, act),
            PATIENT,
            &end,
        );
    }
    let none = Script::normal().on(C::DEVICE_GET_REGION_IO_FDS, Act::NoFds);
    row("no fds", Offer::default, none, PATIENT, &lost("fd index"));
}

#[test]
fn accesses_that_answer_something_else_are_refused() {
    let lost = |words| Lost(C::REGION_READ, words);
    for count in [0u32, 15, 17, u32::MAX] {
        let script = Script::normal().on(C::REGION_READ, Act::Patch(12, count.to_ne_bytes().to_vec()));
        row(&format!("{count} bytes of 16 read"), Offer::default, script, PATIENT, &lost("count"));
    }
    for (at, what) in [(0, "offset"), (8, "region")] {
        let script = Script::normal().on(C::REGION_READ, Act::Patch(at, vec![0x77]));
        row(&format!("another {what}"), Offer::default, script, PATIENT, &lost(what));
    }
    for len in [0, 8, 16, 31, 33] {
        let mut payload = [0x20u64.as_bytes(), &words(&[0, 16])].concat();
        payload.resize(len, 0);
        let script = Script::normal().on(C::REGION_READ, Act::Payload(payload));
        row(&format!("a payload of {len} bytes"), Offer::default, script, PATIENT, &lost("bytes"));
    }
    let script = Script::normal().on(C::REGION_WRITE, Act::Patch(12, vec![3]));
    row("a part was written", Offer::default, script, PATIENT, &Lost(C::REGION_WRITE, "count"));
    let script = Script::normal().on_nth(C::REGION_WRITE, 0, Act::Payload(Vec::new()));
    row("a write without echo", Offer::default, script, PATIENT, &Works);
    let script = Script::normal().on_nth(C::REGION_WRITE, 1, Act::Unasked);
    row("a reply to a posted write", Offer::default, script, PATIENT, &LostAnywhere("an answer to nothing"));
    let script = Script::normal().on(C::REGION_WRITE_MULTI, Act::Patch(0, vec![9]));
    row("another number of writes", Offer::default, script, PATIENT, &Lost(C::REGION_WRITE_MULTI, "count"));
}

#[test]
fn an_error_in_the_middle_of_arming_disables_the_whole_index() {
    let script = Script::normal().on_nth(C::DEVICE_SET_IRQS, 1, Act::Refuse(22));
    row("the second batch", Offer::default, script, PATIENT, &Fails(C::DEVICE_SET_IRQS, "Invalid argument"));
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let script = Script::normal().on_nth(C::DEVICE_SET_IRQS, 1, Act::Refuse(22));
    let (server, stream) = ScriptedServer::pair(Offer::default(), script).unwrap();
    let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
    let events = eventfds(6);
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    client.arm_irqs(IrqIndex::MSIX, &fds).unwrap_err();
    assert!(server.armed().is_empty());
    // The script's one refusal is spent.
    client.arm_irqs(IrqIndex::MSIX, &fds).unwrap();
    assert_eq!(server.armed().len(), 6);
    assert!(server.interrupt(2, 5));
    assert_eq!(rustix::io::read(&events[5], &mut [0; 8]).unwrap(), 8);
}

#[test]
fn what_is_to_be_done_with_a_reply_is_done_by_who_reads_it_or_never() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let script = Script::normal().on_nth(C::REGION_READ, 1, Act::Refuse(5));
    let (server, stream) = ScriptedServer::pair(Offer::default(), script).unwrap();
    let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
    let (done, told) = std::sync::mpsc::channel();
    let ask = |at: u64| {
        let done = done.clone();
        client.read_then(RegionIndex(0), at, 4, move |data| done.send((at, data.to_vec())).unwrap())
    };
    client.write(RegionIndex(0), 0x20, &[1, 2, 3, 4]).unwrap();
    ask(0x20).unwrap();
    ask(0x24).unwrap();
    // Whoever waits reads for all; the second was refused.
    client.device_info().unwrap();
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [(0x20, vec![1, 2, 3, 4])]);
    let mut receiver = client.receiver().unwrap();
    ask(0x22).unwrap();
    while told.try_recv().map(|heard| assert_eq!(heard, (0x22, vec![3, 4, 0, 0]))).is_err() {
        receiver.serve().unwrap();
    }
    // The end leaves the rest undone, and forgets it.
    server.hang_up();
    while receiver.serve().is_ok_and(|served| served != Served::HungUp) {}
    ask(0x20).unwrap_err();
    drop((client, receiver, done));
    assert_eq!(told.recv(), Err(std::sync::mpsc::RecvError), "nothing is kept");
}

#[test]
fn the_end_of_an_interrupt_reaches_a_server_that_has_much_to_read_first() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let script = Script::normal().on(C::DEVICE_RESET, Act::StopReading);
    let (server, stream) = ScriptedServer::pair(Offer::default(), script).unwrap();
    let client = Client::from_stream(stream, "scripted", &Limits::new(Duration::from_millis(200))).unwrap();
    client.reset().unwrap_err();
    // Until those who can wait are told to.
    let large = [0; 4096];
    while client.post_write(RegionIndex(0), 0x20, &large).is_ok() {}
    let dropped = std::sync::Arc::new(());
    let kept = dropped.clone();
    client.unmask_irqs_then(IrqIndex::INTX, 0, 1, move || drop(kept)).expect("it is not lost on the way");
    assert_eq!(std::sync::Arc::strong_count(&dropped), 2, "it waits");
    server.hang_up();
    let mut receiver = client.receiver().unwrap();
    while receiver.serve().is_ok_and(|served| served != Served::HungUp) {}
    assert_eq!(std::sync::Arc::strong_count(&dropped), 1, "whoever waits for it hears that it is over");
}

#[test]
fn the_vectors_of_msix_are_unmasked_with_their_eventfds() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // 6 eventfds take two messages. A server without masks may refuse the third.
    for script in [Script::normal(), Script::normal().on_nth(C::DEVICE_SET_IRQS, 2, Act::Refuse(22))] {
        let (server, stream) = ScriptedServer::pair(Offer::default(), script).unwrap();
        let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
        let events = eventfds(6);
        let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        client.arm_irqs(IrqIndex::MSIX, &fds).unwrap();
        let seen = server.seen().into_iter().filter(|seen| seen.command == C::DEVICE_SET_IRQS);
        let said: Vec<_> = seen.map(|seen| seen.payload).collect();
        const NONE_AND_UNMASK: u32 = 1 | 16;
        assert_eq!(said.len(), 3);
        assert_eq!(
            said[2],
            words(&[20, NONE_AND_UNMASK, 2, 0, 6]),
            "all at once: QEMU takes the count for the end"
        );
        assert_eq!(server.armed().len(), 6);
    }
}

#[test]
fn a_map_that_is_refused_half_way_leaves_nothing_mapped() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = open_fds();
    {
        let script = Script::normal().on_nth(C::DMA_MAP, 1, Act::Refuse(12));
        let (server, stream) = ScriptedServer::pair(Offer::default(), script).unwrap();
        let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
        let memory = GuestMemory::new(6 << 20);
        let fd = memory.map.regions()[0].shared_fd();
        let region = |n: u64| SharedRegion::new(GuestAddr(n << 32), 2 << 20, Arc::clone(fd), n * (2 << 20));
        let map = MemoryMap::new((0..3).map(region).collect()).unwrap();
        let error = client.dma_map_all(&map, Sharing::Descriptor).unwrap_err();
        assert!(!error.is_fatal(), "{error}");
        assert!(server.maps().is_empty());
        client.dma_map_all(&map, Sharing::Messages).unwrap();
        assert_eq!(server.maps()[2], (2 << 32, 2 << 20, false));
        drop((client, server));
    }
    assert_eq!(open_fds(), before);
    let few = || Offer { capabilities: "\"max_dma_maps\":1".to_owned(), ..Offer::default() };
    let (_server, stream) = ScriptedServer::pair(few(), Script::normal()).unwrap();
    let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
    let memory = GuestMemory::new(4 << 20);
    let half = |n: u64| {
        let fd = Arc::clone(memory.map.regions()[0].shared_fd());
        SharedRegion::new(GuestAddr(n << 32), 2 << 20, fd, 0)
    };
    let map = MemoryMap::new(vec![half(0), half(1)]).unwrap();
    let error = client.dma_map_all(&map, Sharing::Descriptor).unwrap_err();
    assert!(error.to_string().contains("it takes 1 DMA maps, and there are 2"), "{error}");
}

#[test]
fn migration_states_and_data_that_cannot_be_are_refused() {
    let feature = |nth, act| Script::normal().on_nth(C::DEVICE_FEATURE, nth, act);
    let lost = |words| Lost(C::DEVICE_FEATURE, words);
    // In the order of a life: migration, probe, start, report, stop, set, get.
    let set = |state: u32| Act::Payload(words(&[16, 2 | 1 << 17, state, 0]));
    for (what, script, end) in [
        ("another feature", feature(0, Act::Patch(4, vec![7])), lost("feature 0x7")),
        (
            "migration flags of 4 bytes",
            feature(0, Act::Payload(words(&[12, 1 << 16 | 1, 1]))),
            lost("bytes where"),
        ),
        ("no stop_copy", feature(0, Act::Patch(8, vec![0])), Works),
        ("logging pages of 0", feature(2, Act::Patch(8, vec![0; 8])), lost("page size")),
        ("logging pages of 3", feature(2, Act::Patch(8, vec![3, 0])), lost("page size")),
        (
            "logging pages of 2^63",
            feature(2, Act::Patch(8, (1u64 << 63).to_ne_bytes().to_vec())),
            lost("page size"),
        ),
        ("an empty report", feature(3, Act::Payload(Vec::new())), Works),
        (
            "a report cut short",
            feature(3, Act::Payload(words(&[32, 1 << 16 | 8, 0, 0, 0, 0, 0, 0, 1, 2]))),
            lost("bytes"),
        ),
        ("a report of elsewhere", feature(3, Act::Patch(8, vec![0, 0x10])), lost("iova")),
        ("a report too long", feature(3, Act::Payload(vec![0; 500])), lost("bytes where")),
        ("another state", feature(5, set(2)), lost("migration state 0x2")),
        ("the error state", feature(5, set(0)), lost("migration state 0x0")),
        ("an unknown state", feature(5, set(8)), lost("migration state 0x8")),
        ("a state refused", feature(5, Act::Refuse(22)), Fails(C::DEVICE_FEATURE, "Invalid argument")),
    ] {
        row(what, Offer::default, script, PATIENT, &end);
    }
    let read = |act| Script::normal().on_nth(C::MIG_DATA_READ, 0, act);
    let lost = |words| Lost(C::MIG_DATA_READ, words);
    for (what, script, end) in [
        ("more than asked for", read(Act::Patch(4, vec![0xff, 0xff, 0xff])), lost("size")),
        ("more than there is", read(Act::Patch(4, vec![200])), lost("size")),
        ("no head", read(Act::Payload(vec![0; 7])), lost("bytes where")),
        ("nothing", read(Act::Payload(vec![0; 8])), Works),
    ] {
        row(what, Offer::default, script, PATIENT, &end);
    }
}

#[test]
fn an_endless_state_is_cut_off() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let offer = Offer { state: vec![7; 300_000], ..Offer::default() };
    let (server, stream) = ScriptedServer::pair(offer, Script::normal()).unwrap();
    let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
    client.set_migration_state(MigrationState::StopCopy).unwrap();
    let mut out = Vec::new();
    let error = client.save_migration_data(&mut out, 100_000).unwrap_err();
    assert!(error.to_string().contains("more than 100000 bytes") && out.len() <= 100_000, "{error}");
    client.set_migration_state(MigrationState::StopCopy).unwrap();
    out.clear();
    assert_eq!(client.save_migration_data(&mut out, 1 << 20).unwrap(), 300_000);
    assert_eq!(client.load_migration_data(&mut out.as_slice()).unwrap(), 300_000);
    assert_eq!(server.loaded(), out);
    let range = DmaRange { at: GuestAddr(0), length: 10 << 30 };
    let pages = client.report_dma_logging(range, 4096).unwrap();
    assert_eq!(pages.words.len(), 40960, "in three messages");
    assert_eq!(server.breaches(), Vec::<String>::new());
}

#[test]
fn the_connection_ends_with_its_last_client_and_the_receiver_sees_it() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (_server, stream) = ScriptedServer::pair(Offer::default(), Script::normal()).unwrap();
    let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
    let mut receiver = client.receiver().unwrap();
    let read = client.clone().begin_read(RegionIndex(0), 0, 4).unwrap();
    receiver.serve().unwrap();
    drop(read);
    drop(client);
    let deadline = transport::peer::deadline::Deadline::after(PATIENT);
    transport::peer::deadline::wait_readable(receiver.as_fd(), &deadline).unwrap();
    assert_eq!(receiver.serve().unwrap(), Served::HungUp);
}
