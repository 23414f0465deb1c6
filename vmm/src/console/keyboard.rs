//! The keys of a raw terminal, where Ctrl-A is ours and everything else the guest's. Pure: reads no terminal.

/// Begins an escape: Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What was typed, as far as it means more than itself.
///
/// Ctrl-A x quits, Ctrl-A a and Ctrl-A Ctrl-A type a Ctrl-A, Ctrl-A with anything else is swallowed.
#[derive(Debug, Default)]
pub struct Keyboard {
    escaped: bool,
}

/// What a typed byte means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Nothing, or nothing yet.
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
