//! Region information of a vfio-user server: capability chains end inside the payload, and what may be mapped
//! lies inside region and file, in order, apart, in whole pages.
#![no_main]

use fuzz::input::Input;
use fuzz::seeds::offer;
use libfuzzer_sys::fuzz_target;
use transport::vfio_user::message::{CapabilityHead, RegionInfoPayload, SparseHead};
use transport::vfio_user::{RegionIndex, mappable, parse_region_info};
use zerocopy::IntoBytes;

const PAGE: u64 = 4096;

fuzz_target!(init: offer(&seeds()), |data: &[u8]| {
    let mut input = Input::new(data);
    let held = if input.byte() < 128 { None } else { Some(input.number()) };
    let payload = input.rest();
    let reply = match parse_region_info(&payload, RegionIndex(0)) {
        Ok(reply) => reply,
        Err(fault) => return drop(fault.to_string()),
    };
    let listed = reply.areas.as_ref().map_or(0, Vec::len);
    // Chains go forward, so an area is listed as often as its bytes are there, in each of 64 capabilities.
    assert!(listed <= 64 * payload.len() / 16);
    let Ok(areas) = mappable(&reply, held) else { return };
    assert!(areas.len() <= 256);
    let mut end = 0;
    for (number, area) in areas.iter().enumerate() {
        assert!(area.size > 0 && area.offset % PAGE == 0 && area.size % PAGE == 0);
        assert!(number == 0 || area.offset > end, "areas that touch are one");
        end = area.offset + area.size;
        assert!(end <= reply.size);
        assert_eq!(area.file_offset, reply.offset + area.offset);
        assert!(held.is_none_or(|held| area.file_offset + area.size <= held));
    }
});

/// A good reply with two areas, and one with two capabilities.
fn seeds() -> Vec<Vec<u8>> {
    let info =
        |argsz| RegionInfoPayload { argsz, flags: 15, index: 0, cap_offset: 32, size: 1 << 20, offset: 0 };
    let areas = [0x1000u64, 0x1000, 0x4000, 0x2000].map(u64::to_ne_bytes).concat();
    let sparse = SparseHead { count: 2, reserved: 0 };
    let head = |id, next| CapabilityHead { id, version: 1, next };
    let one = [&[0], info(80).as_bytes(), head(1, 0).as_bytes(), sparse.as_bytes(), &areas].concat();
    let (unknown, last) = (head(9, 40), head(1, 0));
    let two =
        [&[0], info(88).as_bytes(), unknown.as_bytes(), last.as_bytes(), sparse.as_bytes(), &areas].concat();
    vec![one, two]
}
