use super::*;

use std::sync::Arc;
use std::time::Duration;

use transport::memory::{GuestAddr, SharedRegion, USER_BIAS};
use transport::peer::Limits;
use transport::testing::{Act, Offer, Script, ScriptedBackend};
use transport::vhost_user::features::bit;
use transport::vhost_user::request::Request;
use transport::vhost_user::{Connection, ProtocolFeatures};

use crate::testing::RAM;
use crate::virtio::PhaseReport;
use crate::virtio::backend::vhost_user::tests::{Daemon, Guest, order};
use crate::virtio::recovery::candidate::open;
use crate::virtio::ring::address::Iommu;

const MORE: u64 = 0x1_0000_0000;

/// `old` with a new region of 2 MiB, and that region.
fn grown(old: &MemoryMap) -> (MemoryMap, SharedRegion) {
    let fd = rustix::fs::memfd_create("more", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 2 << 20).unwrap();
    let region = SharedRegion::new(GuestAddr(MORE), 2 << 20, Arc::new(fd), 0);
    (MemoryMap::new([old.regions(), std::slice::from_ref(&region)].concat()).unwrap(), region)
}

fn rig(features: &str, offer: Offer, script: Script) -> (ScriptedBackend, Guest) {
    let (backend, socket) = ScriptedBackend::pair(offer, script).unwrap();
    let connection =
        Connection::from_stream(socket, "scripted", &Limits::new(Duration::from_secs(5))).unwrap();
    let (guest, _channel, _hang_up) = Guest::new(open(connection, &order(features)).unwrap());
    guest.start_driver();
    (backend, guest)
}

fn with_slots() -> Offer {
    let offer = Offer::default();
    Offer { protocol: offer.protocol.with(ProtocolFeatures::CONFIGURE_MEM_SLOTS), ..offer }
}

/// The messages after the first `before` messages.
fn since(backend: &ScriptedBackend, before: usize) -> Vec<String> {
    backend.conversation().split_off(before)
}

#[test]
fn memory_slots_come_and_go_under_running_queues() {
    let (backend, guest) = rig("+configure_mem_slots", with_slots(), Script::normal());
    let handle = guest.device.handle();
    let (more, _region) = grown(guest.ram());
    let before = backend.conversation().len();
    handle.change_memory(&more).unwrap();
    assert_eq!(since(&backend, before), ["ADD_MEM_REG"]);
    handle.change_memory(&more).unwrap();
    assert_eq!(since(&backend, before).len(), 1, "nothing new");
    handle.change_memory(guest.ram()).unwrap();
    assert_eq!(since(&backend, before), ["ADD_MEM_REG", "REM_MEM_REG"]);
    assert_eq!((handle.phase(), backend.breaches()), (PhaseReport::Running, vec![]));
    // The next start tells the backend all of it.
    guest.write(0x70, 0);
    handle.change_memory(&more).unwrap();
    guest.start_driver();
    let table = backend.seen().into_iter().rfind(|seen| seen.request == Request::SET_MEM_TABLE).unwrap();
    assert_eq!((table.payload[0], table.fds), (2, 2));
}

#[test]
fn without_slots_the_queues_stop_for_a_moment_and_go_on_where_they_were() {
    let (backend, guest) = rig("", Offer::default(), Script::normal());
    let handle = guest.device.handle();
    let (more, _region) = grown(guest.ram());
    let before = backend.seen().len();
    handle.change_memory(&more).unwrap();
    let said = backend.seen().split_off(before);
    let names: Vec<_> = said.iter().map(|seen| seen.request).collect();
    let place = |request| names.iter().position(|name| *name == request).unwrap();
    let order =
        [Request::GET_VRING_BASE, Request::SET_MEM_TABLE, Request::SET_VRING_BASE, Request::SET_VRING_KICK];
    assert!(order.map(place).is_sorted(), "{names:?}");
    assert_eq!(said[place(Request::SET_MEM_TABLE)].payload[0], 2);
    assert_eq!((handle.phase(), guest.machine.page_u32(0x70)), (PhaseReport::Running, 0xf));
    assert_eq!((handle.stats().activations, backend.breaches()), (1, vec![]));
}

/// A rig behind an IOMMU whose addresses are shuffled.
fn rig_behind(features: &str, offer: Offer, script: Script) -> (ScriptedBackend, Guest) {
    let offer = Offer { features: offer.features | 1 << bit::ACCESS_PLATFORM, ..offer };
    let (backend, socket) = ScriptedBackend::pair(offer, script).unwrap();
    let connection =
        Connection::from_stream(socket, "scripted", &Limits::new(Duration::from_secs(5))).unwrap();
    let order = order(features).behind(Arc::new(Iommu::Shuffled.map(&crate::testing::memory())));
    let (guest, _channel, _hang_up) = Guest::new(open(connection, &order).unwrap());
    guest.takes_high.store(3, std::sync::atomic::Ordering::Relaxed);
    guest.start_driver();
    assert_eq!(guest.device.handle().phase(), PhaseReport::Running);
    (backend, guest)
}

/// The translations that the backend was told after the first `before` messages: address, size, destination,
/// kind.
fn translations(backend: &ScriptedBackend, before: usize) -> Vec<(u64, u64, u64, u8)> {
    let told = backend.seen().split_off(before);
    let told = told.iter().filter(|seen| seen.request == Request::IOTLB_MSG);
    told.map(|seen| {
        let word = |n: usize| u64::from_ne_bytes(seen.payload[8 * n..8 * n + 8].try_into().unwrap());
        (word(0), word(1), word(2).saturating_sub(USER_BIAS), seen.payload[25])
    })
    .collect()
}

const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;

#[test]
fn behind_an_iommu_memory_that_comes_is_translated_and_what_goes_is_not() {
    let (backend, guest) = rig_behind("+configure_mem_slots", with_slots(), Script::normal());
    let handle = guest.device.handle();
    let (more, _region) = grown(guest.ram());
    let before = backend.conversation().len();
    handle.change_memory(&more).unwrap();
    assert_eq!(since(&backend, before), ["ADD_MEM_REG", "IOTLB_MSG"]);
    assert_eq!(translations(&backend, before), [(MORE, 2 << 20, MORE, UPDATE)], "itself");
    let before = backend.conversation().len();
    handle.change_memory(guest.ram()).unwrap();
    assert_eq!(
        since(&backend, before),
        ["IOTLB_MSG", "REM_MEM_REG"],
        "first the translation, then the memory"
    );
    assert_eq!(translations(&backend, before), [(MORE, 2 << 20, 0, INVALIDATE)]);
    // Memory that is added while the queues are stopped is told at the next start. The old pieces keep their
    // places.
    guest.write(0x70, 0);
    handle.change_memory(&more).unwrap();
    let before = backend.conversation().len();
    guest.start_driver();
    let pieces =
        [(0, 2 << 20, 2 << 20, UPDATE), (2 << 20, 2 << 20, 0, UPDATE), (MORE, 2 << 20, MORE, UPDATE)];
    assert_eq!(translations(&backend, before), pieces);
    assert_eq!((handle.phase(), backend.breaches()), (PhaseReport::Running, vec![]));
}

#[test]
fn behind_an_iommu_queues_without_slots_stop_for_the_memory_and_are_told_all_anew() {
    let (backend, guest) = rig_behind("", Offer::default(), Script::normal());
    let (more, _region) = grown(guest.ram());
    let before = backend.conversation().len();
    guest.device.handle().change_memory(&more).unwrap();
    let pieces = [
        (0, 4 << 20, 0, INVALIDATE),
        (0, 2 << 20, 2 << 20, UPDATE),
        (2 << 20, 2 << 20, 0, UPDATE),
        (MORE, 2 << 20, MORE, UPDATE),
    ];
    assert_eq!(translations(&backend, before), pieces);
    assert_eq!((guest.device.handle().phase(), backend.breaches()), (PhaseReport::Running, vec![]));
}

#[test]
fn backend_that_takes_memory_but_no_translation_of_it_keeps_what_it_has() {
    // The first two translations belong to the start.
    let refuses = Script::normal().on_nth(Request::IOTLB_MSG, 2, Act::Refuse(1));
    let (backend, guest) = rig_behind("+configure_mem_slots", with_slots(), refuses);
    let handle = guest.device.handle();
    let (more, _region) = grown(guest.ram());
    let before = backend.conversation().len();
    assert_eq!(handle.change_memory(&more), Err(Refused));
    assert_eq!(since(&backend, before), ["ADD_MEM_REG", "IOTLB_MSG", "IOTLB_MSG", "REM_MEM_REG"]);
    handle.change_memory(&more).unwrap();
    assert_eq!(translations(&backend, before).last(), Some(&(MORE, 2 << 20, MORE, UPDATE)));
    assert_eq!((handle.phase(), backend.breaches()), (PhaseReport::Running, vec![]));
}

#[test]
fn backend_that_cannot_hold_the_memory_keeps_what_it_has() {
    let refuses = Script::normal().on(Request::ADD_MEM_REG, Act::Refuse(1));
    let (backend, guest) = rig("+configure_mem_slots", with_slots(), refuses);
    let handle = guest.device.handle();
    let (more, _region) = grown(guest.ram());
    assert_eq!(handle.change_memory(&more), Err(Refused));
    assert_eq!((handle.phase(), backend.breaches()), (PhaseReport::Running, vec![]));
    // Nine regions do not fit into a table; this is known without a message to the backend.
    let (backend, guest) = rig("", Offer::default(), Script::normal());
    let piece = |n: u64| {
        let fd = Arc::clone(guest.ram().regions()[0].shared_fd());
        SharedRegion::new(GuestAddr(n * RAM / 16), RAM / 16, fd, n * RAM / 16)
    };
    let pieces = MemoryMap::new((0..9).map(piece).collect()).unwrap();
    let before = backend.conversation().len();
    assert_eq!(guest.device.handle().change_memory(&pieces), Err(Refused));
    assert!(since(&backend, before).is_empty());
}

#[test]
fn disk_of_qemu_storage_daemon_reads_into_memory_that_came_later() {
    let Some(daemon) = Daemon::start("plug") else { return };
    for features in ["+configure_mem_slots", ""] {
        let (guest, _channel, _hang_up) = Guest::new(daemon.open(&order(features)));
        guest.start_driver();
        assert_eq!(guest.read_sector(5), [5; 512]);
        let (more, region) = grown(guest.ram());
        guest.device.handle().change_memory(&more).unwrap();
        guest.read_sector_to(7, MORE + 0x1000);
        let mut bytes = [0; 512];
        rustix::io::pread(region.fd(), &mut bytes, 0x1000).unwrap();
        assert_eq!(bytes, [7; 512], "{features}");
        guest.device.handle().change_memory(guest.ram()).unwrap();
        assert_eq!(guest.read_sector(9), [9; 512], "{features}");
        guest.device.handle().end();
    }
}

#[test]
fn suspended_device_goes_on_where_it_stood_and_nothing_is_missed() {
    let own = ProtocolFeatures::INFLIGHT_SHMFD;
    let offer = Offer { protocol: Offer::default().protocol.with(own), ..Offer::default() };
    let (backend, guest) = rig("+inflight_shmfd", offer, Script::normal());
    let handle = guest.device.handle();
    let area = |handle: &crate::virtio::DeviceHandle| handle.with(|device| device.inflight.clone());
    let noted = area(&handle).unwrap();
    let before = backend.conversation().len();
    handle.suspend();
    assert_eq!(handle.phase(), PhaseReport::Suspended);
    handle.suspend();
    assert_eq!(since(&backend, before), ["GET_VRING_BASE"]);
    guest.machine.take_interrupts();
    let before = backend.seen().len();
    handle.resume();
    assert_eq!(handle.phase(), PhaseReport::Running);
    let said = backend.seen().split_off(before);
    let sent = |wanted| said.iter().filter(|seen| seen.request == wanted).count();
    assert_eq!((sent(Request::SET_INFLIGHT_FD), sent(Request::GET_INFLIGHT_FD)), (1, 0), "the same area");
    assert!(Arc::ptr_eq(&noted, &area(&handle).unwrap()));
    assert_eq!(sent(Request::SET_VRING_BASE), 1);
    assert_eq!(guest.machine.take_interrupts(), 1, "a call may have been suppressed");
    handle.resume();
    assert_eq!((backend.breaches(), handle.phase()), (vec![], PhaseReport::Running));
    // A reset of a suspended device leaves nothing of the suspension.
    handle.suspend();
    guest.write(0x70, 0);
    assert_eq!((handle.phase(), area(&handle).is_none()), (PhaseReport::Idle, true));
    guest.start_driver();
    assert_eq!(handle.phase(), PhaseReport::Running);
}

#[test]
fn device_without_a_backend_is_as_broken_after_a_pause_and_one_lost_in_it_is_told_afterwards() {
    let (backend, guest) = rig("", Offer::default(), Script::normal());
    let handle = guest.device.handle();
    handle.suspend();
    backend.hang_up();
    handle.connection_ended();
    assert!(matches!(handle.phase(), PhaseReport::Broken(_)));
    handle.suspend();
    handle.resume();
    assert!(matches!(handle.phase(), PhaseReport::Broken(_)));
    assert_eq!(guest.machine.page_u32(0x70), 0x4f);
}

#[test]
fn queues_are_suspended_with_what_is_in_flight_and_the_state_moves_while_they_stand() {
    type P = ProtocolFeatures;
    let own = P::INFLIGHT_SHMFD.with(P::GET_VRING_BASE_INFLIGHT).with(P::GET_VRING_BASE_SKIP_DRAIN);
    let offer = Offer::default();
    let offer = Offer { protocol: offer.protocol.with(own).with(P::DEVICE_STATE), ..offer };
    let features = "+inflight_shmfd+get_vring_base_inflight+get_vring_base_skip_drain+device_state";
    let (backend, guest) = rig(features, offer, Script::normal());
    guest.device.handle().with(|device| {
        let mut state = Vec::new();
        assert!(matches!(device.backend.standing(), Err(BackendError::Refused(_))), "they run");
        assert_eq!(device.backend.stop(Stop::Suspend).unwrap().len(), 1);
        assert_eq!(device.backend.standing().unwrap().save_state(&mut state, 100).unwrap(), 5);
        assert_eq!(device.backend.standing().unwrap().load_state(&mut state.as_slice()).unwrap(), 5);
        assert_eq!(state, b"state");
    });
    assert_eq!(backend.take_loaded_state(), b"state");
    let names = backend.conversation();
    let asks = |name: &str| names.iter().filter(|other| *other == name).count();
    assert_eq!((asks("GET_VRING_BASE_SKIP_DRAIN"), asks("GET_VRING_BASE")), (1, 0));
    assert_eq!(backend.breaches(), Vec::<String>::new());
}
