//! Conversions between `usize` and `u64`. Both have the same width on x86-64, the only supported host.

const _: () = assert!(usize::BITS == u64::BITS);

/// Converts a length or an index to 64 bits.
pub const fn to_u64(value: usize) -> u64 {
    value as u64
}

/// Converts a number of at most 64 bits to a length or an index.
#[expect(clippy::cast_possible_truncation, reason = "the widths are equal, see above")]
pub fn to_usize(value: impl Into<u64>) -> usize {
    value.into() as usize
}
