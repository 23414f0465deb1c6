//! The payload of every reply of a vfio-user server but VERSION's and region information, and the header
//! before it.
#![no_main]

use fuzz::input::Input;
use libfuzzer_sys::fuzz_target;
use transport::vfio_user::message::{Command, HEADER_SIZE, Header, Kind, LoggingReport, parse};
use transport::vfio_user::migration::{
    parse_feature, parse_logging_start, parse_migration_data, parse_migration_state, parse_report,
};
use transport::vfio_user::{IoFdKind, IrqIndex, parse_device_info, parse_io_fds, parse_irq_info};

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    match input.byte() % 9 {
        0 => header(&mut input),
        1 => {
            if let Ok(info) = parse_device_info(&input.rest()) {
                assert!(info.regions <= 1024 && info.irqs <= 1024);
            }
        }
        2 => {
            let index = IrqIndex(input.byte().into());
            if let Ok(info) = parse_irq_info(&input.rest(), index) {
                assert!(info.index == index && info.count <= 2048);
            }
        }
        3 => doorbells(&mut input),
        4 => {
            let flags = input.u32();
            let payload = input.rest();
            if let Ok(data) = parse_feature(&payload, flags) {
                assert!(payload.ends_with(data));
            }
        }
        5 => {
            let asked = input.below(300);
            if let Ok(data) = parse_migration_data(&input.rest(), asked) {
                assert!(data.len() <= asked);
            }
        }
        6 => drop(parse_migration_state(&input.rest()).map(|state| state.to_string())),
        7 => report(&mut input),
        _ => {
            if let Ok(size) = parse_logging_start(&input.rest(), 4096) {
                assert!(size.is_power_of_two() && size >= 4096);
            }
        }
    }
});

fn header(input: &mut Input) {
    let most = input.u32();
    let Ok(header) = parse::<Header>(&input.bytes(HEADER_SIZE)) else { return };
    match header.judge_size(most) {
        Ok(payload) => assert!(payload <= most && header.size == payload + 16),
        Err(fault) => drop(fault.to_string()),
    }
    match header.kind() {
        Ok(Kind::Command | Kind::Posted) => assert_eq!(header.flags & 0x2f, 0),
        Ok(Kind::Reply) => assert_eq!(header.flags, 1),
        Ok(Kind::ErrorReply) => assert_eq!(header.flags & !1, 0x20),
        Err(fault) => drop(fault.to_string()),
    }
    let command = Command(header.command);
    assert_eq!(command.name().is_some(), Command::ALL.contains(&command));
}

fn doorbells(input: &mut Input) {
    let (index, size, fds) = (input.byte().into(), input.number(), input.below(4));
    if let Ok(places) = parse_io_fds(&input.rest(), index, size, fds) {
        assert!(places.len() <= 512);
        for place in places {
            assert!(place.fd < fds && place.offset < size && place.offset + place.size <= size);
            if let IoFdKind::Shadow { fd, .. } = place.kind {
                assert!(fd < fds);
            }
        }
    }
}

fn report(input: &mut Input) {
    let pages = 1 + u64::from(input.u16() % 300);
    let asked = LoggingReport { iova: input.number(), length: pages << 12, page_size: 4096 };
    let mut data = asked.iova.to_ne_bytes().to_vec();
    data.extend(input.rest());
    if let Ok(words) = parse_report(&data, &asked, pages) {
        assert_eq!(words.len() as u64, pages.div_ceil(64));
        let bits: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
        assert!(bits <= pages);
    }
}
