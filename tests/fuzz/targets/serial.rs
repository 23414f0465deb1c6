//! The serial port: any accesses of a guest, with typing in between. No typed byte is lost or doubled.
#![no_main]

use devices::bus::BusDevice;
use devices::serial::Serial;
use fuzz::descriptors::none_left;
use fuzz::input::Input;
use libfuzzer_sys::fuzz_target;

const DATA: u64 = 0;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const DIVISOR_LATCH: u8 = 0x80;
const LOOP: u8 = 0x10;
const DATA_READY: u8 = 1;

fuzz_target!(|data: &[u8]| {
    none_left(|| {
        let mut input = Input::new(data);
        let serial = Serial::new(std::sync::Arc::new(())).expect("an eventfd");
        let (mut typed, mut looped) = (Vec::new(), false);
        let (mut read, mut next) = (Vec::new(), 0u8);
        while !input.is_empty() {
            match input.byte() {
                0..48 => {
                    let bytes: Vec<u8> = (0..input.byte()).map(|n| next.wrapping_add(n)).collect();
                    let taken = serial.enqueue(&bytes);
                    assert!(taken <= bytes.len());
                    typed.extend_from_slice(&bytes[..taken]);
                    next = next.wrapping_add(taken as u8);
                }
                48..52 => serial.reset(),
                52..56 => serial.clear_input_space(),
                56..120 => {
                    let (register, value) = (u64::from(input.byte() % 8), input.byte());
                    looped |= register == MCR && value & LOOP != 0;
                    serial.write(register, &[value]);
                }
                120..136 => {
                    let (register, values) = (input.number(), input.bytes(8));
                    looped |= register == MCR && values.iter().any(|value| value & LOOP != 0);
                    serial.write(register, &values);
                }
                136..152 => {
                    let at = input.number();
                    // The data register is read below, where it is known to be one.
                    serial.read(if at == DATA { LSR } else { at }, &mut [0; 8]);
                }
                _ => {
                    let mut lcr = [0];
                    serial.read(LCR, &mut lcr);
                    if lcr[0] & DIVISOR_LATCH == 0 && ready(&serial) {
                        let mut byte = [0];
                        serial.read(DATA, &mut byte);
                        read.extend(byte);
                    }
                }
            }
        }
        // In loop mode the guest types, too; after that nothing can be told.
        serial.write(LCR, &[3]);
        while ready(&serial) {
            let mut byte = [0];
            serial.read(DATA, &mut byte);
            read.extend(byte);
            assert!(read.len() <= 1 << 20, "input without end");
        }
        if !looped {
            assert_eq!(read, typed);
        }
    });
});

fn ready(serial: &Serial) -> bool {
    let mut lsr = [0];
    serial.read(LSR, &mut lsr);
    lsr[0] & DATA_READY != 0
}
