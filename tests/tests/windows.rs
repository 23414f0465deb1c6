//! Windows into a backend's files on virtio-pci: in a BAR, under the tiny kernel. Needs KVM's interface only.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use outboard_tests::gadget::{Gadget, PLACE, WORD};
use outboard_tests::launch::{Ended, Launch, STEP, Vm};
use outboard_tests::payload::CommandLine;
use outboard_tests::{need, place, scratch::Scratch, wait};
use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create, open};
use rustix::io::{pread, pwrite};
use transport::testing::{Offer, Script, ScriptedBackend};
use transport::vhost_user::ProtocolFeatures;
use transport::vhost_user::request::BackendRequest;

/// The guest has no addresses above 4 GiB: the BAR is moved to this one, and to another.
const BAR: &str = "C:0x18:0xc8000000";
const ELSEWHERE: &str = "C:0x18:0xca000000";

/// A guest that starts its virtio-pci device, has its BAR 2 where it reaches it, and takes these steps.
fn launch(socket: &Path, kind: &str, steps: &[&str]) -> Launch {
    let line = CommandLine::new("pci").arg("pci", 1).arg("timeout", 30);
    let line =
        ["s", "C:0x1c:0", BAR, "c:0"].iter().chain(steps).fold(line, |line, step| line.arg("step", step));
    let device = format!("{kind},socket={},transport=pci", socket.display());
    Launch::payload(&line).arg("--vhost-user").arg(device)
}

/// It says that its device runs, and reaches the BAR.
const RUNS: &str = "config at=0x0";

/// What the guest printed as `value=`, in order, the first of them the function's ids.
fn values(ended: &Ended) -> Vec<u32> {
    let words = ended.console.split_whitespace().filter_map(|word| word.strip_prefix("value="));
    words.map(|word| u32::from_str_radix(word.trim_start_matches("0x"), 16).unwrap()).collect()
}

#[test]
fn a_guest_reads_and_writes_the_file_that_its_backend_shows_it_and_it_moves_with_the_bar() {
    need!(place::kvm());
    let gadget = Gadget::start();
    let at = |step: &str, offset: u64, more: &str| format!("{step}:2:{:#x}{more}", PLACE + offset);
    let steps = [
        &at("u", 0, &format!(":{WORD:#x}")),
        &at("w", 8, ":0x12345678"),
        // Before it, and behind it.
        &format!("r:2:{:#x}", PLACE - 4),
        &at("r", 0x2000, ""),
        ELSEWHERE,
        &at("r", 8, ""),
        // Without memory decoding there is nothing, and then it is back.
        "C:4:4",
        &at("r", 8, ""),
        "C:4:6",
        &at("R", 8, ":20000"),
    ];
    let ended = launch(&gadget.socket(), "rng", &steps).run().with_code(0);
    let none = u32::MAX;
    assert_eq!(values(&ended)[1..], [none, none, 0x1234_5678, none, 0x1234_5678], "{ended}");
    assert_eq!((gadget.mapped(), gadget.word(8)), (1, 0x1234_5678), "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
    // Looking whether the file is there yet causes some: as many as the backend's time allows.
    assert!(ended.stats().exits() < 20_000, "20 000 reads cause none: {}\n{ended}", ended.stats().exits());
}

/// A backend with three times 2 MiB of shared memory.
fn scripted(scratch: &Scratch) -> ScriptedBackend {
    let offer = Offer::default();
    let protocol = offer.protocol.with(ProtocolFeatures::SHMEM);
    let offer = Offer { protocol, shmem: vec![2 << 20; 3], ..offer };
    ScriptedBackend::listen(&scratch.path("scripted"), offer, Script::normal()).unwrap()
}

/// Has a page of `file` mapped into region 0 for reading and writing; says how that was answered.
fn map(backend: &ScriptedBackend, file: &OwnedFd, from: u64, at: u64) -> u64 {
    map_in(0, backend, file, from, at)
}

fn map_in(region: u64, backend: &ScriptedBackend, file: &OwnedFd, from: u64, at: u64) -> u64 {
    let payload: Vec<u8> = [region, from, at, 0x1000, 1].into_iter().flat_map(u64::to_ne_bytes).collect();
    backend.request(BackendRequest::SHMEM_MAP, &payload, &[file.as_fd()]).unwrap();
    backend.answer(wait::patience(Duration::from_secs(5))).unwrap().0
}

fn file(word: u32) -> OwnedFd {
    let file = memfd_create("window", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 0x2000).unwrap();
    pwrite(&file, &word.to_le_bytes(), 0).unwrap();
    file
}

fn descriptors(vm: &Vm) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().count()
}

#[test]
fn files_made_shorter_read_only_ones_and_our_own_memory_are_survived_in_a_window() {
    need!(place::kvm());
    let scratch = Scratch::new();
    let backend = scripted(&scratch);
    // A word of the guest's own memory, through the window.
    let steps = [
        "u:2:0:0x11",
        "r:2:0",
        "u:2:0:0xffffffff",
        "r:2:0",
        "u:2:0:0x22",
        "w:2:4:0x33",
        "u:2:0:0x44",
        "r:2:0",
    ];
    let vm = launch(&scratch.path("scripted"), "blk", &steps).start();
    vm.expect(RUNS);
    let before = descriptors(&vm);
    let (first, second) = (file(0x11), file(0x22));
    let read_only = format!("/proc/self/fd/{}", first.as_raw_fd());
    let read_only = open(read_only, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    assert_ne!(map(&backend, &read_only, 0, 0x1000), 0, "it may not be written");
    assert_eq!(map(&backend, &first, 0, 0), 0);
    vm.expect("value=0x11");
    ftruncate(&first, 0).unwrap();
    vm.expect("value=0xffffffff");
    // The place is free for another one once it is taken back.
    let unmap: Vec<u8> = [0, 0, 0, 0x1000, 0].into_iter().flat_map(u64::to_ne_bytes).collect();
    let take_back = || {
        backend.request(BackendRequest::SHMEM_UNMAP, &unmap, &[]).unwrap();
        backend.answer(wait::patience(Duration::from_secs(5))).unwrap().0
    };
    assert_eq!(take_back(), 0);
    assert_eq!(map(&backend, &second, 0, 0), 0);
    wait::until("the guest writes", STEP, || {
        let mut word = [0; 4];
        pread(&second, &mut word, 4).unwrap();
        (word == [0x33, 0, 0, 0]).then_some(())
    });
    assert_eq!(take_back(), 0);
    drop(read_only);
    wait::until("the files are let go", STEP, || (descriptors(&vm) == before).then_some(()));
    // Guest memory that nobody uses, as the backend was given it.
    let memory = backend.memory().unwrap();
    pwrite(&memory, &0x44_u32.to_le_bytes(), 0x8_0000).unwrap();
    assert_eq!(map(&backend, &memory, 0x8_0000, 0), 0);
    let ended = vm.end(STEP).with_code(0);
    assert_eq!(values(&ended)[1..], [0x11, u32::MAX, 0x44], "{ended}");
    assert!(ended.log.contains("made a file shorter"), "{ended}");
    assert!(!ended.log.contains("panicked"), "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
    assert!(backend.breaches().is_empty(), "{:?}", backend.breaches());
}

#[test]
fn a_flood_of_maps_ends_before_the_descriptors_of_the_machine_do() {
    need!(place::kvm());
    let scratch = Scratch::new();
    let backend = scripted(&scratch);
    let vm = launch(&scratch.path("scripted"), "blk", &["u:2:0:0x55", "r:2:0"]).start();
    vm.expect(RUNS);
    let (before, file) = (descriptors(&vm), file(0x55));
    let mut taken = 0;
    for region in [1, 2] {
        for page in 0..200 {
            taken += usize::from(map_in(region, &backend, &file, 0, page * 0x1000) == 0);
        }
    }
    assert_eq!((taken, descriptors(&vm)), (256, before + 256));
    let all: Vec<u8> = [1, 0, 0, 2 << 20, 0].into_iter().flat_map(u64::to_ne_bytes).collect();
    backend.request(BackendRequest::SHMEM_UNMAP, &all, &[]).unwrap();
    assert_eq!(backend.answer(wait::patience(Duration::from_secs(5))).unwrap().0, 0);
    assert_eq!(map(&backend, &file, 0, 0), 0);
    let ended = vm.end(STEP).with_code(0);
    assert_eq!(values(&ended)[1..], [0x55], "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
}
