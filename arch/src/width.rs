//! Conversions between `usize` and `u64`, which have the same width on the one kind of host that there is:
//! x86-64.

const _: () = assert!(usize::BITS == u64::BITS);

/// A length or an index as 64 bits.
pub const fn to_u64(value: usize) -> u64 {
    value as u64
}

/// A number of at most 64 bits as a length or an index.
#[expect(clippy::cast_possible_truncation, reason = "the widths are equal, see above")]
pub fn to_usize(value: impl Into<u64>) -> usize {
    value.into() as usize
}
