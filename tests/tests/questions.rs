//! What the program says of this host and of a backend, without booting anything.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use outboard_tests::daemon::{StorageDaemon, is_listening};
use outboard_tests::gadget::{Gadget, REGION};
use outboard_tests::launch::{Launch, STEP};
use outboard_tests::peer::Peer;
use outboard_tests::vfio::Server;
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
fn probe_tells_of_shared_memory() {
    let gadget = Gadget::start();
    let words = Launch::new(["probe", "vhost-user", gadget.socket().to_str().unwrap()]).run().with_code(0);
    let told = words.console.lines().find_map(|line| line.trim().strip_prefix("shared memory"));
    assert_eq!(told.map(str::trim), Some(format!("region 0: {REGION:#x} bytes").as_str()), "{words}");
}

#[test]
fn probe_of_a_silent_server_ends_in_time() {
    let silent = Peer::silent();
    let socket = silent.socket();
    let ended = Launch::new(["probe", "vfio-user", socket.to_str().unwrap()]).run().with_code(4);
    assert!(ended.log.contains("did not answer VERSION within"), "{ended}");
    assert!(ended.log.contains("  hint: "), "{ended}");
}

#[test]
fn probe_of_a_silent_peer_ends_in_time() {
    let silent = Peer::silent();
    let socket = silent.socket();
    let ended = Launch::new(["probe", "vhost-user", socket.to_str().unwrap()]).run().with_code(4);
    assert!(ended.log.contains("did not answer GET_FEATURES within"), "{ended}");
    assert!(ended.log.contains("  hint: "), "{ended}");
}

#[test]
fn probe_says_what_a_vfio_user_server_offers_and_what_not() {
    let probe = |server: &Server| {
        let socket = server.socket();
        let json = Launch::new(["probe", "vfio-user", socket.to_str().unwrap(), "--json"]).run().with_code(0);
        serde_json::from_str::<Value>(&json.console).unwrap()
    };
    let nvme = probe(&Server::nvme(&[0; 1 << 20], &[]));
    assert_eq!(
        (&nvme["identity"]["id"], &nvme["identity"]["class"]),
        (&"1234:0b0e".into(), &"010802".into())
    );
    assert_eq!(nvme["regions"][0]["areas"], serde_json::json!([[4096, 4096]]), "{nvme:#}");
    assert_eq!(nvme["capabilities"]["max_msg_fds"], 1);
    let extended =
        ["--wire", "extended", "--twin-socket", "--max-msg-fds", "16", "--max-data-xfer-size", "65536"];
    let engine = Server::engine(&extended);
    // Twice: the first has left nothing behind.
    for _ in 0..2 {
        let engine = probe(&engine);
        let offered = &engine["capabilities"];
        assert_eq!((&offered["max_msg_fds"], &offered["max_data_xfer_size"]), (&16.into(), &65536.into()));
        assert_eq!((&offered["twin_socket"], &offered["write_multiple"]), (&true.into(), &true.into()));
        let doorbells = engine["regions"][0]["doorbells"].as_array().unwrap();
        assert_eq!((doorbells.len(), &doorbells[15]["value"]), (16, &7.into()), "{engine:#}");
    }
    let socket = engine.socket();
    let words =
        Launch::new(["probe", "vfio-user", socket.to_str().unwrap(), "--trace", "-"]).run().with_code(0);
    assert!(words.console.contains("1234:0b0f") && words.console.contains("16 doorbells"), "{words}");
    for expected in [" > VERSION id=0 0.1 {\"capabilities\"", " < DEVICE_GET_REGION_INFO id=", "fds=1 ("] {
        assert!(words.log.contains(expected), "{expected}\n{words}");
    }
}
