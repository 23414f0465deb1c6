//! Answers that are wrong: each is named, ends the connection, takes no time and leaks nothing.

#![cfg(test)]

mod support;

use std::time::Duration;

use support::{life_with, open_fds};
use transport::peer::Cause;
use transport::testing::{Act, Offer, Script};
use transport::vhost_user::ProtocolFeatures;
use transport::vhost_user::message::Fault;
use transport::vhost_user::request::Request;

const DEADLINE: Duration = Duration::from_secs(5);

/// A few of each kind of answer: value, acknowledgement, ring state.
const STEPS: [Request; 6] = [
    Request::GET_FEATURES,
    Request::GET_PROTOCOL_FEATURES,
    Request::SET_OWNER,
    Request::SET_MEM_TABLE,
    Request::SET_VRING_KICK,
    Request::GET_VRING_BASE,
];

fn offer() -> Offer {
    let mut offer = Offer::default();
    offer.protocol = offer.protocol.with(ProtocolFeatures::STATUS);
    offer
}

/// The cause of the failure of a life in which `act` happens at `request`.
fn cause(request: Request, act: Act) -> String {
    let before = open_fds();
    let what = format!("{request} {act:?}");
    let (outcome, took) = life_with(offer(), Script::normal().on(request, act), DEADLINE);
    let error = outcome.expect_err(&what);
    assert!(took < DEADLINE, "{what}: {took:?}");
    assert!(error.is_fatal(), "{what}: {error:?}");
    assert!(error.to_string().contains(&request.to_string()), "{what}: {error}");
    assert_eq!(open_fds(), before, "{what}: descriptors");
    format!("{:?}", error.cause())
}

fn malformed(fault: Fault) -> String {
    format!("{:?}", Cause::Malformed(fault))
}

#[test]
fn wrong_answers_are_named_and_end_the_connection() {
    for request in STEPS {
        let other = if request == Request::GET_FEATURES { Request::SET_OWNER } else { Request::GET_FEATURES };
        assert_eq!(cause(request, Act::As(other)), malformed(Fault::Request(other.0)));
        assert_eq!(cause(request, Act::As(Request(4711))), malformed(Fault::Request(4711)));
        for flags in [0, 1, 4, 6, 0x15, u32::MAX] {
            assert_eq!(cause(request, Act::Flags(flags)), malformed(Fault::Flags(flags)));
        }
        for size in [9, 16, 4096, 0x8000_0000, u32::MAX] {
            let fault = Fault::Size { got: size, least: 0, most: 8 };
            assert_eq!(cause(request, Act::ClaimSize(size)), malformed(fault));
        }
        for size in [0u32, 4, 7] {
            let fault = Fault::Size { got: size, least: 8, most: 8 };
            let payload = vec![0; usize::try_from(size).unwrap()];
            assert_eq!(cause(request, Act::Payload(payload)), malformed(fault));
        }
        for fds in [1, 2, 253] {
            assert_eq!(cause(request, Act::Fds(fds)), malformed(Fault::StrayFds));
            assert_eq!(cause(request, Act::FdsWithBody(fds)), malformed(Fault::StrayFds));
        }
        assert_eq!(cause(request, Act::Close), format!("{:?}", Cause::Closed));
        for bytes in [1, 11, 12, 19] {
            assert_eq!(cause(request, Act::CloseAfter(bytes)), format!("{:?}", Cause::ClosedMidMessage));
        }
    }
    a_second_or_unasked_answer_is_caught_by_the_next_request();
    values_that_make_no_sense_are_refused();
    unknown_and_changing_feature_bits_are_harmless();
    answers_split_at_every_byte_or_with_need_reply_set_are_fine();
}

fn a_second_or_unasked_answer_is_caught_by_the_next_request() {
    let outcome =
        |request, act| life_with(offer(), Script::normal().on(request, act), DEADLINE).0.unwrap_err();
    let error = outcome(Request::GET_FEATURES, Act::Twice);
    assert_eq!(
        error.to_string(),
        "vhost-user backend scripted answered GET_PROTOCOL_FEATURES with a message of request 1"
    );
    let error = outcome(Request::SET_PROTOCOL_FEATURES, Act::Unasked);
    assert_eq!(
        error.to_string(),
        "vhost-user backend scripted answered SET_OWNER with a message of request 16"
    );
    let error = outcome(Request::GET_QUEUE_NUM, Act::Flood(100_000));
    assert!(error.is_fatal(), "{error:?}");
}

fn values_that_make_no_sense_are_refused() {
    for count in [0, 65536, 1 << 32, u64::MAX] {
        let fault = Fault::Value { field: "queue count", value: count };
        let act = Act::Payload(count.to_ne_bytes().to_vec());
        assert_eq!(cause(Request::GET_QUEUE_NUM, act), malformed(fault));
    }
    let state = |index: u32, num: u32| [index.to_ne_bytes(), num.to_ne_bytes()].concat();
    let fault = Fault::Value { field: "ring", value: 9 };
    assert_eq!(cause(Request::GET_VRING_BASE, Act::Payload(state(9, 0))), malformed(fault));
    let fault = Fault::Value { field: "ring base", value: 65536 };
    assert_eq!(cause(Request::GET_VRING_BASE, Act::Payload(state(0, 65536))), malformed(fault));
}

fn answers_split_at_every_byte_or_with_need_reply_set_are_fine() {
    for request in STEPS {
        for act in [Act::Drip(Duration::ZERO), Act::Flags(0xd)] {
            life_with(offer(), Script::normal().on(request, act), DEADLINE).0.unwrap();
        }
    }
}

fn unknown_and_changing_feature_bits_are_harmless() {
    let everything = u64::MAX.to_ne_bytes().to_vec();
    // The scripted backend answers none of the newer requests, and is asked none of them.
    for script in [
        Script::normal().on_nth(Request::GET_FEATURES, 1, Act::Payload(vec![0; 8])),
        Script::normal().on_nth(Request::GET_FEATURES, 1, Act::Payload(everything.clone())),
        Script::normal().on(Request::GET_PROTOCOL_FEATURES, Act::Payload(everything)),
    ] {
        life_with(offer(), script, DEADLINE).0.unwrap();
    }
    let contradiction = ProtocolFeatures::INBAND_NOTIFICATIONS.with(ProtocolFeatures::HOST_NOTIFIER);
    let offer = Offer { protocol: contradiction, ..Offer::default() };
    life_with(offer, Script::normal(), DEADLINE).0.unwrap();
}
