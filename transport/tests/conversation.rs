//! The order and content of what the front end sends, as a strict backend sees it.

#![cfg(test)]

mod support;

use support::{GuestMemory, Rings, whole_life};
use transport::memory::USER_BIAS;
use transport::peer::Limits;
use transport::testing::{Offer, Script, ScriptedBackend};
use transport::vhost_user::features::bit;
use transport::vhost_user::request::Request;
use transport::vhost_user::{Connection, ProtocolFeatures, RingBase, Wanted};

const RING: [&str; 6] = [
    "SET_VRING_NUM",
    "SET_VRING_ADDR",
    "SET_VRING_BASE",
    "SET_VRING_CALL",
    "SET_VRING_KICK",
    "SET_VRING_ENABLE",
];

#[test]
fn a_whole_life_is_in_the_order_that_every_backend_takes() {
    let (backend, stream) = ScriptedBackend::pair(Offer::default(), Script::normal()).unwrap();
    let _session = whole_life(stream, &Limits::default(), &Wanted::default()).unwrap();
    let mut order = vec![
        "GET_FEATURES",
        "GET_PROTOCOL_FEATURES",
        "SET_PROTOCOL_FEATURES",
        "SET_OWNER",
        "GET_QUEUE_NUM",
        "SET_BACKEND_REQ_FD",
        "GET_CONFIG",
        "SET_CONFIG",
        "SET_FEATURES",
        "SET_MEM_TABLE",
    ];
    order.extend(RING.iter().chain(&RING));
    order.extend(["GET_FEATURES", "GET_VRING_BASE", "GET_VRING_BASE"]);
    assert_eq!(backend.conversation(), order);
    assert_eq!(backend.breaches(), Vec::<String>::new());
    for seen in backend.seen() {
        let row = seen.request.row().unwrap();
        let acknowledged = row.answer == transport::vhost_user::request::Answer::Ack;
        let before_reply_ack = seen.request == Request::SET_PROTOCOL_FEATURES;
        assert_eq!(seen.asked, acknowledged && !before_reply_ack, "{}", row.name);
    }
}

#[test]
fn status_is_driven_to_driver_ok_and_back() {
    let mut offer = Offer::default();
    offer.protocol = offer.protocol.with(ProtocolFeatures::STATUS);
    let (backend, stream) = ScriptedBackend::pair(offer, Script::normal()).unwrap();
    let session = whole_life(stream, &Limits::default(), &Wanted::default()).unwrap();
    let statuses: Vec<u8> =
        backend.seen().iter().filter(|s| s.request == Request::SET_STATUS).map(|s| s.payload[0]).collect();
    assert_eq!(statuses, [0x3, 0xb, 0xf, 0]);
    assert_eq!(backend.breaches(), Vec::<String>::new());
    drop(session);
}

#[test]
fn an_old_backend_gets_no_protocol_message_and_no_enable() {
    let offer = Offer { features: 1 << bit::VERSION_1, ..Offer::default() };
    let (backend, stream) = ScriptedBackend::pair(offer, Script::normal()).unwrap();
    let session = whole_life(stream, &Limits::default(), &Wanted::default()).unwrap();
    assert_eq!(session.protocol(), ProtocolFeatures::NONE);
    assert_eq!(session.queue_num(), u16::MAX);
    let sent = backend.conversation();
    assert!(!sent.iter().any(|name| name.contains("PROTOCOL") || name.contains("ENABLE")), "{sent:?}");
    assert_eq!(backend.features(), 1 << bit::VERSION_1);
    assert_eq!(backend.breaches(), Vec::<String>::new());
    assert!(backend.seen().iter().all(|seen| !seen.asked));
}

#[test]
fn every_ring_is_kicked_once_after_the_round_trip() {
    let (backend, stream) = ScriptedBackend::pair(Offer::default(), Script::normal()).unwrap();
    let memory = GuestMemory::new(2 << 20);
    let rings = Rings::new();
    let connection = Connection::from_stream(stream, "scripted", &Limits::default()).unwrap();
    let session = connection.negotiate(&Wanted::default()).unwrap();
    let features = session.offered().accept(1 << bit::VERSION_1).unwrap();
    let live = session.go_live(features, &memory.map, &rings.rings(5)).unwrap();
    for index in 0..2 {
        let (kicks, started, enabled) = backend
            .with_ring(index, |ring| (ring.take_kicks(), ring.is_started(), ring.is_enabled()))
            .unwrap();
        assert_eq!((kicks, started, enabled), (1, true, true));
        backend.with_ring(index, |ring| ring.ring_call().unwrap());
        assert_eq!(rings.calls[usize::try_from(index).unwrap()].take().unwrap(), 1);
    }
    assert_eq!(backend.features(), 1 << bit::VERSION_1 | 1 << bit::PROTOCOL_FEATURES);
    assert_eq!(live.stop().unwrap().1, [RingBase(5), RingBase(0)]);
}

#[test]
fn memory_and_rings_are_told_byte_for_byte() {
    let (backend, stream) = ScriptedBackend::pair(Offer::default(), Script::normal()).unwrap();
    let _session = whole_life(stream, &Limits::default(), &Wanted::default()).unwrap();
    let seen = backend.seen();
    let payload = |request: Request| &seen.iter().find(|s| s.request == request).unwrap().payload;
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
    assert_eq!(*payload(Request::SET_MEM_TABLE), words(&[1, 0, 2 << 20, USER_BIAS, 0]));
    let at = USER_BIAS + 0x1_0000;
    assert_eq!(*payload(Request::SET_VRING_ADDR), words(&[0, at, at + 0x3000, at + 0x2000, 0x1_3000]));
    assert_eq!(*payload(Request::SET_VRING_NUM), [0, 0, 0, 0, 128, 0, 0, 0]);
    assert_eq!(*payload(Request::SET_VRING_KICK), words(&[0]));
    assert_eq!(payload(Request::GET_CONFIG)[..12], [0, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(payload(Request::GET_CONFIG).len(), 72);
    assert_eq!(*payload(Request::SET_CONFIG), [8, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]);
}

#[test]
fn a_badly_laid_out_ring_costs_no_message_and_gives_the_session_back() {
    let (backend, stream) = ScriptedBackend::pair(Offer::default(), Script::normal()).unwrap();
    let memory = GuestMemory::new(2 << 20);
    let rings = Rings::new();
    let connection = Connection::from_stream(stream, "scripted", &Limits::default()).unwrap();
    let session = connection.negotiate(&Wanted::default()).unwrap();
    let before = backend.seen().len();
    let features = session.offered().accept(0).unwrap();
    let mut bad = rings.rings(0);
    bad[1].used.0 = 4 << 20;
    let lost = session.go_live(features, &memory.map, &bad).err().unwrap();
    let (error, session) = lost.into_parts();
    assert_eq!(
        error.to_string(),
        "SET_VRING_ADDR was not sent to vhost-user backend scripted: a part of the ring lies outside guest memory"
    );
    assert_eq!(backend.seen().len(), before);
    let session = session.expect("the connection is still good");
    assert!(session.go_live(features, &memory.map, &rings.rings(0)).is_ok());
}
