//! GET_CONFIG against backends that refuse, shorten, pad and lie.

#![cfg(test)]

mod support;

use std::time::Duration;

use transport::peer::{Error, Limits};
use transport::testing::{Act, Offer, Script, ScriptedBackend};
use transport::vhost_user::request::Request;
use transport::vhost_user::{Connection, Wanted};

fn read(size: usize, held: usize, script: Script) -> Result<Vec<u8>, Error> {
    let config = (0..held).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let (_backend, stream) = ScriptedBackend::pair(Offer { config, ..Offer::default() }, script).unwrap();
    let connection =
        Connection::from_stream(stream, "scripted", &Limits::new(Duration::from_secs(5))).unwrap();
    connection.negotiate(&Wanted::default()).unwrap().read_config(size)
}

#[test]
fn the_exact_size_is_read_at_once_and_a_shorter_one_when_it_is_refused() {
    assert_eq!(read(60, 60, Script::normal()).unwrap().len(), 60);
    assert_eq!(read(256, 256, Script::normal()).unwrap().len(), 256);
    assert_eq!(read(96, 60, Script::normal()).unwrap().len(), 60);
    assert_eq!(read(10, 8, Script::normal()).unwrap(), [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn a_backend_without_any_configuration_refuses() {
    let error = read(60, 0, Script::normal()).unwrap_err();
    assert!(!error.is_fatal());
    assert_eq!(error.to_string(), "vhost-user backend scripted refused GET_CONFIG (code 0x0)");
}

#[test]
fn a_head_alone_is_a_refusal_too() {
    let script = Script::normal().on_nth(Request::GET_CONFIG, 0, Act::Payload(vec![0; 12]));
    assert_eq!(read(60, 60, script).unwrap().len(), 56);
}

#[test]
fn lies_about_the_configuration_end_the_connection() {
    let head = |offset: u32, size: u32| [offset, size, 0].map(u32::to_ne_bytes).concat();
    for (payload, what) in [
        (vec![0; 5], "half a head"),
        ([head(0, 60), vec![0; 61]].concat(), "more than asked"),
        ([head(0, 60), vec![0; 59]].concat(), "less than it says"),
        ([head(4, 60), vec![0; 60]].concat(), "another offset"),
    ] {
        let script = Script::normal().on(Request::GET_CONFIG, Act::Payload(payload));
        assert!(read(60, 60, script).unwrap_err().is_fatal(), "{what}");
    }
}

#[test]
fn impossible_sizes_are_not_sent() {
    for size in [0, 257, usize::MAX] {
        assert!(!read(size, 60, Script::normal()).unwrap_err().is_fatal());
    }
}
