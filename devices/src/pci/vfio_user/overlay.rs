//! The bits of a function's configuration space that the client answers itself; all others are its server's.
//! Pure. Must never reach beyond the space.

/// Some bits of some bytes, with their values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    ours: Vec<u8>,
    values: Vec<u8>,
}

impl Overlay {
    /// No bit of `size` bytes.
    #[must_use]
    pub fn new(size: u16) -> Self {
        let size = usize::from(size);
        Self { ours: vec![0; size], values: vec![0; size] }
    }

    /// Bytes of the space.
    #[must_use]
    pub fn size(&self) -> u16 {
        u16::try_from(self.ours.len()).unwrap_or(u16::MAX)
    }

    /// Takes the bits of `mask` from the server, little-endian from `offset` on, and gives them `value`.
    pub fn claim(&mut self, offset: u16, mask: u32, value: u32) {
        for (index, (mask, value)) in mask.to_le_bytes().into_iter().zip(value.to_le_bytes()).enumerate() {
            let at = usize::from(offset).saturating_add(index);
            if let (Some(ours), Some(held)) = (self.ours.get_mut(at), self.values.get_mut(at)) {
                *ours |= mask;
                *held = (*held & !mask) | (value & mask);
            }
        }
    }

    /// Whether some of these bits are the server's.
    #[must_use]
    pub fn needs_server(&self, offset: u16, length: usize) -> bool {
        let bytes = (0..length).map(|index| self.ours.get(usize::from(offset).saturating_add(index)));
        bytes.into_iter().any(|ours| ours.is_none_or(|ours| *ours != 0xff))
    }

    /// Puts our bits over what the server said.
    pub fn cover(&self, offset: u16, data: &mut [u8]) {
        let from = usize::from(offset);
        let held = self.ours.iter().zip(&self.values).skip(from);
        for (byte, (ours, value)) in data.iter_mut().zip(held) {
            *byte = (*byte & !ours) | value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_bits_cover_the_servers_and_nothing_else() {
        let mut overlay = Overlay::new(16);
        overlay.claim(4, 0x0000_f0ff, 0xffff_a0bb);
        overlay.claim(14, 0xffff_ffff, 0);
        let mut data = [0x11; 8];
        overlay.cover(2, &mut data);
        assert_eq!(data, [0x11, 0x11, 0xbb, 0xa1, 0x11, 0x11, 0x11, 0x11]);
        assert!(!overlay.needs_server(4, 1));
        assert!(overlay.needs_server(4, 2));
        assert!(!overlay.needs_server(14, 2));
        assert!(overlay.needs_server(14, 4), "what is not there is not ours");
    }
}
