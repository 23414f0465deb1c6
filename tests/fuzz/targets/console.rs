//! The keys of a raw terminal: Ctrl-A begins an escape, everything else is the guest's.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::console::keyboard::{Key, Keyboard};

const ESCAPE: u8 = 1;

fuzz_target!(|data: &[u8]| {
    let mut keyboard = Keyboard::default();
    let mut typed = data.iter().copied();
    while let Some(byte) = typed.next() {
        if byte != ESCAPE {
            assert_eq!(keyboard.key(byte), Key::Byte(byte));
            continue;
        }
        assert_eq!(keyboard.key(ESCAPE), Key::Nothing);
        let Some(next) = typed.next() else { break };
        let expected = match next {
            b'x' | b'X' => Key::Quit,
            b'a' | ESCAPE => Key::Byte(ESCAPE),
            _ => Key::Nothing,
        };
        assert_eq!(keyboard.key(next), expected, "Ctrl-A and {next:#x}");
    }
});
