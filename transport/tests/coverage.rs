//! `tests/PROTOCOL.md` says which test exercises which request: it must have a row for each, and name tests that exist, with
//! the peer that it says.

#![cfg(test)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use transport::vfio_user::message::Command;
use transport::vhost_user::request::BackendRequest;
use transport::vhost_user::request::TABLE;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The files in which a peer's tests are.
const PEERS: &[(&str, &[&str])] = &[
    ("libvhost-user", &["qemu_storage_daemon", "recovery", "patience", "machine_backends_blk", "qemu_gpu"]),
    ("vhost-user-backend", &["rust_backend", "machine_shared_memory", "windows", "backends_start"]),
    ("DPDK", &["dpdk", "dpdk_crypto", "open_vswitch", "machine_backends_net", "machine_backends_crypto"]),
    ("passt", &["passt"]),
    ("libvfio-user", &["libvfio_user", "vfio"]),
    ("crate vfio_user", &["vfio_user_rust_server"]),
];
const SCRIPTED: &[&str] = &[
    "every_request",
    "every_backend_request",
    "conversation",
    "configuration",
    "refusals",
    "vfio_user_hostile",
    "vfio_user_hostile_device",
    "vfio_user_hostile_dma",
    "vfio_user_together",
];

/// Rows of the table under a heading: code and name, and the two cells with tests.
fn rows<'a>(text: &'a str, heading: &str) -> BTreeMap<&'a str, (&'a str, &'a str)> {
    let section = text.split_once(heading).unwrap().1;
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| request"));
    rows.map(|row| {
        let cells: Vec<_> = row.trim_matches(['|', ' ']).split(" | ").collect();
        (cells[0], (cells[1], cells[2]))
    })
    .collect()
}

/// The tests named in a cell, each with the words before it.
fn tests(cell: &str) -> Vec<(&str, &str)> {
    let mut peer = "";
    let mut found = Vec::new();
    for (n, part) in cell.split('`').enumerate() {
        match n % 2 {
            0 if part.trim_matches([';', ' ']).is_empty() => {}
            0 => peer = part.trim_matches([';', ' ']),
            _ => found.push((peer, part)),
        }
    }
    found
}

fn assert_exists(test: &str) -> &str {
    let (file, name) = test.split_once("::").unwrap_or_else(|| panic!("{test} is no file::test"));
    let paths = ["transport/tests", "tests/tests"].map(|folder| format!("{ROOT}/{folder}/{file}.rs"));
    let text =
        paths.iter().filter(|path| Path::new(path).exists()).map(|path| fs::read_to_string(path).unwrap());
    let found = text.into_iter().any(|text| text.contains(&format!("#[test]\nfn {name}(")));
    assert!(found, "tests/PROTOCOL.md names {test}, which is not there");
    file
}

fn check<'a>(rows: &BTreeMap<&str, (&str, &str)>, requests: impl Iterator<Item = (u32, &'a str)>) {
    let mut count = 0;
    for (code, name) in requests {
        count += 1;
        let (real, scripted) =
            rows.get(&*format!("{code} {name}")).unwrap_or_else(|| panic!("no row for {code} {name}"));
        for (peer, test) in tests(real) {
            let file = assert_exists(test);
            let files = PEERS
                .iter()
                .find(|(name, _)| *name == peer)
                .unwrap_or_else(|| panic!("{name}: who is {peer}?"))
                .1;
            assert!(files.contains(&file), "{name}: {test} is no test with {peer}");
        }
        for (_, test) in tests(scripted) {
            assert!(SCRIPTED.contains(&assert_exists(test)), "{name}: {test} has no scripted peer");
        }
        let excused = real.starts_with("never sent: ");
        assert!(excused || !tests(real).is_empty() || !tests(scripted).is_empty(), "{name} is not exercised");
        assert!(!real.is_empty(), "{name}: say why there is no such peer");
    }
    assert_eq!(rows.len(), count, "rows that are no request");
}

#[test]
fn every_request_has_a_row_whose_tests_exist() {
    let text = fs::read_to_string(format!("{ROOT}/tests/PROTOCOL.md")).unwrap();
    check(&rows(&text, "## Requests of the front end"), TABLE.iter().map(|row| (row.request.0, row.name)));
    let back = (1..=64).filter_map(|code| Some((code, BackendRequest(code).name()?)));
    check(&rows(&text, "## Requests of the backend"), back);
    let vfio_user = Command::ALL.iter().filter_map(|command| Some((command.0.into(), command.name()?)));
    check(&rows(&text, "## Commands of vfio-user"), vfio_user);
}
