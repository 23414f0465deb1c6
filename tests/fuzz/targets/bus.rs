//! Ranges on a bus: no overlap gets in, each access goes to the one device that claims all of it.
#![no_main]

use std::sync::{Arc, Mutex};

use devices::bus::{Bus, BusDevice, Claim};
use devices::pvpanic::PvPanic;
use devices::reset::{I8042, ResetPort};
use fuzz::input::Input;
use libfuzzer_sys::fuzz_target;

/// Notes what came.
#[derive(Clone, Default)]
struct Noted(Arc<Mutex<Vec<(usize, u64, usize)>>>, usize, u64);

impl BusDevice for Noted {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(7);
        self.write(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let last = offset.checked_add((data.len() as u64).saturating_sub(1)).expect("inside the range");
        assert!(last < self.2, "an access beyond the range");
        self.0.lock().expect("no panic").push((self.1, offset, data.len()));
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let (mut bus, seen) = (Bus::new(), Noted::default());
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let ports: [Box<dyn BusDevice>; 3] =
        [Box::new(ResetPort::new(|_| {})), Box::new(I8042::new(|_| {})), Box::new(PvPanic::new(|| {}))];
    while !input.is_empty() {
        let (op, at) = (input.byte() % 4, input.number());
        if op == 0 && ranges.len() < 16 {
            let length = input.number();
            let device = Noted(Arc::clone(&seen.0), ranges.len(), length);
            let fits = length > 0
                && at.checked_add(length - 1).is_some_and(|last| {
                    ranges.iter().all(|(start, length)| last < *start || at > start + (length - 1))
                });
            assert_eq!(
                bus.insert(at, length, "range", Arc::new(device)).is_ok(),
                fits,
                "{at:#x}+{length:#x}"
            );
            if fits {
                ranges.push((at, length));
            }
            continue;
        }
        let mut bytes = vec![0xaa; input.below(9)];
        for port in &ports {
            port.write(at, &bytes);
            port.read(at, &mut bytes);
        }
        seen.0.lock().expect("no panic").clear();
        let claim = if op == 1 { bus.read(at, &mut bytes) } else { bus.write(at, &bytes) };
        let last = at.checked_add((bytes.len() as u64).saturating_sub(1));
        let inside =
            |(start, length): &(u64, u64)| at >= *start && last.is_some_and(|last| last - start < *length);
        let expected = ranges.iter().position(inside);
        let got = seen.0.lock().expect("no panic").clone();
        match expected {
            Some(index) => {
                assert_eq!((claim, got), (Claim::Device, vec![(index, at - ranges[index].0, bytes.len())]));
            }
            None => {
                assert_eq!((claim, got), (Claim::Nobody, Vec::new()));
                assert!(op != 1 || bytes.iter().all(|byte| *byte == 0xff));
            }
        }
    }
    let counters = bus.counters();
    assert_eq!(counters.ranges.len(), ranges.len());
});
