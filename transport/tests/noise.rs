//! Every parser on noise: bytes of any content and length give a value or a fault, never a panic; and whole
//! conversations of noise end in an error at once. The fuzz targets start from the same functions.

#![cfg(test)]

mod support;

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use support::{GuestMemory, Rings, whole_life};
use transport::peer::{Direction, Limits};
use transport::vhost_user::backend_requests::parse_request;
use transport::vhost_user::describe::Fields;
use transport::vhost_user::features::DeviceFeatures;
use transport::vhost_user::message::{Header, Iotlb, VringAddr, VringState, parse, parse_front};
use transport::vhost_user::migration::{device_state, postcopy};
use transport::vhost_user::request::BackendRequest;
use transport::vhost_user::{RingBase, Wanted};
use transport::vhost_user::{config, extras, inflight, shmem, vring};
use zerocopy::IntoBytes;

/// A small generator (xorshift): the same noise at every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Up to `most` bytes, mostly small numbers: they get further than large ones.
    fn bytes(&mut self, most: u64) -> Vec<u8> {
        let len = self.below(most + 1);
        (0..len).map(|_| if self.below(4) == 0 { self.next().to_ne_bytes()[0] } else { 0 }).collect()
    }
}

#[test]
fn parsers_give_a_value_or_a_fault() {
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    let none = DeviceFeatures::default().accept(0).unwrap();
    for _ in 0..100_000 {
        let bytes = noise.bytes(100);
        let code = u32::try_from(noise.below(50)).unwrap();
        let _state: Result<VringState, _> = parse(&bytes);
        let _addr: Result<(VringAddr, _), _> = parse_front(&bytes);
        if let Ok((header, _)) = parse_front::<Header>(&bytes) {
            let verdict = header.judge_reply(code, 64);
            assert!(verdict.is_err() || header.request == code && header.size <= 64);
            assert!(header.judge_request(64).is_err() || !header.is_reply());
        }
        if let Ok(config::ConfigReply::Bytes(got)) = config::parse_reply(&bytes, 16) {
            assert!(!got.is_empty() && got.len() <= 16);
        }
        if let Ok(RingBase(base)) = vring::parse_base(&bytes, 0, none) {
            assert!(base <= 65535);
        }
        if let Ok(Some(area)) = inflight::parse_inflight(&bytes, 2, 128) {
            assert!(area.mmap_size >= 4096 && area.mmap_offset.checked_add(area.mmap_size).is_some());
        }
        if let Ok(sizes) = shmem::parse_config(&bytes) {
            assert!(sizes.len() <= 256 && sizes.iter().all(|size| size % 4096 == 0));
        }
        drop(postcopy::parse_table(&bytes, &noise.bytes(72)));
        assert_eq!(extras::parse_session(&bytes).is_ok(), bytes.len() >= 8);
        assert!(bytes.len() == 8 || device_state::parse_answer(&bytes, 1).is_err());
        drop(parse_request(BackendRequest(code), &bytes, Vec::new()));
        let header = Header::request(code, 0);
        for direction in [Direction::Request, Direction::Answer, Direction::PeerRequest] {
            drop(Fields { direction, header, payload: &bytes }.to_string());
        }
    }
}

#[test]
fn shared_memory_requests_of_noise_never_leave_their_region() {
    let mut noise = Noise(7);
    let mut regions = shmem::ShmemRegions::new(vec![0x1_0000, 0, 0x4000]);
    for _ in 0..100_000 {
        let page = |noise: &mut Noise| match noise.below(8) {
            0 => noise.next(),
            _ => noise.below(20) * 4096,
        };
        let area = transport::vhost_user::message::ShmemArea {
            shmid: u8::try_from(noise.below(4)).unwrap(),
            padding: [0; 7],
            fd_offset: page(&mut noise),
            shm_offset: page(&mut noise),
            len: page(&mut noise),
            flags: noise.below(3),
        };
        if let Ok(place) = regions.map(&area, 0x8000) {
            let end = [0x1_0000, 0, 0x4000][usize::from(place.region)];
            assert!(place.at + place.size <= end && place.file_offset + place.size <= 0x8000);
        }
        drop(
            regions
                .unmap(&transport::vhost_user::message::ShmemArea { shm_offset: page(&mut noise), ..area }),
        );
    }
}

#[test]
fn iotlb_misses_of_noise_are_answered_inside_memory_only() {
    let memory = GuestMemory::new(2 << 20);
    let map = transport::vhost_user::IovaMap::identity(&memory.map);
    let mut noise = Noise(11);
    for _ in 0..100_000 {
        let mut bytes = noise.bytes(32);
        bytes.resize(32, 0);
        let miss: Iotlb = parse(&bytes).unwrap();
        if let Some(answer) = map.answer(&miss) {
            assert!(miss.kind == 1 && answer.iova <= miss.iova && answer.iova + answer.size <= 2 << 20);
        }
    }
}

/// A peer that says all of `bytes` at once and then nothing more.
fn canned(bytes: &[u8]) -> (UnixStream, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(bytes).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    (ours, theirs)
}

#[test]
fn conversations_of_noise_end_at_once() {
    let mut noise = Noise(3);
    let limits = Limits::new(Duration::from_secs(10));
    let _rings = Rings::new();
    let begin = Instant::now();
    for _ in 0..1000 {
        // Sound headers of the first answers, with noise for payloads: it gets as far as it can.
        let mut bytes = Vec::new();
        for code in [1, 15, 16, 3, 17, 21, 24, 24, 25, 2, 5] {
            if noise.below(20) == 0 {
                bytes.extend(noise.bytes(40));
            }
            bytes.extend(Header::reply(code, 8).as_bytes());
            let payload = match (code, noise.below(4)) {
                (1, _) => 1 << 30 | 1 << 32 | noise.next(),
                (15, _) => noise.next() & 0xffff,
                (_, 0) => noise.next(),
                _ => 0,
            };
            bytes.extend(payload.to_ne_bytes());
        }
        let (stream, _theirs) = canned(&bytes);
        assert!(whole_life(stream, &limits, &Wanted::default()).is_err());
    }
    assert!(begin.elapsed() < Duration::from_secs(10), "nothing waited for a deadline");
}
