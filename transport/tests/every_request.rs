//! Each request beyond an ordinary life: sent when negotiated, encoded and answered as the table says, and its
//! wrong answers caught.

#![cfg(test)]

mod support;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use support::{GuestMemory, Rings};
use transport::memory::DirtyLog;
use transport::memory::log_size;
use transport::memory::{GuestAddr, Iova, USER_BIAS};
use transport::peer::{Cause, Limits};
use transport::testing::{Act, Offer, Script, ScriptedBackend};
use transport::vhost_user::extras::{SessionId, SymmetricSession};
use transport::vhost_user::features::bit;
use transport::vhost_user::iotlb::{Access, IovaRange};
use transport::vhost_user::message::Uuid;
use transport::vhost_user::request::{Request, TABLE};
use transport::vhost_user::{
    Connection, IovaMap, LiveSession, ProtocolFeatures, RingBase, RingSwitch, Session, Wanted,
};

type P = ProtocolFeatures;

fn offer(protocol: P) -> Offer {
    let mut offer = Offer::default();
    offer.protocol = offer.protocol.with(protocol);
    offer.features |= 1 << bit::ACCESS_PLATFORM;
    offer
}

fn session_of(offer: Offer, script: Script, wanted: &Wanted) -> (ScriptedBackend, Session) {
    let (backend, stream) = ScriptedBackend::pair(offer, script).unwrap();
    let limits = Limits::new(Duration::from_millis(500));
    let session = Connection::from_stream(stream, "scripted", &limits).unwrap().negotiate(wanted).unwrap();
    (backend, session)
}

fn session(protocol: P, script: Script) -> (ScriptedBackend, Session) {
    session_of(offer(protocol), script, &Wanted::default().and(protocol))
}

fn live(session: Session, features: u64) -> (LiveSession, GuestMemory, Rings) {
    let (memory, rings) = (GuestMemory::new(2 << 20), Rings::new());
    let features = session.offered().accept(features).unwrap();
    let live = session.go_live(features, &memory.map, &rings.rings(0)).unwrap();
    (live, memory, rings)
}

/// The payloads of all `request`s so far.
fn payloads(backend: &ScriptedBackend, request: Request) -> Vec<Vec<u8>> {
    backend.seen().into_iter().filter(|seen| seen.request == request).map(|seen| seen.payload).collect()
}

fn done(backend: &ScriptedBackend) {
    assert_eq!(backend.breaches(), Vec::<String>::new());
}

#[test]
fn inflight_is_asked_for_handed_over_and_kept_for_the_next_backend() {
    let (backend, first) = session(P::INFLIGHT_SHMFD, Script::normal());
    let (running, _memory, _rings) = live(first, 0);
    let area = Arc::clone(running.inflight().unwrap());
    assert_eq!((area.size(), area.covers()), (8192, (2, 128)));
    let names = backend.conversation();
    let at = |name: &str| names.iter().position(|n| n == name).unwrap();
    assert!(at("SET_FEATURES") < at("GET_INFLIGHT_FD"));
    assert!(at("GET_INFLIGHT_FD") < at("SET_INFLIGHT_FD") && at("SET_INFLIGHT_FD") < at("SET_MEM_TABLE"));
    done(&backend);

    let (next, session) = session(P::INFLIGHT_SHMFD, Script::normal());
    let (_running, _memory, _rings) = live(session.with_inflight(area), 0);
    assert!(payloads(&next, Request::GET_INFLIGHT_FD).is_empty(), "the kept one is used");
    assert_eq!(payloads(&next, Request::SET_INFLIGHT_FD), payloads(&backend, Request::SET_INFLIGHT_FD));
    done(&next);
}

#[test]
fn inflight_areas_that_lie_are_refused() {
    let words = |size: u64, offset: u64| {
        let mut payload = [size, offset].map(u64::to_ne_bytes).concat();
        payload.extend([0; 8]);
        payload
    };
    for (act, fatal) in [
        (Act::Payload(words(0, 0)), false),
        (Act::Payload(words(16, 0)), true),
        (Act::Payload(words(8192, 4096)), true),
        (Act::Payload(words(8192, u64::MAX)), true),
        (Act::Fds(0), true),
        (Act::Fds(2), true),
        (Act::Payload(vec![0; 19]), true),
    ] {
        let script = Script::normal().on(Request::GET_INFLIGHT_FD, act.clone());
        let (_backend, session) = session(P::INFLIGHT_SHMFD, script);
        let (memory, rings) = (GuestMemory::new(2 << 20), Rings::new());
        let features = session.offered().accept(0).unwrap();
        let lost = session.go_live(features, &memory.map, &rings.rings(0)).err().unwrap();
        assert_eq!(lost.error().is_fatal(), fatal, "{act:?}: {lost:?}");
        assert!(lost.into_parts().1.is_none());
    }
}

#[test]
fn suspended_rings_keep_their_inflight_area_and_drained_ones_do_not() {
    let skip = P::INFLIGHT_SHMFD.with(P::GET_VRING_BASE_INFLIGHT).with(P::GET_VRING_BASE_SKIP_DRAIN);
    // What a backend without the newer request never drains, a stop of ours leaves in its area as well.
    for (features, name, drained) in [
        (skip, "GET_VRING_BASE_SKIP_DRAIN", 1),
        (P::INFLIGHT_SHMFD.with(P::GET_VRING_BASE_INFLIGHT), "GET_VRING_BASE", 0),
    ] {
        let (backend, session) = session(features, Script::normal());
        let (running, memory, rings) = live(session, 0);
        let (session, bases) = running.suspend().unwrap();
        assert_eq!(bases, [RingBase(0); 2]);
        assert_eq!(backend.conversation().last().unwrap(), name);
        let features = session.offered().accept(0).unwrap();
        let running = session.go_live(features, &memory.map, &rings.rings(0)).unwrap();
        assert_eq!(payloads(&backend, Request::GET_INFLIGHT_FD).len(), 1);
        let (session, _) = running.stop().unwrap();
        let running = session.go_live(features, &memory.map, &rings.rings(0)).unwrap();
        let asked = || payloads(&backend, Request::GET_INFLIGHT_FD).len();
        assert_eq!(asked(), 1 + drained, "a drained area is not used again");
        running.reset().unwrap().go_live(features, &memory.map, &rings.rings(0)).unwrap();
        assert_eq!(asked(), 2 + drained, "nor that of another driver");
        done(&backend);
    }
}

#[test]
fn the_log_is_set_before_features_and_addresses_and_taken_back_in_reverse() {
    for act in [
        Act::Delay(Duration::ZERO),
        Act::Payload(vec![]),
        Act::Payload(vec![1; 16]),
        Act::Flags(0xd),
        Act::Fds(1),
        Act::Fds(253),
    ] {
        let (backend, session) = session(P::LOG_SHMFD, Script::normal().on(Request::SET_LOG_BASE, act));
        assert!(session.can_log());
        let (mut running, memory, _rings) = live(session, 0);
        let before = backend.conversation().len();
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let size = log_size(&memory.map);
        rustix::fs::ftruncate(&fd, size).unwrap();
        running.start_log(Arc::new(DirtyLog::new(fd, size, 0))).unwrap();
        running.stop_log().unwrap();
        let order = ["SET_LOG_BASE", "SET_FEATURES", "SET_VRING_ADDR", "SET_VRING_ADDR"];
        let reverse = ["SET_VRING_ADDR", "SET_VRING_ADDR", "SET_FEATURES"];
        assert_eq!(backend.conversation()[before..], [order.as_slice(), &reverse].concat());
        let features = payloads(&backend, Request::SET_FEATURES);
        assert_eq!(features[1], (1u64 << 30 | 1 << 26).to_ne_bytes());
        assert_eq!(features[2], (1u64 << 30).to_ne_bytes());
        let addresses = payloads(&backend, Request::SET_VRING_ADDR);
        assert_eq!(addresses[2][..8], [0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(addresses[2][32..], 0x1_3000u64.to_ne_bytes());
        assert_eq!(addresses[4][..8], [0, 0, 0, 0, 0, 0, 0, 0]);
        done(&backend);
    }
}

#[test]
fn a_log_that_is_refused_or_answered_out_of_form_ends_the_connection_by_name() {
    // Who logs nothing would let a migration lose what its backend wrote. The protocol has no flag for errors: whatever
    // a backend sets there is no answer.
    for (act, named) in [
        (Act::Flags(0x25), "flags"),
        (Act::Flags(1), "flags"),
        (Act::ClaimSize(u32::MAX), "4294967295 bytes"),
        (Act::As(Request::SET_LOG_FD), "a message of request 7"),
        (Act::Close, "closed"),
    ] {
        let (_backend, session) =
            session(P::LOG_SHMFD, Script::normal().on(Request::SET_LOG_BASE, act.clone()));
        let (mut running, memory, _rings) = live(session, 0);
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let size = log_size(&memory.map);
        rustix::fs::ftruncate(&fd, size).unwrap();
        let error = running.start_log(Arc::new(DirtyLog::new(fd, size, 0))).unwrap_err();
        assert!(error.is_fatal(), "{act:?}: {error}");
        let text = error.to_string();
        assert!(text.contains("SET_LOG_BASE") && text.contains(named), "{act:?}: {text}");
    }
}

#[test]
fn a_device_that_starts_while_logging_logs_from_its_first_ring_on() {
    let (backend, session) = session(P::LOG_SHMFD, Script::normal());
    let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let session = session.with_log(Arc::new(DirtyLog::new(fd, 4096, 0)));
    let (mut running, _memory, _rings) = live(session, 0);
    let names = backend.conversation();
    let at = |name: &str| names.iter().position(|n| n == name).unwrap();
    assert!(at("SET_MEM_TABLE") < at("SET_LOG_BASE") && at("SET_LOG_BASE") < at("SET_VRING_NUM"));
    assert_eq!(backend.features(), 1 << 30 | 1 << 26);
    assert_eq!(payloads(&backend, Request::SET_VRING_ADDR)[0][4], 1);
    let eventfd = transport::vhost_user::Call::new().unwrap();
    running.notify_log(eventfd.as_fd()).unwrap();
    done(&backend);
}

#[test]
fn memory_slots_are_asked_for_added_and_removed() {
    let (backend, session) = session(P::CONFIGURE_MEM_SLOTS, Script::normal());
    let (mut running, _memory, _rings) = live(session, 0);
    assert!(running.has_mem_slots());
    let more = GuestMemory::new(2 << 20);
    let region = transport::memory::SharedRegion::new(
        GuestAddr(1 << 32),
        2 << 20,
        Arc::clone(more.map.regions()[0].shared_fd()),
        0,
    );
    running.add_region(&region).unwrap();
    running.remove_region(&region).unwrap();
    let wire = [0u64, 1 << 32, 2 << 20, USER_BIAS + (1 << 32), 0].map(u64::to_ne_bytes).concat();
    assert_eq!(payloads(&backend, Request::ADD_MEM_REG), std::slice::from_ref(&wire));
    assert_eq!(payloads(&backend, Request::REM_MEM_REG), [wire]);
    assert_eq!(payloads(&backend, Request::GET_MAX_MEM_SLOTS).len(), 1);
    done(&backend);
}

#[test]
fn more_than_eight_regions_need_slots() {
    let regions: Vec<_> = (0..10u64)
        .map(|n| {
            let memory = GuestMemory::new(2 << 20);
            let fd = Arc::clone(memory.map.regions()[0].shared_fd());
            transport::memory::SharedRegion::new(GuestAddr(n << 21), 2 << 20, fd, 0)
        })
        .collect();
    let map = transport::memory::MemoryMap::new(regions).unwrap();
    let rings = Rings::new();
    for (slots, fits) in [(0, false), (9, false), (10, true), (u64::MAX, true)] {
        let offer = Offer { mem_slots: slots, ..offer(P::CONFIGURE_MEM_SLOTS) };
        let wanted = Wanted::default().and(P::CONFIGURE_MEM_SLOTS);
        let (backend, session) = session_of(offer, Script::normal(), &wanted);
        let features = session.offered().accept(0).unwrap();
        let outcome = session.go_live(features, &map, &rings.rings(0));
        assert_eq!(outcome.is_ok(), fits, "{slots} slots");
        assert_eq!(payloads(&backend, Request::ADD_MEM_REG).len(), if fits { 2 } else { 0 });
        done(&backend);
    }
}

#[test]
fn device_state_is_saved_and_loaded_through_a_pipe() {
    let state: Vec<u8> = (0..300_000u32).map(|n| (n % 249) as u8).collect();
    let offer = Offer { state: state.clone(), ..offer(P::DEVICE_STATE) };
    let (backend, mut session) = session_of(offer, Script::normal(), &Wanted::default().and(P::DEVICE_STATE));
    let mut saved = Vec::new();
    assert_eq!(session.save_state(&mut saved, 1 << 20).unwrap(), 300_000);
    assert_eq!(saved, state);
    assert_eq!(session.load_state(&mut state.as_slice()).unwrap(), 300_000);
    assert_eq!(backend.take_loaded_state(), state);
    assert_eq!(payloads(&backend, Request::SET_DEVICE_STATE_FD), [vec![0; 8], vec![1, 0, 0, 0, 0, 0, 0, 0]]);
    done(&backend);
}

#[test]
fn device_states_that_are_endless_refused_or_rejected_are_named() {
    let wanted = Wanted::default().and(P::DEVICE_STATE);
    let large = Offer { state: vec![0; 100_000], ..offer(P::DEVICE_STATE) };
    let (_backend, mut session) = session_of(large, Script::normal(), &wanted);
    assert!(session.save_state(&mut Vec::new(), 1000).unwrap_err().is_fatal());

    let empty = Offer { state: Vec::new(), state_check: 5, ..offer(P::DEVICE_STATE) };
    let (_backend, mut session) = session_of(empty, Script::normal(), &wanted);
    let error = session.load_state(&mut [1u8, 2].as_slice()).unwrap_err();
    assert_eq!(error.to_string(), "vhost-user backend scripted refused CHECK_DEVICE_STATE (code 0x5)");

    for (answer, fds, fatal) in [(0x101u64, 0, false), (0x100, 1, true), (0, 0, true)] {
        let script =
            Script::normal().on(Request::SET_DEVICE_STATE_FD, Act::Payload(answer.to_ne_bytes().to_vec()));
        let script =
            if fds == 1 { Script::normal().on(Request::SET_DEVICE_STATE_FD, Act::Fds(1)) } else { script };
        let (_backend, mut session) = session_of(offer(P::DEVICE_STATE), script, &wanted);
        let error = session.save_state(&mut Vec::new(), 1000).unwrap_err();
        assert_eq!(error.is_fatal(), fatal, "{answer:#x}: {error:?}");
    }

    struct Broken;
    impl std::io::Write for Broken {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (_backend, mut session) = session_of(offer(P::DEVICE_STATE), Script::normal(), &wanted);
    let error = session.save_state(&mut Broken, 1000).unwrap_err();
    assert!(!error.is_fatal(), "a full disk of ours is not the peer's fault: {error:?}");
    assert!(session.read_config(60).is_ok());
}

#[test]
fn a_state_that_does_not_come_ends_by_the_deadline() {
    let pause = Duration::from_secs(3);
    let offer = Offer { state_pause: pause, ..offer(P::DEVICE_STATE) };
    let (_backend, mut session) =
        session_of(offer, Script::normal(), &Wanted::default().and(P::DEVICE_STATE));
    let begin = Instant::now();
    let error = session.save_state(&mut Vec::new(), 1000).unwrap_err();
    assert_eq!(
        error.to_string(),
        "vhost-user backend scripted did not answer the device state transfer within 500 ms"
    );
    assert!(begin.elapsed() < pause, "{:?}", begin.elapsed());
    assert!(session.read_config(60).is_err(), "the connection is not used again");
}

#[test]
fn net_messages_carry_mtu_and_mac() {
    let (backend, mut session) = session(P::MTU.with(P::RARP), Script::normal());
    session.set_mtu(9000).unwrap();
    let (mut running, _memory, _rings) = live(session, 0);
    running.send_rarp([2, 0, 0, 0, 0, 7]).unwrap();
    assert_eq!(payloads(&backend, Request::NET_SET_MTU), [9000u64.to_ne_bytes()]);
    assert_eq!(payloads(&backend, Request::SEND_RARP), [[2, 0, 0, 0, 0, 7, 0, 0]]);
    done(&backend);
}

#[test]
fn behind_an_iommu_rings_are_told_as_iovas_and_ranges_are_announced() {
    let wanted = Wanted::default().adjust("+access_platform").unwrap();
    let (backend, session) = session_of(offer(P::NONE), Script::normal(), &wanted);
    let (mut running, memory, _rings) = live(session, 1 << bit::ACCESS_PLATFORM);
    assert_eq!(payloads(&backend, Request::SET_VRING_ADDR)[0][8..16], 0x1_0000u64.to_ne_bytes());
    let announced = &payloads(&backend, Request::IOTLB_MSG)[0].clone();
    let words = [0u64, 2 << 20, USER_BIAS].map(u64::to_ne_bytes).concat();
    assert_eq!(announced[..24], words);
    assert_eq!(announced[24..], [3, 2, 0, 0, 0, 0, 0, 0]);

    let again = IovaMap::identity(&memory.map).ranges()[0];
    running.announce(&again).unwrap();
    assert_eq!(payloads(&backend, Request::IOTLB_MSG)[1], *announced);
    running.iotlb_invalidate(Iova(0x5000), 0x1000).unwrap();
    assert_eq!(payloads(&backend, Request::IOTLB_MSG)[2][25], 3);
    done(&backend);
}

#[test]
fn a_shuffled_iova_map_places_the_rings() {
    let wanted = Wanted::default().adjust("+access_platform").unwrap();
    let (backend, session) = session_of(offer(P::NONE), Script::normal(), &wanted);
    let (memory, rings) = (GuestMemory::new(2 << 20), Rings::new());
    let range = |iova: u64, guest: u64| IovaRange {
        iova: Iova(iova),
        size: 0x1_0000,
        guest: GuestAddr(guest),
        access: Access::ReadWrite,
    };
    let map = IovaMap::new(vec![range(0x1_0000, 0x8_0000), range(0x2_0000, 0x3_0000)], &memory.map).unwrap();
    let session = session.with_iova_map(Arc::new(map));
    let features = session.offered().accept(1 << bit::ACCESS_PLATFORM).unwrap();
    let running = session.go_live(features, &memory.map, &rings.rings(0)).unwrap();
    assert_eq!(payloads(&backend, Request::IOTLB_MSG).len(), 2);
    drop(running);
    done(&backend);
}

#[test]
fn shared_memory_sizes_are_read_by_region() {
    let offer = Offer { shmem: vec![0, 1 << 21], ..offer(P::SHMEM.with(P::BACKEND_SEND_FD)) };
    let wanted = Wanted::default().and(P::SHMEM).and(P::BACKEND_SEND_FD);
    let (backend, mut session) = session_of(offer, Script::normal(), &wanted);
    assert_eq!(session.shmem_config().unwrap(), [0, 1 << 21]);
    done(&backend);
}

#[test]
fn objects_gpu_sockets_kicks_and_switches_are_passed_on() {
    let features = P::SHARED_OBJECT.with(P::BACKEND_SEND_FD).with(P::INBAND_NOTIFICATIONS);
    let (backend, mut session) = session(features, Script::normal());
    let (display, _other) = UnixStream::pair().unwrap();
    session.set_gpu_socket(display.as_fd()).unwrap();
    let (mut running, _memory, _rings) = live(session, 0);
    let _object = running.shared_object(Uuid { bytes: [5; 16] }).unwrap();
    assert_eq!(payloads(&backend, Request::GET_SHARED_OBJECT), [[5; 16]]);
    running.kick_in_band(1).unwrap();
    // Those that started the rings in place of eventfds, then this one.
    assert_eq!(payloads(&backend, Request::VRING_KICK), [0, 1, 1].map(|ring| [ring, 0, 0, 0, 0, 0, 0, 0]));
    assert!(payloads(&backend, Request::SET_VRING_KICK).is_empty());
    running.switch_rings(&[1], RingSwitch::Disabled).unwrap();
    assert_eq!(backend.with_ring(1, |ring| ring.is_enabled()), Some(false));
    running.switch_rings(&[1], RingSwitch::Enabled).unwrap();
    assert_eq!(backend.with_ring(1, |ring| ring.is_enabled()), Some(true));
    done(&backend);
}

#[test]
fn an_object_that_is_not_there_is_a_refusal() {
    let features = P::SHARED_OBJECT.with(P::BACKEND_SEND_FD);
    let (_backend, session) = session(features, Script::normal().on(Request::GET_SHARED_OBJECT, Act::Fds(0)));
    let (mut running, _memory, _rings) = live(session, 0);
    let error = running.shared_object(Uuid { bytes: [5; 16] }).unwrap_err();
    assert!(matches!(error.cause(), Cause::Refused(0)), "{error:?}");
}

#[test]
fn crypto_sessions_are_opened_refused_and_closed() {
    let script = Script::normal().on_nth(
        Request::CREATE_CRYPTO_SESSION,
        1,
        Act::Payload((-1i64).to_ne_bytes().to_vec()),
    );
    let (backend, session) = session(P::CRYPTO_SESSION, script);
    let (mut running, _memory, _rings) = live(session, 0);
    let id = running.create_crypto_session(&SymmetricSession::default()).unwrap();
    assert_eq!(id, SessionId(7));
    let error = running.create_crypto_session(&SymmetricSession::default()).unwrap_err();
    assert!(matches!(error.cause(), Cause::Refused(1)), "{error:?}");
    running.close_crypto_session(id).unwrap();
    assert_eq!(payloads(&backend, Request::CLOSE_CRYPTO_SESSION), [7u64.to_ne_bytes()]);
    done(&backend);
}

#[test]
fn postcopy_is_advised_listened_for_told_its_memory_and_ended() {
    let (backend, mut session) = session(P::PAGEFAULT, Script::normal());
    let memory = GuestMemory::new(2 << 20);
    let advised = session.postcopy_advise().unwrap();
    session.postcopy_listen(&advised).unwrap();
    let bases = session.postcopy_memory(&advised, &memory.map).unwrap();
    assert_eq!((bases.len(), bases[0].base, bases[0].size), (1, 0x7777_7777_7777_7777, 2 << 20));
    session.postcopy_end(advised).unwrap();
    let tables = payloads(&backend, Request::SET_MEM_TABLE);
    assert_eq!((tables.len(), tables[1].as_slice()), (2, [0; 8].as_slice()), "the table is acknowledged");
    done(&backend);
}

#[test]
fn status_and_reset_and_restored_configuration() {
    let (backend, mut session) = session(P::STATUS.with(P::RESET_DEVICE), Script::normal());
    assert_eq!(session.status().unwrap(), 0);
    session.reset_device().unwrap();
    session.restore_config(&[9; 60]).unwrap();
    assert_eq!(payloads(&backend, Request::SET_CONFIG)[0][8], 1, "the live migration flag");
    let (running, _memory, _rings) = live(session, 0);
    assert_eq!(backend.status(), 0xf);
    drop(running);
    done(&backend);
}

#[test]
fn a_reset_reaches_the_device_by_its_status_or_by_its_own_request_and_a_stop_does_not() {
    let said = |protocol: P, script, stop: fn(LiveSession) -> Session| {
        let mut offer = offer(protocol);
        offer.protocol = offer.protocol.without(P::RESET_DEVICE).with(protocol);
        let (backend, fresh) = session_of(offer, script, &Wanted::default());
        let (running, memory, rings) = live(fresh, 0);
        let before = backend.seen().len();
        let stopped = stop(running);
        let said: Vec<_> = backend.seen()[before..].iter().map(|seen| seen.request).collect();
        // The session goes on, its features told anew.
        let features = stopped.offered().accept(1 << 32).unwrap();
        let again = stopped.go_live(features, &memory.map, &rings.rings(0)).unwrap();
        assert_eq!(backend.features(), 1 << 32 | 1 << 30);
        drop(again);
        done(&backend);
        said
    };
    let rings = [Request::GET_VRING_BASE; 2];
    let with = |more: &[Request]| [&rings, more].concat();
    let stop = |live: LiveSession| live.stop().unwrap().0;
    let reset = |live: LiveSession| live.reset().unwrap();
    let both = P::STATUS.with(P::RESET_DEVICE);
    assert_eq!(said(P::RESET_DEVICE, Script::normal(), reset), with(&[Request::RESET_DEVICE]));
    assert_eq!(said(both, Script::normal(), reset), with(&[Request::SET_STATUS]));
    assert_eq!(said(P::NONE, Script::normal(), reset), rings);
    assert_eq!(said(P::RESET_DEVICE, Script::normal(), stop), rings);
    let refuses = Script::normal().on(Request::RESET_DEVICE, Act::Refuse(1));
    assert_eq!(said(P::RESET_DEVICE, refuses, reset), with(&[Request::RESET_DEVICE]));
}

#[test]
fn every_request_that_needs_a_feature_is_refused_without_it() {
    let (backend, mut session) = session_of(
        Offer { protocol: P::REPLY_ACK, ..Offer::default() },
        Script::normal(),
        &Wanted::default().and(P::from_bits(u64::MAX)),
    );
    let before = backend.seen().len();
    let unsent = |outcome: Result<(), transport::peer::Error>| {
        assert!(matches!(outcome.unwrap_err().cause(), Cause::NotNegotiated));
    };
    unsent(session.read_config(4).map(drop));
    unsent(session.reset_device());
    unsent(session.status().map(drop));
    unsent(session.set_mtu(1500));
    unsent(session.shmem_config().map(drop));
    unsent(session.postcopy_advise().map(drop));
    unsent(session.save_state(&mut Vec::new(), 1).map(drop));
    unsent(session.load_state(&mut [].as_slice()).map(drop));
    assert_eq!(backend.seen().len(), before);
    let (mut running, memory, _rings) = live(session, 0);
    let before = backend.seen().len();
    unsent(running.send_rarp([0; 6]));
    unsent(running.kick_in_band(0));
    unsent(running.add_region(&memory.map.regions()[0]));
    unsent(running.remove_region(&memory.map.regions()[0]));
    unsent(running.shared_object(Uuid { bytes: [0; 16] }).map(drop));
    unsent(running.create_crypto_session(&SymmetricSession::default()).map(drop));
    unsent(running.close_crypto_session(SessionId(0)));
    unsent(running.iotlb_invalidate(Iova(0), 1));
    let fd = std::fs::File::open("/dev/null").unwrap();
    unsent(running.start_log(Arc::new(DirtyLog::new(fd.into(), 4096, 0))));
    assert_eq!(backend.seen().len(), before);
    assert_eq!(TABLE.len(), 45);
}
