//! The fuzzer's bytes as numbers, choices and ranges, taken from the front.
//!
//! An input that has ended goes on with zeros, so that a short one is a well-behaved one.

/// What is left of an input.
#[derive(Debug, Default)]
pub struct Input {
    bytes: Vec<u8>,
    at: usize,
}

impl Input {
    /// All of `bytes`.
    pub fn new(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), at: 0 }
    }

    /// True when nothing but zeros follow.
    pub fn is_empty(&self) -> bool {
        self.at >= self.bytes.len()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let byte = self.bytes.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        byte
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.byte())
    }

    /// Two bytes, little-endian.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Eight bytes, little-endian.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        let number = if limit <= 256 { usize::from(self.byte()) } else { self.u32() as usize };
        number % limit
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// True once in `n` or so; false when the input has ended.
    pub fn rarely(&mut self, n: u8) -> bool {
        self.byte() % n == n - 1
    }

    /// A number that parsers find interesting: small, a power of two or close to one, near the end of its
    /// type, whole pages; or any.
    pub fn number(&mut self) -> u64 {
        let small = u64::from(self.byte());
        match self.byte() % 8 {
            0 => small,
            1 => 1u64 << (small % 64),
            2 => (1u64 << (small % 64)).wrapping_sub(1),
            3 => u64::MAX - small,
            4 => u64::from(u32::MAX).wrapping_add(small).wrapping_sub(128),
            5 => small << 12,
            6 => u64::from(self.u32()),
            _ => self.u64(),
        }
    }

    /// Up to `most` bytes, the length first.
    pub fn bytes(&mut self, most: usize) -> Vec<u8> {
        let length = self.below(most + 1);
        (0..length).map(|_| self.byte()).collect()
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> Vec<u8> {
        let rest = self.bytes.get(self.at..).unwrap_or_default().to_vec();
        self.at = self.bytes.len();
        rest
    }
}
