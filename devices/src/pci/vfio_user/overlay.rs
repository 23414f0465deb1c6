//! The bits of a function's configuration space that the client answers itself. The server answers all other
//! bits. Pure data; must never reach beyond the space.

/// The client's bits and their values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    ours: Vec<u8>,
    values: Vec<u8>,
}

impl Overlay {
    /// An overlay of `size` bytes in which all bits are the server's.
    #[must_use]
    pub fn new(size: u16) -> Self {
        let size = usize::from(size);
        Self { ours: vec![0; size], values: vec![0; size] }
    }

    /// The size of the space in bytes.
    #[must_use]
    pub fn size(&self) -> u16 {
        u16::try_from(self.ours.len()).unwrap_or(u16::MAX)
    }

    /// Makes the bits of `mask` the client's and gives them `value`; both are little-endian from `offset` on.
    pub fn claim(&mut self, offset: u16, mask: u32, value: u32) {
        for (index, (mask, value)) in mask.to_le_bytes().into_iter().zip(value.to_le_bytes()).enumerate() {
            let at = usize::from(offset).saturating_add(index);
            if let (Some(ours), Some(held)) = (self.ours.get_mut(at), self.values.get_mut(at)) {
                *ours |= mask;
                *held = (*held & !mask) | (value & mask);
            }
        }
    }

    /// Whether the server answers any bit of these bytes. Bytes beyond the space count as the server's.
    #[must_use]
    pub fn needs_server(&self, offset: u16, length: usize) -> bool {
        let bytes = (0..length).map(|index| self.ours.get(usize::from(offset).saturating_add(index)));
        bytes.into_iter().any(|ours| ours.is_none_or(|ours| *ours != 0xff))
    }

    /// Replaces the client's bits in `data`, which the server answered, by their values.
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
