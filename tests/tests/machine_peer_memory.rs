//! Memory of peers that goes away under a running guest whose interrupts are on. With hardware paging KVM
//! fetches such a page asynchronously, ignores that it cannot be had, and enters the guest again, for ever:
//! so these tests belong where KVM has hardware paging, on this host or in the lab.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use outboard_tests::launch::{Ended, Launch, STEP};
use outboard_tests::payload::CommandLine;
use outboard_tests::vfio::Server;
use outboard_tests::{need, place, scratch::Scratch, wait};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::pwrite;
use transport::testing::{Offer, Script, ScriptedBackend};
use transport::vhost_user::ProtocolFeatures;
use transport::vhost_user::request::BackendRequest;

/// The tiny kernel, which takes these steps with its interrupts on.
fn launch(line: CommandLine, steps: &[&str]) -> Launch {
    Launch::payload(&steps.iter().fold(line, |line, step| line.arg("step", step)))
}

/// What the guest printed as `value=`, in order.
fn values(ended: &Ended) -> Vec<u32> {
    let words = ended.console.split_whitespace().filter_map(|word| word.strip_prefix("value="));
    words.map(|word| u32::from_str_radix(word.trim_start_matches("0x"), 16).unwrap()).collect()
}

#[test]
fn a_bar_whose_file_is_made_shorter_lets_go_of_the_guest_and_breaks_its_device_alone() {
    need!(place::kvm());
    let (server, other) = (Server::engine(&[]), Server::engine(&[]));
    let steps = ["w:1:0x1000:5", "r:1:0x1000", "u:1:0x1000:0xffffffff", "r:0:0"];
    let vm = launch(CommandLine::new("pci").arg("timeout", 60), &steps)
        .arg("--vfio-user")
        .arg(server.device(",id=engine,deadline=20000"))
        .arg("--vfio-user")
        .arg(other.device(",id=other,deadline=20000"))
        .start();
    vm.expect("value=0x5");
    server.truncate("engine-bar1");
    let ended = vm.end(STEP).with_code(0);
    assert_eq!(values(&ended), [5, u32::MAX], "{ended}");
    assert!(ended.stats().text("/devices/0/broken").contains("shorter"), "{ended}");
    assert_eq!(ended.stats().text("/devices/1/state"), "idle", "the innocent\n{ended}");
}

#[test]
fn a_window_whose_file_is_made_shorter_lets_go_of_the_guest() {
    need!(place::kvm());
    let scratch = Scratch::new();
    let offer = Offer::default();
    let protocol = offer.protocol.with(ProtocolFeatures::SHMEM);
    let offer = Offer { protocol, shmem: vec![2 << 20], ..offer };
    let backend = ScriptedBackend::listen(&scratch.path("scripted"), offer, Script::normal()).unwrap();
    let line = CommandLine::new("pci").arg("pci", 1).arg("timeout", 60);
    // The guest has no addresses above 4 GiB: the BAR is moved below.
    let steps =
        ["s", "C:0x1c:0", "C:0x18:0xc8000000", "c:0", "u:2:0:0x11", "r:2:0", "u:2:0:0xffffffff", "r:2:0"];
    let device = format!("blk,socket={},transport=pci,deadline=20000", scratch.path("scripted").display());
    let vm = launch(line, &steps).arg("--vhost-user").arg(device).start();
    vm.expect("config at=0x0");
    let file: OwnedFd = memfd_create("window", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 0x1000).unwrap();
    pwrite(&file, &0x11_u32.to_le_bytes(), 0).unwrap();
    // A page for reading and writing at the beginning of region 0.
    let payload: Vec<u8> = [0, 0, 0, 0x1000, 1_u64].into_iter().flat_map(u64::to_ne_bytes).collect();
    backend.request(BackendRequest::SHMEM_MAP, &payload, &[file.as_fd()]).unwrap();
    assert_eq!(backend.answer(wait::patience(Duration::from_secs(20))).unwrap().0, 0);
    vm.expect("value=0x11");
    ftruncate(&file, 0).unwrap();
    let ended = vm.end(STEP).with_code(0);
    assert_eq!(values(&ended)[1..], [0x11, u32::MAX], "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
}
