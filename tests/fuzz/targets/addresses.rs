//! Address arithmetic: memory maps, I/O virtual addresses, and the layout of rings, against the obvious
//! answers.
#![no_main]

use std::sync::Arc;

use fuzz::descriptors::{guest_memory, memory_file};
use fuzz::input::Input;
use libfuzzer_sys::fuzz_target;
use transport::memory::log_size;
use transport::memory::{GuestAddr, Iova, MemoryMap, PAGE, SharedRegion, UserAddr};
use transport::vhost_user::iotlb::{Access, IovaRange};
use transport::vhost_user::vring::RingSpace;
use transport::vhost_user::{Call, DeviceFeatures, IovaMap, Kick, Ring, RingBase};

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    match input.byte() % 3 {
        0 => memory(&mut input),
        1 => iova(&mut input),
        _ => ring(&mut input),
    }
});

/// A page-aligned number, mostly.
fn aligned(input: &mut Input) -> u64 {
    let number = input.number();
    if input.rarely(16) { number } else { number & !(PAGE - 1) }
}

fn memory(input: &mut Input) {
    let fd = Arc::new(memory_file(0));
    let parts: Vec<(u64, u64, u64)> =
        (0..input.byte() % 8).map(|_| (aligned(input), aligned(input), aligned(input))).collect();
    let regions =
        parts.iter().map(|(at, size, offset)| SharedRegion::new(GuestAddr(*at), *size, fd.clone(), *offset));
    let map = match MemoryMap::new(regions.collect()) {
        Ok(map) => map,
        Err(error) => return drop(error.to_string()),
    };
    // Sums in 128 bits cannot wrap.
    let inside = |(at, size, _): &&(u64, u64, u64), from: u64, len: u64| {
        from >= *at && u128::from(from) + u128::from(len) <= u128::from(*at) + u128::from(*size)
    };
    assert!(log_size(&map).is_multiple_of(PAGE));
    assert!(u128::from(log_size(&map)) * u128::from(8 * PAGE) >= u128::from(map.end().raw()));
    while !input.is_empty() {
        let (from, len) = (input.number(), input.number());
        let expected = parts.iter().any(|part| inside(&part, from, len));
        let user = map.user_addr(GuestAddr(from), len);
        assert_eq!(user.is_some(), expected, "{from:#x}+{len:#x}");
        if let Some(user) = user {
            assert_eq!(UserAddr::guest_of(user.raw()), Some(GuestAddr(from)));
        }
    }
}

fn iova(input: &mut Input) {
    let memory = guest_memory();
    let ranges: Vec<IovaRange> = (0..input.byte() % 8)
        .map(|_| IovaRange {
            iova: Iova(input.number()),
            size: input.number(),
            guest: GuestAddr(input.number()),
            access: input.pick(&[Access::Read, Access::Write, Access::ReadWrite]),
        })
        .collect();
    let map = match IovaMap::new(ranges.clone(), &memory) {
        Ok(map) => map,
        Err(error) => return drop(error.to_string()),
    };
    while !input.is_empty() {
        let (at, len) = (input.number(), input.number());
        let guest = map.translate(Iova(at), len);
        let held = ranges.iter().find(|range| {
            at >= range.iova.0
                && u128::from(at) < u128::from(range.iova.0) + u128::from(range.size)
                && u128::from(at) + u128::from(len) <= u128::from(range.iova.0) + u128::from(range.size)
        });
        assert_eq!(
            guest,
            held.map(|range| GuestAddr(range.guest.0 + (at - range.iova.0))),
            "{at:#x}+{len:#x}"
        );
        assert!(guest.is_none_or(|guest| memory.user_addr(guest, len).is_some()));
    }
}

fn ring(input: &mut Input) {
    thread_local! {
        static EVENTFDS: (Kick, Call) = (Kick::new().expect("an eventfd"), Call::new().expect("an eventfd"));
        static MEMORY: MemoryMap = guest_memory();
    }
    EVENTFDS.with(|(kick, call)| {
        MEMORY.with(|memory| {
            let ring = Ring {
                index: input.u16(),
                size: input.number() as u16,
                descriptor: GuestAddr(input.number()),
                available: GuestAddr(input.number()),
                used: GuestAddr(input.number()),
                base: RingBase(input.u32()),
                kick,
                call,
                error: None,
            };
            let bits = if input.rarely(2) { 1 << 34 } else { 0 };
            let features = DeviceFeatures::from_bits(bits).accept(bits).expect("its own");
            let Ok(address) = ring.address(features, RingSpace::User(memory)) else { return };
            let (n, packed) = (u64::from(ring.size), bits != 0);
            assert!(ring.index < 256 && (1..=32768).contains(&ring.size) && (packed || n.is_power_of_two()));
            let (driver, device) = if packed { (4, 4) } else { (6 + 2 * n, 6 + 8 * n) };
            let parts = [
                (ring.descriptor, address.descriptor, 16 * n),
                (ring.available, address.available, driver),
                (ring.used, address.used, device),
            ];
            for (at, told, len) in parts {
                assert_eq!(memory.user_addr(at, len).map(UserAddr::raw), Some(told));
            }
        });
    });
}
