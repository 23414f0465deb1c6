//! Reading and printing bytes, for both protocols: payloads of a fixed size, and what can be wrong with a
//! message.
//!
//! All numbers are native endian. Must never allocate.

use std::fmt;

use zerocopy::FromBytes;

/// What is wrong with a message of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Version, direction or reserved bits are wrong.
    #[error("with flags {0:#x}")]
    Flags(u32),
    /// The message belongs to another request.
    #[error("with a message of request {0}")]
    Request(u32),
    /// The size of the payload is not possible for this message.
    #[error("with {got} bytes where {} are due", Between(*.least, *.most))]
    Size {
        /// Bytes that came or were announced.
        got: u32,
        /// The fewest bytes that are possible.
        least: u32,
        /// The most bytes that are possible.
        most: u32,
    },
    /// More or fewer fds came than the message has.
    #[error("with {got} file descriptors where {} are due", Between(u32::from(*.least), u32::from(*.most)))]
    Fds {
        /// Fds that came.
        got: usize,
        /// The fewest fds that are possible.
        least: u8,
        /// The most fds that are possible.
        most: u8,
    },
    /// Fds came although none was due. The kernel dropped them and does not tell their number.
    #[error("with file descriptors where none are due")]
    StrayFds,
    /// This process could not receive all fds, as it has too many open fds.
    #[error("with file descriptors that this process had no room for")]
    FdsTruncated,
    /// A descriptor is of a kind on which an operation could wait for the peer.
    #[error("with a file descriptor of a kind that is not accepted")]
    Descriptor,
    /// A field holds a value that is not allowed.
    #[error("with {field} {value:#x}")]
    Value {
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The message answers no request (in vfio-user: its id is not in use).
    #[error("with an answer to nothing (message id {0:#x})")]
    Unasked(u16),
    /// Something else is not what it must be; the text says what.
    #[error("with {0}")]
    Text(&'static str),
}

struct Between(u32, u32);

impl fmt::Display for Between {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == self.1 { write!(f, "{}", self.0) } else { write!(f, "{} to {}", self.0, self.1) }
    }
}

/// Reads a payload of exactly `T`'s size.
pub fn parse<T: FromBytes>(bytes: &[u8]) -> Result<T, Fault> {
    let due = length(size_of::<T>());
    T::read_from_bytes(bytes).map_err(|_| Fault::Size { got: length(bytes.len()), least: due, most: due })
}

/// Reads `T` from the front of `bytes` and returns what follows.
pub fn parse_front<T: FromBytes>(bytes: &[u8]) -> Result<(T, &[u8]), Fault> {
    let least = length(size_of::<T>());
    T::read_from_prefix(bytes).map_err(|_| Fault::Size { got: length(bytes.len()), least, most: u32::MAX })
}

/// A length as a message holds it. It saturates, so that an absurd length is refused and never wraps.
pub(crate) fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// Prints the first bytes of a payload that is not decoded any further.
pub(crate) fn describe_bytes(f: &mut fmt::Formatter<'_>, payload: &[u8]) -> fmt::Result {
    const MOST: usize = 32;
    if payload.is_empty() {
        return Ok(());
    }
    f.write_str(" [")?;
    for byte in payload.iter().take(MOST) {
        write!(f, "{byte:02x}")?;
    }
    if payload.len() > MOST {
        write!(f, "… {} bytes", payload.len())?;
    }
    f.write_str("]")
}

macro_rules! payloads {
    ($($(#[$doc:meta])* $name:ident, $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct $name {
                $($(#[$field_doc])* pub $field: $type,)*
            }
            const _: () = assert!(size_of::<$name>() == $size);
        )*
    };
}

pub(crate) use payloads;
