//! Negative acknowledgements: each is reported with its code; what was only asked for leaves the session usable.

#![cfg(test)]

mod support;

use std::time::Duration;

use support::life_with;
use transport::peer::{Cause, Limits};
use transport::testing::{Act, Offer, Script, ScriptedBackend};
use transport::vhost_user::request::{Answer, Request, TABLE};
use transport::vhost_user::{Connection, ProtocolFeatures, Wanted};

#[test]
fn a_refusal_of_any_acknowledged_request_names_it_and_its_code() {
    let mut offer = Offer::default();
    offer.protocol = offer.protocol.with(ProtocolFeatures::STATUS);
    let (backend, stream) = ScriptedBackend::pair(offer.clone(), Script::normal()).unwrap();
    support::whole_life(stream, &Limits::default(), &Wanted::default()).unwrap();
    let seen = backend.seen();
    let mut tried = 0;
    for row in TABLE.iter().filter(|row| row.answer == Answer::Ack) {
        if !seen.iter().any(|seen| seen.request == row.request && seen.asked) {
            continue;
        }
        tried += 1;
        for code in [1, 22, u64::MAX] {
            let script = Script::normal().on(row.request, Act::Refuse(code));
            let error = life_with(offer.clone(), script, Duration::from_secs(5)).0.unwrap_err();
            assert!(matches!(error.cause(), Cause::Refused(got) if *got == code), "{error:?}");
            let text = format!("vhost-user backend scripted refused {} (code {code:#x})", row.name);
            assert_eq!(error.to_string(), text);
        }
    }
    assert!(tried >= 11, "only {tried} requests were acknowledged");
}

#[test]
fn a_refused_configuration_write_leaves_the_session_usable() {
    let script = Script::normal().on_nth(Request::SET_CONFIG, 0, Act::Refuse(1));
    let (_backend, stream) = ScriptedBackend::pair(Offer::default(), script).unwrap();
    let connection = Connection::from_stream(stream, "scripted", &Limits::default()).unwrap();
    let mut session = connection.negotiate(&Wanted::default()).unwrap();
    assert!(!session.write_config(0, &[9]).unwrap_err().is_fatal());
    session.write_config(0, &[9]).unwrap();
    assert_eq!(session.read_config(60).unwrap()[0], 9);
}

#[test]
fn what_was_not_negotiated_is_not_sent() {
    let offer = Offer { protocol: ProtocolFeatures::MQ, ..Offer::default() };
    let (backend, stream) = ScriptedBackend::pair(offer, Script::normal()).unwrap();
    let connection = Connection::from_stream(stream, "scripted", &Limits::default()).unwrap();
    let mut session = connection.negotiate(&Wanted::default()).unwrap();
    let sent = backend.seen().len();
    let error = session.read_config(60).unwrap_err();
    assert_eq!(error.to_string(), "vhost-user backend scripted does not offer GET_CONFIG");
    assert!(!session.write_config(0, &[1]).unwrap_err().is_fatal());
    assert!(!session.reset_device().unwrap_err().is_fatal());
    assert!(session.take_backend_channel().is_none());
    assert_eq!(backend.seen().len(), sent);
}
