//! What people and peers get wrong with `outboard probe`: no command line and no peer hangs it, and each
//! failure has its cause and a hint. Runs anywhere.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use outboard_tests::explained::assert_explained;
use outboard_tests::launch::Launch;
use outboard_tests::peer::{Peer, stale_socket};
use outboard_tests::place;
use outboard_tests::scratch::Scratch;

/// Usage; a peer.
const USAGE: i32 = 2;
const PEER: i32 = 4;

/// `outboard probe`, with a deadline that a test can wait for.
fn probe(protocol: &str, socket: impl Into<OsString>) -> Launch {
    Launch::new(["probe", protocol, "--deadline", "500"]).arg(socket.into())
}

#[test]
fn what_cannot_be_probed_is_told_apart() {
    let scratch = Scratch::new();
    let stale = scratch.path("stale");
    stale_socket(&stale);
    let datagrams = scratch.path("datagrams");
    let _datagrams = std::os::unix::net::UnixDatagram::bind(&datagrams).unwrap();
    let file = scratch.file("file", b"");
    let (below, absent, long) = (file.join("x"), scratch.path("absent"), scratch.path(&"x".repeat(120)));
    let abstract_name = Path::new("@outboard-nobody-listens-here");
    for protocol in ["vhost-user", "vfio-user"] {
        for (socket, cause, hint) in [
            (absent.as_path(), "No such file or directory", "first"),
            (&stale, "Connection refused", "the socket file is stale"),
            (&file, "Connection refused", "it is no socket"),
            (Path::new("/dev/null"), "Connection refused", "it is no socket"),
            (scratch.folder(), "Connection refused", "it is a directory"),
            (&below, "Not a directory", "is it right?"),
            (abstract_name, "Connection refused", "nobody listens on this abstract name"),
            (&datagrams, "Protocol wrong type for socket", "a socket of another kind"),
            (&long, "File name too long", "at most 107 bytes"),
        ] {
            let ended = probe(protocol, socket).run();
            assert!(!ended.log.contains("reconnect="), "probe has no such key\n{ended}");
            assert_explained(ended, PEER, &format!("cannot probe {}", socket.display()), cause, hint);
        }
        for keys in ["socket=/run/x", "fd=3", "blk,socket=/run/x,id=disk0"] {
            assert_explained(probe(protocol, keys).run(), USAGE, keys, "", "probe takes the path alone");
        }
        let trace = scratch.path("nowhere/trace");
        let ended = probe(protocol, &absent).arg("--trace").arg(trace).run();
        assert_explained(ended, USAGE, "cannot write the trace to", "No such file", "is the path right?");
    }
    let of_type = |protocol, kind| probe(protocol, "/run/x").arg("--type").arg(kind).run();
    let unknown = "there is no virtio device type `floppy`";
    assert_explained(of_type("vhost-user", "floppy"), USAGE, unknown, "", "the types are");
    let useless = "--type is not for vfio-user servers";
    assert_explained(of_type("vfio-user", "blk"), USAGE, useless, "", "they say themselves what they are");
    for odd in [
        &["probe"][..],
        &["probe", "vhost-user"],
        &["probe", "vhostuser", "/run/x"],
        &["probe", "vfio-user", ""],
        &["probe", "vfio-user", "/run/x", "/run/y"],
        &["probe", "vfio-user", "/run/x", "--deadline", "0"],
        &["probe", "vfio-user", "/run/x", "--trace"],
    ] {
        let ended = Launch::new(odd).run().with_code(USAGE);
        assert!(ended.console.is_empty() && ended.log.contains("--help"), "{ended}");
    }
}

#[test]
fn a_socket_of_another_owner_cannot_be_probed() {
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    if !Command::new("setpriv").args(user).arg("true").output().is_ok_and(|done| done.status.success()) {
        return place::Missing::skipped("another owner", "setpriv cannot make another user here");
    }
    let scratch = Scratch::new();
    fs::set_permissions(scratch.folder(), Permissions::from_mode(0o755)).unwrap();
    let (program, socket) = (scratch.path("outboard"), scratch.path("socket"));
    fs::copy(place::outboard(), &program).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, Permissions::from_mode(0o600)).unwrap();
    for protocol in ["vhost-user", "vfio-user"] {
        let ended =
            Launch::program("setpriv", user).arg(&program).args(["probe", protocol]).arg(&socket).run();
        assert_explained(ended, PEER, "cannot probe", "Permission denied", "check its owner");
    }
}

/// A vhost-user backend that goes after so many requests.
fn backend_for(requests: u32) -> Peer {
    Peer::new(move |mut stream| {
        for _ in 0..requests {
            let (mut header, mut rest) = ([0; 12], Vec::new());
            if stream.read_exact(&mut header).is_err() {
                return;
            }
            rest.resize(header[8].into(), 0);
            stream.read_exact(&mut rest).unwrap();
            let value: u64 = match header[0] {
                1 => 1 << 30 | 1 << 32,
                // MQ, CONFIG and CONFIGURE_MEM_SLOTS.
                15 => 1 | 1 << 9 | 1 << 15,
                17 | 36 => 8,
                _ => continue,
            };
            let reply = [&[header[0], 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0][..], &value.to_le_bytes()].concat();
            stream.write_all(&reply).unwrap();
        }
    })
}

/// A vfio-user server that goes after so many commands.
fn server_for(commands: u32) -> Peer {
    Peer::new(move |mut stream| {
        for _ in 0..commands {
            let (mut header, mut payload) = ([0; 16], Vec::new());
            if stream.read_exact(&mut header).is_err() {
                return;
            }
            payload.resize(usize::from(u16::from_le_bytes([header[4], header[5]])) - 16, 0);
            stream.read_exact(&mut payload).unwrap();
            let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
            match header[2] {
                1 => payload = b"\0\0\x01\0{\"capabilities\":{}}\0".to_vec(),
                4 => payload = words(&[16, 3, 9, 5]),
                5 => payload = words(&[32, 3, payload[8].into(), 0, 0x1000, 0, 0, 0]),
                6 => payload = words(&[16, 0, payload[8].into(), 0]),
                9 => payload.extend([0; 4]),
                _ => {}
            }
            header[4..6].copy_from_slice(&u16::try_from(16 + payload.len()).unwrap().to_le_bytes());
            header[8] = 1;
            stream.write_all(&[&header[..], &payload].concat()).unwrap();
        }
    })
}

#[test]
fn peers_that_go_while_they_are_probed_are_named_with_the_step() {
    for (protocol, peer, most) in
        [("vhost-user", backend_for as fn(u32) -> Peer, 4), ("vfio-user", server_for, 24)]
    {
        for answered in 0..=most {
            let peer = peer(answered);
            let ended = probe(protocol, peer.socket()).run();
            assert_explained(
                ended,
                PEER,
                "cannot probe",
                "closed the connection at ",
                "own messages may say more",
            );
        }
    }
    // What speaks something else, first or when it is asked.
    let page = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
    for protocol in ["vhost-user", "vfio-user"] {
        let ended = probe(protocol, Peer::answering(page).socket()).run();
        assert_explained(ended, PEER, "cannot probe", "answered ", &format!("is this a {protocol} socket?"));
        let ended = probe(protocol, Peer::answering(b"\x01\0").socket()).run();
        assert_explained(ended, PEER, "cannot probe", "within 500 ms", "already serving another machine?");
    }
}
