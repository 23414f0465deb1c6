//! Against passt, which we did not write: user-mode networking, by `tests/backends/fetch`. It has code of its own for the protocol,
//! LOG, RARP and DEVICE_STATE among it. Its host is this one: what a guest sends to [`HOST`] arrives at the loopback interface.

#![cfg(test)]

mod support;

use std::env;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use support::fetched::{fetched, is_listening, skipped};
use support::queue::{Part, Queue};
use support::{GuestMemory, Peer, Scratch, connect_patiently, eventually};
use transport::memory::DirtyLog;
use transport::memory::log_size;
use transport::peer::{Cause, Limits};
use transport::vhost_user::{Call, LiveSession, ProtocolFeatures, RingBase, Session, Wanted};

type P = ProtocolFeatures;

const VERSION_1: u64 = 1 << 32;
const MERGED_BUFFERS: u64 = 1 << 15;

/// The host's loopback interface, as guests call it.
const HOST: [u8; 4] = [10, 9, 0, 1];
const GUEST: [u8; 4] = [10, 9, 0, 2];
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

struct Passt {
    process: Peer,
    socket: PathBuf,
    _scratch: Scratch,
}

impl Passt {
    /// `None`, with a printed reason, where it was not fetched. Datagrams to this port of 127.0.0.2 go to the guest.
    fn start(forwarded: u16) -> Option<Self> {
        let program = fetched("passt")?;
        let scratch = Scratch::new();
        let socket = scratch.path("net");
        let child = Command::new(program)
            .args(["--foreground", "--quiet", "--vhost-user", "--ipv4-only", "--dns", "none"])
            .arg("--socket")
            .arg(&socket)
            .args(["--map-host-loopback", "10.9.0.1", "--udp-ports", &format!("127.0.0.2/{forwarded}")])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut process = Peer(child);
        let mut ended = false;
        eventually("passt listens or ends", Duration::from_secs(20), || {
            ended = process.0.try_wait().unwrap().is_some();
            ended || is_listening(&socket)
        });
        if ended {
            // It shuts itself into namespaces of its own, which not every container allows.
            assert!(env::var_os("OUTBOARD_BACKENDS_REQUIRED").is_none(), "passt ended");
            skipped("passt ended at its start, for the reason above");
            return None;
        }
        Some(Self { process, socket, _scratch: scratch })
    }

    fn connect(&self) -> Session {
        let wanted = Wanted::default().and(P::RARP).and(P::DEVICE_STATE);
        let session =
            connect_patiently(&self.socket, &Limits::new(Duration::from_secs(10))).negotiate(&wanted);
        session.unwrap()
    }
}

/// A server on the host's loopback interface, and where guests find it.
fn server() -> (UdpSocket, u16) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

/// Where the buffers of the two rings are.
const RECEIVED: u64 = 0x2_0000;
const SENT: u64 = 0x8_0000;
const BUFFER: u32 = 2048;
const BUFFERS: u16 = 16;
const HEADER: usize = 12;

/// The guest's side of a receiving and a sending ring.
struct Driver {
    memory: GuestMemory,
    receives: Queue,
    sends: Queue,
    seen: u16,
    host: [u8; 6],
}

impl Driver {
    fn new() -> Self {
        let [receives, sends] = [0, 1].map(|n| Queue::new(n, 0x1_0000 + 0x4000 * u64::from(n)));
        let mut driver =
            Self { memory: GuestMemory::new(2 << 20), receives, sends, seen: 0, host: [0xff; 6] };
        (0..BUFFERS).for_each(|buffer| driver.offer(buffer));
        driver
    }

    fn offer(&mut self, buffer: u16) {
        let at = RECEIVED + u64::from(buffer) * u64::from(BUFFER);
        self.receives.offer(&self.memory, buffer, &[Part::Write(at, BUFFER)]);
    }

    fn go_live(&self, session: Session, bases: [RingBase; 2]) -> LiveSession {
        let features = session.offered().accept(VERSION_1 | MERGED_BUFFERS).unwrap();
        let rings = [self.receives.ring(bases[0]), self.sends.ring(bases[1])];
        session.go_live(features, &self.memory.map, &rings).unwrap()
    }

    fn send(&mut self, frame: &[u8]) {
        let bytes = [&[0; HEADER], frame].concat();
        self.memory.write(SENT, &bytes);
        self.sends.offer(&self.memory, 0, &[Part::Read(SENT, u32::try_from(bytes.len()).unwrap())]);
        self.sends.kick_and_wait(&self.memory);
    }

    /// The next frame; its buffers are given back.
    fn receive(&mut self) -> Vec<u8> {
        eventually("a frame", Duration::from_secs(20), || self.receives.used(&self.memory) != self.seen);
        let mut bytes = self.next_buffer();
        let buffers = u16::from_le_bytes(bytes[10..HEADER].try_into().unwrap());
        assert!((1..=BUFFERS).contains(&buffers), "a frame in {buffers} buffers");
        for _ in 1..buffers {
            bytes.extend(self.next_buffer());
        }
        self.receives.kick.ring().unwrap();
        bytes.split_off(HEADER)
    }

    fn next_buffer(&mut self) -> Vec<u8> {
        let entry = self.receives.used_ring() + 4 + 8 * u64::from(self.seen % Queue::SIZE);
        let [buffer, length] =
            [0, 4].map(|n| u16::from_le_bytes(self.memory.read(entry + n, 2).try_into().unwrap()));
        let bytes = self.memory.read(RECEIVED + u64::from(buffer) * u64::from(BUFFER), length.into());
        self.seen = self.seen.wrapping_add(1);
        self.offer(buffer);
        bytes
    }

    /// Asks who has [`HOST`].
    fn find_host(&mut self) {
        let question =
            [&[0xff; 6][..], &GUEST_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &GUEST_MAC, &GUEST, &[0; 6], &HOST]
                .concat();
        self.send(&question);
        let answer = self.receive();
        assert_eq!(answer[..6], GUEST_MAC);
        assert_eq!(answer[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 2], "{answer:x?}");
        assert_eq!(answer[28..32], HOST);
        self.host = answer[22..28].try_into().unwrap();
    }

    /// Sends a datagram to the host's `server` and wants it back.
    fn echo(&mut self, server: &(UdpSocket, u16), size: usize, round: usize) {
        let data: Vec<u8> = (0..size).map(|n| u8::try_from((n + round) % 251).unwrap()).collect();
        let frame = datagram(self.host, server.1, &data);
        self.send(&frame);
        let mut taken = vec![0; 1 << 16];
        let (length, from) = server.0.recv_from(&mut taken).unwrap();
        assert!(taken[..length] == data, "{size} bytes of round {round} on their way out");
        server.0.send_to(&data, from).unwrap();
        let frame = self.receive();
        let (ports, back) = opened(&frame);
        assert_eq!(ports, [server.1, PORT]);
        assert!(back == data, "{size} bytes of round {round} on their way back");
    }
}

/// The guest's port.
const PORT: u16 = 4000;

fn datagram(to: [u8; 6], port: u16, data: &[u8]) -> Vec<u8> {
    let size = |more: usize| u16::try_from(data.len() + more).unwrap().to_be_bytes();
    let mut header = [&[0x45, 0][..], &size(28), &[0, 0, 0, 0, 64, 17, 0, 0], &GUEST, &HOST].concat();
    let sum: u32 = header.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    // Without a sum of its own, which IPv4 allows.
    let ports = [PORT.to_be_bytes(), port.to_be_bytes(), size(8), [0, 0]].concat();
    [&to[..], &GUEST_MAC, &[8, 0], &header, &ports, data].concat()
}

/// Ports and data of a datagram to the guest.
fn opened(frame: &[u8]) -> ([u16; 2], &[u8]) {
    assert_eq!((&frame[12..15], frame[23]), (&[8, 0, 0x45][..], 17), "{frame:x?}");
    assert_eq!((&frame[26..30], &frame[30..34]), (&HOST[..], &GUEST[..]));
    let port = |at: usize| u16::from_be_bytes(frame[at..at + 2].try_into().unwrap());
    ([port(34), port(36)], &frame[42..])
}

const BEGIN: [RingBase; 2] = [RingBase(0); 2];

fn bases(found: &[RingBase]) -> [RingBase; 2] {
    found.try_into().unwrap()
}

#[test]
fn passt_carries_datagrams_and_its_rings_stop_and_start_again() {
    let server = server();
    let Some(passt) = Passt::start(server.1) else { return };
    let session = passt.connect();
    let expected = P::LOG_SHMFD.with(P::RARP).with(P::REPLY_ACK).with(P::DEVICE_STATE);
    assert!(session.protocol().contains(expected), "{:?}", session.protocol());
    let mut driver = Driver::new();
    let mut live = driver.go_live(session, BEGIN);
    driver.find_host();
    for round in 0..50 {
        driver.echo(&server, 1 + 28 * round, round);
    }
    // Longer than a buffer: in several.
    driver.echo(&server, 9000, 0);
    live.send_rarp(GUEST_MAC).unwrap();
    let (session, found) = live.stop().unwrap();
    assert_eq!(found, [RingBase(driver.seen.into()), RingBase(driver.sends.offered.into())]);
    let live = driver.go_live(session, bases(&found));
    driver.echo(&server, 1400, 1);

    // A reset by the guest.
    let (session, _) = live.stop().unwrap();
    driver = Driver::new();
    let live = driver.go_live(session, BEGIN);
    driver.echo(&server, 1400, 2);
    drop(live);

    // It takes the next client, as after a crash of the first.
    driver = Driver::new();
    let live = driver.go_live(passt.connect(), BEGIN);
    driver.echo(&server, 1400, 3);
    live.stop().unwrap();
}

#[test]
fn passt_logs_what_it_writes_to_guest_memory() {
    let server = server();
    let Some(passt) = Passt::start(server.1) else { return };
    let session = passt.connect();
    assert!(session.can_log());
    let mut driver = Driver::new();
    let mut live = driver.go_live(session, BEGIN);
    driver.echo(&server, 100, 0);
    let size = log_size(&driver.memory.map);
    let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    let ours = fd.try_clone().unwrap();
    let dirty = |at: u64| {
        let mut byte = [0];
        rustix::io::pread(&ours, &mut byte, at / 4096 / 8).unwrap();
        byte[0] & 1 << (at / 4096 % 8) != 0
    };
    live.start_log(Arc::new(DirtyLog::new(fd, size, 0))).unwrap();
    let told = Call::new().unwrap();
    live.notify_log(told.as_fd()).unwrap();
    // One buffer, the second of its page.
    assert!(!dirty(RECEIVED));
    driver.echo(&server, 100, 1);
    assert!(dirty(driver.receives.used_ring()), "the receiving ring");
    assert!(dirty(driver.sends.used_ring()), "the sending ring");
    assert!(dirty(RECEIVED), "the data");
    assert!(!dirty(RECEIVED + 0x1000), "a buffer that was not filled");
    assert!(!dirty(SENT), "a page that was only read");
    assert!(told.take().unwrap() > 0, "it says that it logged");
    live.stop_log().unwrap();
    driver.echo(&server, 100, 2);
    assert!(!dirty(RECEIVED + 0x1000), "logged although it was told to stop");
    live.stop().unwrap();
}

#[test]
fn passt_gives_its_state_to_the_next_one_and_ends() {
    let server = server();
    let Some(mut first) = Passt::start(server.1) else { return };
    let mut driver = Driver::new();
    let live = driver.go_live(first.connect(), BEGIN);
    driver.echo(&server, 100, 0);
    let (mut session, found) = live.stop().unwrap();
    let mut state = Vec::new();
    let size = session.save_state(&mut state, 1 << 20).unwrap();
    println!("{size} bytes");
    assert!(state.windows(6).any(|bytes| bytes == GUEST_MAC), "{state:x?}");
    eventually("the end of the passt that gave its state", Duration::from_secs(20), || {
        first.process.0.try_wait().unwrap().is_some_and(|status| status.success())
    });

    let second = Passt::start(server.1).unwrap();
    let mut session = second.connect();
    let refused = session.load_state(&mut [0xa5; 64].as_slice()).unwrap_err();
    assert!(matches!(refused.cause(), Cause::Refused(_)), "{refused:?}");
    session.load_state(&mut state.as_slice()).unwrap();
    let live = driver.go_live(session, bases(&found));
    // It has seen nothing of its guest, and knows its addresses.
    server.0.send_to(b"from the host", ("127.0.0.2", server.1)).unwrap();
    let frame = driver.receive();
    assert_eq!(frame[..6], GUEST_MAC, "told to everybody");
    assert_eq!(opened(&frame), ([server.1, server.1], &b"from the host"[..]));
    driver.echo(&server, 100, 1);
    live.stop().unwrap();
}
