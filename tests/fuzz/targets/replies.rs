//! The payload of every answer of a vhost-user backend, and the header before it.
#![no_main]

use fuzz::input::Input;
use libfuzzer_sys::fuzz_target;
use transport::memory::PAGE;
use transport::vhost_user::config::{ConfigReply, parse_reply};
use transport::vhost_user::extras::parse_session;
use transport::vhost_user::inflight::parse_inflight;
use transport::vhost_user::message::{
    ConfigHead, HEADER_SIZE, Header, Inflight, MemRegion, MemTableHead, ShmemHead, VringState, parse,
    parse_front,
};
use transport::vhost_user::migration::postcopy::parse_table;
use transport::vhost_user::request::Request;
use transport::vhost_user::shmem::parse_config;
use transport::vhost_user::vring::parse_base;
use transport::vhost_user::{DeviceFeatures, DriverFeatures};
use zerocopy::IntoBytes;

fn features(bits: u64) -> DriverFeatures {
    DeviceFeatures::from_bits(bits).accept(bits).expect("its own")
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    match input.byte() % 9 {
        0 => header(&mut input),
        1 => config(&mut input),
        2 => {
            let (index, bits) = (input.u32(), input.number());
            let payload = input.rest();
            if let Ok(base) = parse_base(&payload, index, features(bits)) {
                let state: VringState = parse(&payload).expect("8 bytes");
                assert_eq!((state.index, state.num), (index, base.0));
                assert!(bits >> 34 & 1 == 1 || base.0 <= 0xffff);
            }
        }
        3 => inflight(&mut input),
        4 => {
            if let Ok(sizes) = parse_config(&input.rest()) {
                assert!(sizes.len() <= 256 && sizes.last() != Some(&0));
                assert!(sizes.iter().all(|size| size % PAGE == 0));
            }
        }
        5 => {
            let payload = input.rest();
            if let Ok(Ok(session)) = parse_session(&payload) {
                assert_eq!(payload[..8], session.0.to_ne_bytes());
            }
        }
        6 => table(&mut input),
        7 => {
            // Codes and faults print, whatever they are.
            let code = input.u32();
            assert_eq!(Request(code).row().is_some(), (1..=45).contains(&code));
            let _ = Request(code).to_string();
            if let Err(fault) = parse::<Inflight>(&input.rest()) {
                let _ = fault.to_string();
            }
        }
        _ => {
            let rest = input.rest();
            let _ = (parse_front::<ShmemHead>(&rest), parse_front::<ConfigHead>(&rest));
        }
    }
});

fn header(input: &mut Input) {
    let (asked, most) = (input.u32(), input.u32());
    let Ok(header) = parse::<Header>(&input.bytes(HEADER_SIZE)) else { return };
    match header.judge_reply(asked, most) {
        Ok(()) => {
            assert!(header.is_reply() && header.request == asked && header.size <= most);
            assert!(header.judge_request(most).is_err(), "a reply is no request");
        }
        Err(fault) => drop(fault.to_string()),
    }
    if header.judge_request(most).is_ok() {
        assert!(!header.is_reply() && header.size <= most);
    }
}

fn config(input: &mut Input) {
    let asked = 1 + u32::from(input.byte());
    let payload = input.rest();
    if let Ok(ConfigReply::Bytes(bytes)) = parse_reply(&payload, asked) {
        assert!(!bytes.is_empty() && bytes.len() <= asked as usize);
        assert!(payload[size_of::<ConfigHead>()..].starts_with(bytes));
    }
}

fn inflight(input: &mut Input) {
    let (queues, queue_size) = (input.u16(), input.u16());
    let payload = input.rest();
    if let Ok(Some(area)) = parse_inflight(&payload, queues, queue_size) {
        assert_eq!((area.num_queues, area.queue_size), (queues, queue_size));
        assert!(area.mmap_size >= u64::from(queues) * u64::from(queue_size));
        assert!(area.mmap_offset.checked_add(area.mmap_size).is_some());
    }
}

fn table(input: &mut Input) {
    let count = input.below(9);
    let mut sent = MemTableHead { count: count as u32, padding: 0 }.as_bytes().to_vec();
    for n in 0..count as u64 {
        sent.extend(MemRegion { guest: n << 21, size: 1 << 21, user: 1 << 44, offset: 0 }.as_bytes());
    }
    // The answer is what was sent with some bytes changed, cut or added.
    let mut answer = sent.clone();
    for _ in 0..input.below(8) {
        let at = input.below(answer.len());
        answer[at] ^= input.byte();
    }
    answer.extend(input.bytes(64));
    answer.truncate(answer.len() - input.below(answer.len()));
    if let Ok(bases) = parse_table(&answer, &sent) {
        assert_eq!(bases.len(), count);
    }
}
