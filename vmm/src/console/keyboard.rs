//! The keys of a raw terminal. Ctrl-A begins a command to the VMM; every other key goes to the guest. Pure:
//! this module reads no terminal.

/// Ctrl-A, which begins an escape sequence.
const ESCAPE: u8 = 0x01;

/// A decoder of typed bytes.
///
/// * Ctrl-A x ends the machine.
/// * Ctrl-A a and Ctrl-A Ctrl-A type one Ctrl-A.
/// * Ctrl-A before any other byte is dropped with that byte.
#[derive(Debug, Default)]
pub struct Keyboard {
    escaped: bool,
}

/// The meaning of a typed byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// No meaning, or the first byte of an escape sequence.
    Nothing,
    /// A byte for the guest.
    Byte(u8),
    /// The end of the machine.
    Quit,
}

impl Keyboard {
    /// Takes one typed byte.
    pub fn key(&mut self, byte: u8) -> Key {
        match (std::mem::take(&mut self.escaped), byte) {
            (false, ESCAPE) => {
                self.escaped = true;
                Key::Nothing
            }
            (false, byte) => Key::Byte(byte),
            (true, b'x' | b'X') => Key::Quit,
            (true, b'a' | ESCAPE) => Key::Byte(ESCAPE),
            (true, _) => Key::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_quits_and_ctrl_a_a_types_it() {
        let mut keyboard = Keyboard::default();
        assert_eq!(keyboard.key(b'x'), Key::Byte(b'x'));
        assert_eq!(keyboard.key(ESCAPE), Key::Nothing);
        assert_eq!(keyboard.key(b'a'), Key::Byte(ESCAPE));
        assert_eq!(keyboard.key(ESCAPE), Key::Nothing);
        assert_eq!(keyboard.key(b'q'), Key::Nothing);
        assert_eq!(keyboard.key(b'q'), Key::Byte(b'q'));
        assert_eq!(keyboard.key(ESCAPE), Key::Nothing);
        assert_eq!(keyboard.key(b'x'), Key::Quit);
    }
}
