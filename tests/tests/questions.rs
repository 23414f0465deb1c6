//! What the program says of this host and of a backend, without booting anything.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use outboard_tests::daemon::{StorageDaemon, is_listening};
use outboard_tests::launch::{Launch, STEP};
use outboard_tests::peer::Peer;
use outboard_tests::{need, place, wait};
use serde_json::Value;

#[test]
fn check_says_in_words_and_in_json_what_this_host_boots() {
    need!(place::kvm());
    let words = Launch::new(["check"]).run();
    let json = Launch::new(["check", "--json"]).run();
    assert_eq!(words.code, json.code, "{words}");
    let report: Value = serde_json::from_str(&json.console).unwrap();
    assert_eq!(report["runs_payloads"], true, "{json}");
    let stock = report["runs_stock_kernels"].as_bool().unwrap();
    let failing = report["failing_instructions"].as_array().unwrap();
    assert_eq!(stock, failing.is_empty(), "{json}");
    assert!(report["tried_instructions"].as_u64().unwrap() >= u64::try_from(failing.len()).unwrap());
    assert_eq!(json.code, Some(if stock { 0 } else { 3 }), "the exit code is the answer\n{json}");

    assert!(words.console.contains("this host runs payloads of your own (tiny kernels): yes"), "{words}");
    let answer = if stock {
        "this host boots stock Linux kernels: yes"
    } else {
        "this host boots stock Linux kernels: no"
    };
    assert!(words.console.contains(answer), "{words}");
    for instruction in failing {
        let name = instruction["name"].as_str().unwrap();
        assert!(words.console.contains(&format!("{name} does not: ")), "{name}\n{words}");
    }
    assert!(words.log.is_empty() && json.log.is_empty(), "{words}");
}

#[test]
fn check_is_right_about_this_host() {
    need!(place::kvm());
    let report: Value = serde_json::from_str(&Launch::new(["check", "--json"]).run().console).unwrap();
    if place::in_lab() {
        assert_eq!(report["runs_stock_kernels"], true, "the lab runs them: {report:#}");
    }
}

#[test]
fn probe_tells_what_a_backend_offers_and_leaves_it_free() {
    let disk = need!(StorageDaemon::with_queues(1 << 20, 3));
    let socket = disk.socket();
    let socket = socket.to_str().unwrap();
    let words = Launch::new(["probe", "vhost-user", socket]).run().with_code(0);
    assert!(words.console.contains(socket) || words.console.contains("vhost-user"), "{words}");
    for expected in ["REPLY_ACK", "CONFIG", "MQ", "3"] {
        let found = words.console.to_uppercase().contains(expected);
        assert!(found, "{expected}\n{words}");
    }
    wait::until("the daemon listens again", STEP, || is_listening(&disk.socket()).then_some(()));
    let json = Launch::new(["probe", "vhost-user", socket, "--json"]).run().with_code(0);
    let report: Value = serde_json::from_str(&json.console).unwrap();
    assert!(report.is_object(), "{json}");
}

#[test]
fn probe_of_a_silent_peer_ends_in_time() {
    let silent = Peer::silent();
    let socket = silent.socket();
    let ended = Launch::new(["probe", "vhost-user", socket.to_str().unwrap()]).run().with_code(4);
    assert!(ended.log.contains("did not answer GET_FEATURES within"), "{ended}");
    assert!(ended.log.contains("  hint: "), "{ended}");
}
