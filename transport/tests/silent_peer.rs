//! Peers that do not answer, not in time, not wholly, or do not read: every wait ends by its deadline.

#![cfg(test)]

mod support;

use std::time::{Duration, Instant};

use support::{GuestMemory, Rings, life_with, open_fds};
use transport::peer::{Cause, Limits};
use transport::testing::{Act, Offer, Script, ScriptedBackend};
use transport::vhost_user::request::Request;
use transport::vhost_user::{Connection, ProtocolFeatures, Wanted};

/// Long enough for everything that is not silent, on a machine that builds something else meanwhile.
const DEADLINE: Duration = Duration::from_millis(700);
const SLACK: Duration = Duration::from_secs(10);

/// Every request of a whole life that has an answer.
const ANSWERED: [Request; 17] = [
    Request::GET_FEATURES,
    Request::GET_PROTOCOL_FEATURES,
    Request::SET_OWNER,
    Request::GET_QUEUE_NUM,
    Request::SET_BACKEND_REQ_FD,
    Request::GET_CONFIG,
    Request::SET_CONFIG,
    Request::SET_STATUS,
    Request::SET_FEATURES,
    Request::SET_MEM_TABLE,
    Request::SET_VRING_NUM,
    Request::SET_VRING_ADDR,
    Request::SET_VRING_BASE,
    Request::SET_VRING_CALL,
    Request::SET_VRING_KICK,
    Request::SET_VRING_ENABLE,
    Request::GET_VRING_BASE,
];

fn offer() -> Offer {
    let mut offer = Offer::default();
    offer.protocol = offer.protocol.with(ProtocolFeatures::STATUS);
    offer
}

#[test]
fn silence_at_any_request_ends_by_the_deadline_and_leaks_nothing() {
    for request in ANSWERED {
        let acts = [
            (Act::Silent, "silent"),
            (Act::StallAfter(5), "half a header"),
            (Act::StallAfter(12), "header and no payload"),
            (Act::Drip(Duration::from_millis(100)), "one byte now and then"),
            (Act::StopReading, "not reading any more"),
        ];
        // All the ways to be silent for one request of each kind, plain silence for the others.
        let kind = matches!(request, Request::GET_FEATURES | Request::SET_OWNER | Request::GET_VRING_BASE);
        for (act, what) in acts.into_iter().take(if kind { 5 } else { 1 }) {
            let before = open_fds();
            let (outcome, took) = life_with(offer(), Script::normal().on(request, act), DEADLINE);
            let error = outcome.unwrap_err();
            assert!(matches!(error.cause(), Cause::Silent(_)), "{request} {what}: {error:?}");
            // The start tells of 2 MiB of memory, for which 8 ms are granted.
            let said =
                |limit| format!("vhost-user backend scripted did not answer {request} within {limit} ms");
            assert!([700, 708].map(said).contains(&error.to_string()), "{error}");
            assert!(error.hint().is_some());
            assert!(took >= DEADLINE && took < DEADLINE + SLACK, "{request} {what}: {took:?}");
            assert_eq!(open_fds(), before, "{request} {what}");
        }
    }
    a_slow_answer_within_the_deadline_is_fine();
    the_deadline_is_for_all_messages_of_an_operation();
    a_late_answer_is_never_taken_for_the_next_one();
    a_peer_that_stops_reading_is_noticed_when_the_buffer_is_full();
}

fn a_slow_answer_within_the_deadline_is_fine() {
    for request in ANSWERED {
        let script = Script::normal().on_nth(request, 0, Act::Delay(Duration::from_millis(20)));
        let (outcome, _) = life_with(offer(), script, Duration::from_secs(2));
        outcome.unwrap();
    }
    // Asking what a backend is takes several requests: each has the deadline for itself.
    let asked = [Request::GET_FEATURES, Request::GET_PROTOCOL_FEATURES, Request::SET_OWNER];
    let slow = |script: Script, request| script.on_nth(request, 0, Act::Delay(DEADLINE * 2 / 3));
    let (outcome, took) = life_with(offer(), asked.into_iter().fold(Script::normal(), slow), DEADLINE);
    outcome.unwrap();
    assert!(took > DEADLINE, "{took:?}");
    let script = Script::normal().on(Request::GET_CONFIG, Act::Drip(Duration::ZERO));
    life_with(offer(), script, Duration::from_secs(2)).0.unwrap();
}

fn the_deadline_is_for_all_messages_of_an_operation() {
    // Each ring message alone would be in time; going live as a whole is not.
    let script = Script::normal().on(Request::SET_VRING_NUM, Act::Delay(Duration::from_millis(500)));
    let (outcome, took) = life_with(offer(), script, DEADLINE);
    assert!(matches!(outcome.unwrap_err().cause(), Cause::Silent(_)));
    assert!(took < DEADLINE + SLACK, "{took:?}");
}

fn a_late_answer_is_never_taken_for_the_next_one() {
    let script = Script::normal().on_nth(Request::GET_CONFIG, 0, Act::Delay(2 * DEADLINE));
    let (backend, stream) = ScriptedBackend::pair(offer(), script).unwrap();
    let connection = Connection::from_stream(stream, "scripted", &Limits::new(DEADLINE)).unwrap();
    let mut session = connection.negotiate(&Wanted::default()).unwrap();
    assert!(session.read_config(60).unwrap_err().is_fatal());
    let sent = backend.seen().len();
    std::thread::sleep(Duration::from_millis(400));
    let again = session.read_config(60).unwrap_err();
    assert!(matches!(again.cause(), Cause::AlreadyLost), "{again:?}");
    let (memory, rings) = (GuestMemory::new(2 << 20), Rings::new());
    let features = session.offered().accept(0).unwrap();
    let lost = session.go_live(features, &memory.map, &rings.rings(0)).err().unwrap();
    assert!(matches!(lost.error().cause(), Cause::AlreadyLost));
    assert_eq!(backend.seen().len(), sent, "nothing is sent to a lost peer");
}

fn a_peer_that_stops_reading_is_noticed_when_the_buffer_is_full() {
    let mut offer = offer();
    // Without acknowledgements nothing waits for an answer, so the socket buffer fills.
    offer.protocol = offer.protocol.without(ProtocolFeatures::REPLY_ACK);
    let script = Script::normal().on(Request::SET_OWNER, Act::StopReading);
    let (_backend, stream) =
        ScriptedBackend::pair(Offer { protocol: ProtocolFeatures::CONFIG, ..offer }, script).unwrap();
    let connection = Connection::from_stream(stream, "scripted", &Limits::new(DEADLINE)).unwrap();
    let mut session = connection.negotiate(&Wanted::default()).unwrap();
    let begin = Instant::now();
    let error = loop {
        if let Err(error) = session.write_config(0, &[0; 256]) {
            break error;
        }
        assert!(begin.elapsed() < Duration::from_secs(10), "a socket buffer is not endless");
    };
    assert_eq!(error.to_string(), "vhost-user backend scripted did not take SET_CONFIG within 700 ms");
    assert!(session.stats().worst_wait < DEADLINE + SLACK);
}
