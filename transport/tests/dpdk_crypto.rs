//! Against DPDK's vhost-crypto library, which we did not write: its example program on the openssl driver, built by
//! `tests/backends/fetch`. Sessions, which only it understands, and the requests that name them. It takes indirect descriptors
//! only, 2 KiB at most, looks at a request that it cannot serve again and again for ever, and writes used entries to the wrong
//! places (nobody notices while there is one request at a time).

#![cfg(test)]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use support::fetched::{fetched, until_listening};
use support::queue::{Part, Queue};
use support::{GuestMemory, Peer, Scratch, connect_patiently};
use transport::peer::Limits;
use transport::vhost_user::extras::{SessionId, SymmetricSession};
use transport::vhost_user::{LiveSession, ProtocolFeatures, RingBase, Wanted};

/// VERSION_1 and INDIRECT_DESC.
const FEATURES: u64 = (1 << 32) | (1 << 28);

/// NIST SP 800-38A, F.2.1: CBC-AES128, the first two blocks.
const KEY: [u8; 16] = 0x2b7e_1516_28ae_d2a6_abf7_1588_09cf_4f3c_u128.to_be_bytes();
const IV: [u8; 16] = 0x0001_0203_0405_0607_0809_0a0b_0c0d_0e0f_u128.to_be_bytes();
const PLAIN: [u128; 2] =
    [0x6bc1_bee2_2e40_9f96_e93d_7e11_7393_172a, 0xae2d_8a57_1e03_ac9c_9eb7_6fac_45af_8e51];
const CODED: [u128; 2] =
    [0x7649_abac_8119_b246_cee9_8e9b_12e9_197d, 0x5086_cb9b_5072_19ee_95db_113a_9176_78b2];

const ENCRYPT: u8 = 1;
const DECRYPT: u8 = 2;

struct Example {
    _process: Peer,
    socket: PathBuf,
    _scratch: Scratch,
}

impl Example {
    /// `None`, with a printed reason, where it was not fetched.
    fn start() -> Option<Self> {
        let (program, openssl, ring) =
            (fetched("dpdk-vhost-crypto")?, fetched("dpdk-crypto-openssl")?, fetched("dpdk-mempool-ring")?);
        let scratch = Scratch::new();
        let socket = scratch.path("crypto");
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        let line = format!(
            "--lcores 0@0,1@0 --no-huge -m 128 --no-pci --no-shconf --no-telemetry -d {} -d {} --vdev crypto_openssl0 -- \
             --socket-file 1,{} --config (1,0,0)",
            name(&openssl),
            name(&ring),
            socket.display()
        );
        let child = Command::new(&program)
            .args(line.split_whitespace())
            .env("LD_LIBRARY_PATH", program.parent().unwrap())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let process = Peer(child);
        until_listening(&socket, Duration::from_secs(30));
        Some(Self { _process: process, socket, _scratch: scratch })
    }
}

const TABLE: u64 = 0x3000;
const HEADER: u64 = 0x5000;
const VECTOR: u64 = 0x5100;
const SOURCE: u64 = 0x6000;
const TARGET: u64 = 0x7000;
const STATUS: u64 = 0x8000;

/// The guest's side of the one data queue.
struct Driver {
    memory: GuestMemory,
    queue: Queue,
}

impl Driver {
    /// One request of virtio 1.2 §5.9.8.1 of a cipher: its status, and what the backend made of the source.
    fn request(
        &mut self,
        SessionId(session): SessionId,
        direction: u8,
        source: [u128; 2],
    ) -> (u8, [u128; 2]) {
        let source: Vec<u8> = source.into_iter().flat_map(u128::to_be_bytes).collect();
        let length = u32::try_from(source.len()).unwrap();
        let mut header = vec![direction - 1, 0, 0, 0, 3, 0, 0, 0];
        header.extend(session.to_le_bytes());
        header.extend([0; 8]);
        header.extend([16_u32, length, length].into_iter().flat_map(u32::to_le_bytes));
        header.resize(24 + 40, 0);
        // The kind: a cipher alone.
        header.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        self.memory.write(HEADER, &header);
        self.memory.write(VECTOR, &IV);
        self.memory.write(SOURCE, &source);
        self.memory.write(STATUS, &[0xff]);
        let parts = [
            Part::Read(HEADER, 72),
            Part::Read(VECTOR, 16),
            Part::Read(SOURCE, length),
            Part::Write(TARGET, length),
            Part::Write(STATUS, 1),
        ];
        self.queue.offer_indirect(&self.memory, TABLE, &parts);
        self.queue.kick_and_wait(&self.memory);
        let answer = self.memory.read(TARGET, 32);
        let block = |at: usize| u128::from_be_bytes(answer[at..at + 16].try_into().unwrap());
        (self.memory.read(STATUS, 1)[0], [block(0), block(16)])
    }
}

fn open(live: &mut LiveSession, direction: u8) -> SessionId {
    let session = SymmetricSession {
        op_code: 2,
        cipher_algorithm: 3,
        op_type: 1,
        direction,
        cipher_key: KEY.to_vec(),
        ..SymmetricSession::default()
    };
    live.create_crypto_session(&session).unwrap()
}

#[test]
fn dpdk_opens_sessions_ciphers_with_them_and_closes_them() {
    let Some(example) = Example::start() else { return };
    let wanted = Wanted::default().and(ProtocolFeatures::CRYPTO_SESSION).adjust("-config").unwrap();
    let limits = Limits::new(Duration::from_secs(20));
    let session = connect_patiently(&example.socket, &limits).negotiate(&wanted).unwrap();
    assert!(session.protocol().contains(ProtocolFeatures::CRYPTO_SESSION));
    let mut driver = Driver { memory: GuestMemory::new(2 << 20), queue: Queue::new(0, 0x1000) };
    let features = session.offered().accept(FEATURES).unwrap();
    let mut live = session.go_live(features, &driver.memory.map, &[driver.queue.ring(RingBase(0))]).unwrap();

    let [forth, back] = [ENCRYPT, DECRYPT].map(|direction| open(&mut live, direction));
    assert_ne!(forth, back);
    assert_eq!(driver.request(forth, ENCRYPT, PLAIN), (0, CODED));
    assert_eq!(driver.request(back, DECRYPT, CODED), (0, PLAIN));
    assert!(driver.queue.call.take().unwrap() > 0, "it told of them");

    // A cipher that there is not: refused, and the session lives on.
    let unknown =
        SymmetricSession { op_code: 2, cipher_algorithm: 99, op_type: 1, ..SymmetricSession::default() };
    let refusal = live.create_crypto_session(&unknown).unwrap_err();
    assert!(!refusal.is_fatal(), "{refusal}");

    live.close_crypto_session(forth).unwrap();
    assert_eq!(driver.request(back, DECRYPT, CODED), (0, PLAIN), "the other one still is");
    live.close_crypto_session(back).unwrap();
    live.stop().unwrap();
}
