//! vfio-user "Header" and "Commands": the header and the payloads as bytes. Holds layouts only; makes no
//! decisions.
//!
//! All numbers are native endian. No struct has padding, and the size of each is asserted below.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::peer::MessageName;
pub(crate) use crate::peer::wire::length;
use crate::peer::wire::payloads;
pub use crate::peer::wire::{Fault, parse, parse_front};

const TYPE_MASK: u32 = 0xf;
const REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// Bytes of a message header.
pub const HEADER_SIZE: usize = size_of::<Header>();
const HEADER_BYTES: u32 = 16;

/// The header of each message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// The message id. The sender of a command chooses it, and the reply repeats it.
    pub id: u16,
    /// The command code. The reply repeats it.
    pub command: u16,
    /// Bytes of the whole message, this header included.
    pub size: u32,
    /// Message type, no_reply flag, error flag.
    pub flags: u32,
    /// The errno of an error reply.
    pub errno: u32,
}

const _: () = assert!(HEADER_SIZE == 16);

/// The kind of a message, by its header's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A command that asks for a reply.
    Command,
    /// A command that asks for no reply.
    Posted,
    /// A reply to a command that succeeded.
    Reply,
    /// A reply to a command that failed.
    ErrorReply,
}

impl Header {
    /// The header of a command with `payload` bytes behind it.
    pub fn command(id: u16, command: Command, payload: u32) -> Self {
        Self { id, command: command.0, size: payload.saturating_add(HEADER_BYTES), flags: 0, errno: 0 }
    }

    /// The header of a command that asks for no reply.
    pub fn posted(id: u16, command: Command, payload: u32) -> Self {
        Self { flags: NO_REPLY, ..Self::command(id, command, payload) }
    }

    /// The header of the reply to `asked`.
    pub fn reply(asked: &Header, payload: u32) -> Self {
        Self { size: payload.saturating_add(HEADER_BYTES), flags: REPLY, errno: 0, ..*asked }
    }

    /// The header of an error reply to `asked`, which has no payload.
    pub fn error_reply(asked: &Header, errno: u32) -> Self {
        Self { size: HEADER_BYTES, flags: REPLY | ERROR, errno, ..*asked }
    }

    /// Bytes behind the header; `None` when the size is less than the header's own.
    pub fn payload(&self) -> Option<u32> {
        self.size.checked_sub(HEADER_BYTES)
    }

    /// The kind of message that the flags give.
    ///
    /// An error flag without the reply flag counts as an error reply, as real servers have sent such replies.
    pub fn kind(&self) -> Result<Kind, Fault> {
        if self.flags & !(TYPE_MASK | NO_REPLY | ERROR) != 0 {
            return Err(Fault::Flags(self.flags));
        }
        match (self.flags & TYPE_MASK, self.flags & NO_REPLY != 0, self.flags & ERROR != 0) {
            (0, false, false) => Ok(Kind::Command),
            (0, true, false) => Ok(Kind::Posted),
            (REPLY, false, false) => Ok(Kind::Reply),
            (0 | REPLY, false, true) => Ok(Kind::ErrorReply),
            _ => Err(Fault::Flags(self.flags)),
        }
    }

    /// Checks that the size covers the header and at most `most` bytes of payload. Returns the bytes of
    /// payload.
    pub fn judge_size(&self, most: u32) -> Result<u32, Fault> {
        let payload = self.payload();
        let fault =
            Fault::Size { got: self.size, least: HEADER_BYTES, most: most.saturating_add(HEADER_BYTES) };
        payload.filter(|payload| *payload <= most).ok_or(fault)
    }
}

/// A command code of either side. Open: an unknown code can be printed and never crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Command(pub u16);

macro_rules! commands {
    ($($code:literal $name:ident;)*) => {
        impl Command {
            $(#[doc = concat!("VFIO_USER_", stringify!($name), ".")] pub const $name: Self = Self($code);)*

            /// All commands of the specification.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its name in the specification, without the VFIO_USER_ prefix.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($code => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

commands! {
    1 VERSION;
    2 DMA_MAP;
    3 DMA_UNMAP;
    4 DEVICE_GET_INFO;
    5 DEVICE_GET_REGION_INFO;
    6 DEVICE_GET_REGION_IO_FDS;
    7 DEVICE_GET_IRQ_INFO;
    8 DEVICE_SET_IRQS;
    9 REGION_READ;
    10 REGION_WRITE;
    11 DMA_READ;
    12 DMA_WRITE;
    13 DEVICE_RESET;
    15 REGION_WRITE_MULTI;
    16 DEVICE_FEATURE;
    17 MIG_DATA_READ;
    18 MIG_DATA_WRITE;
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        MessageName::from(*self).fmt(f)
    }
}

/// A device feature, numbered as in kernel VFIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Feature(pub u16);

impl Feature {
    /// What the device supports of migration.
    pub const MIGRATION: Self = Self(1);
    /// The migration state.
    pub const MIG_DEVICE_STATE: Self = Self(2);
    /// Starts logging of the device's DMA writes.
    pub const DMA_LOGGING_START: Self = Self(6);
    /// Stops logging.
    pub const DMA_LOGGING_STOP: Self = Self(7);
    /// Reads the log.
    pub const DMA_LOGGING_REPORT: Self = Self(8);

    /// Its name in the specification, without the VFIO_DEVICE_FEATURE_ prefix.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::MIGRATION => Some("MIGRATION"),
            Self::MIG_DEVICE_STATE => Some("MIG_DEVICE_STATE"),
            Self::DMA_LOGGING_START => Some("DMA_LOGGING_START"),
            Self::DMA_LOGGING_STOP => Some("DMA_LOGGING_STOP"),
            Self::DMA_LOGGING_REPORT => Some("DMA_LOGGING_REPORT"),
            Self(_) => None,
        }
    }
}

impl From<Command> for MessageName {
    fn from(command: Command) -> Self {
        Self { code: u32::from(command.0), name: command.name().ok_or("command") }
    }
}

payloads! {
    /// The front of the VERSION payload. JSON follows.
    VersionHead, 4 {
        /// Changes when the message format does.
        major: u16,
        /// Changes when messages or capabilities are added.
        minor: u16,
    }
    /// DMA_MAP.
    DmaMap, 32 {
        /// Bytes of this payload.
        argsz: u32,
        /// Bit 0 readable, bit 1 writeable.
        flags: u32,
        /// First byte of the region in its fd.
        offset: u64,
        /// First DMA address of the region.
        address: u64,
        /// Bytes.
        size: u64,
    }
    /// DMA_UNMAP and its reply.
    DmaUnmap, 24 {
        /// The largest reply payload.
        argsz: u32,
        /// Zero.
        flags: u32,
        /// The first DMA address.
        address: u64,
        /// Bytes.
        size: u64,
    }
    /// DEVICE_GET_INFO and its reply.
    DeviceInfoPayload, 16 {
        /// In the command: the largest reply payload. In the reply: the bytes that a complete reply has.
        argsz: u32,
        /// Bit 0 reset, bit 1 PCI.
        flags: u32,
        /// The number of regions.
        regions: u32,
        /// The number of interrupt indexes.
        irqs: u32,
    }
    /// DEVICE_GET_REGION_INFO and its reply.
    RegionInfoPayload, 32 {
        /// In the command: the largest reply payload. In the reply: the bytes that a complete reply has.
        argsz: u32,
        /// Bit 0 read, 1 write, 2 mmap, 3 capabilities.
        flags: u32,
        /// The region's index.
        index: u32,
        /// Offset of the first capability from the start of this struct.
        cap_offset: u32,
        /// Bytes of the region.
        size: u64,
        /// First byte of the region in its fd.
        offset: u64,
    }
    /// The front of each region capability.
    CapabilityHead, 8 {
        /// The kind of capability.
        id: u16,
        /// Version of the capability's layout.
        version: u16,
        /// Offset of the next capability from the start of the region info; 0 at the end of the list.
        next: u32,
    }
    /// The front of a sparse mmap capability. The areas follow.
    SparseHead, 8 {
        /// The number of areas.
        count: u32,
        /// Zero.
        reserved: u32,
    }
    /// One area of a sparse mmap capability.
    SparseArea, 16 {
        /// First byte in the region.
        offset: u64,
        /// Bytes.
        size: u64,
    }
    /// DEVICE_GET_REGION_IO_FDS, and the front of its reply. The entries follow.
    IoFdsHead, 16 {
        /// In the command: the largest reply payload. In the reply: the bytes that a complete reply has.
        argsz: u32,
        /// Zero.
        flags: u32,
        /// The region's index.
        index: u32,
        /// The number of entries.
        count: u32,
    }
    /// The common front of the entries of DEVICE_GET_REGION_IO_FDS.
    IoFdEntry, 32 {
        /// First byte of the sub-region in the region.
        offset: u64,
        /// Bytes of an access; 0 for any.
        size: u64,
        /// The fd's index among those of the reply.
        fd_index: u32,
        /// 0 ioeventfd, 1 ioregionfd, 2 shadow ioeventfd.
        kind: u32,
        /// KVM's flags for the fd.
        flags: u32,
        /// For a shadow ioeventfd: the index of the shadow memory's fd among those of the reply.
        shadow_fd_index: u32,
    }
    /// DEVICE_GET_IRQ_INFO and its reply.
    IrqInfoPayload, 16 {
        /// The largest reply payload.
        argsz: u32,
        /// Bit 0 eventfd, 1 maskable, 2 automasked, 3 noresize.
        flags: u32,
        /// The interrupt index.
        index: u32,
        /// The number of interrupts.
        count: u32,
    }
    /// The front of DEVICE_SET_IRQS. Data follow.
    SetIrqs, 20 {
        /// Bytes of this payload, with the data.
        argsz: u32,
        /// The type of data, and the action.
        flags: u32,
        /// The interrupt index.
        index: u32,
        /// The first interrupt.
        start: u32,
        /// The number of interrupts.
        count: u32,
    }
    /// The front of REGION_READ and REGION_WRITE. Data follow.
    RegionAccess, 16 {
        /// First byte in the region.
        offset: u64,
        /// The region's index.
        region: u32,
        /// Bytes.
        count: u32,
    }
    /// The front of DMA_READ and DMA_WRITE. Data follow.
    DmaAccess, 16 {
        /// The DMA address.
        address: u64,
        /// Bytes.
        count: u64,
    }
    /// One write of REGION_WRITE_MULTI.
    MultiWrite, 24 {
        /// First byte in the region.
        offset: u64,
        /// The region's index.
        region: u32,
        /// The number of bytes, at most 8.
        count: u32,
        /// The bytes, from index 0 on.
        data: [u8; 8],
    }
    /// The front of DEVICE_FEATURE. Data follow.
    FeatureHead, 8 {
        /// In the command: the largest reply payload. In the reply: the bytes that a complete reply has.
        argsz: u32,
        /// Bits 0-15: the feature; bit 16 get, 17 set, 18 probe.
        flags: u32,
    }
    /// The data of the feature MIG_DEVICE_STATE.
    MigrationStatePayload, 8 {
        /// The migration state.
        state: u32,
        /// Not used.
        data_fd: u32,
    }
    /// The front of DMA_LOGGING_START. The ranges follow.
    LoggingStart, 16 {
        /// Bytes that one bit stands for.
        page_size: u64,
        /// The number of ranges; 0 for all memory.
        count: u32,
        /// Zero.
        reserved: u32,
    }
    /// One range of DMA_LOGGING_START.
    LoggingRange, 16 {
        /// The first DMA address.
        iova: u64,
        /// Bytes.
        length: u64,
    }
    /// The front of DMA_LOGGING_REPORT. The bitmap follows.
    LoggingReport, 24 {
        /// The first DMA address.
        iova: u64,
        /// Bytes.
        length: u64,
        /// Bytes that one bit stands for.
        page_size: u64,
    }
    /// The front of MIG_DATA_READ and MIG_DATA_WRITE. Data follow.
    MigrationData, 8 {
        /// In the command: the largest reply payload. In the reply: its size.
        argsz: u32,
        /// Bytes of data.
        size: u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_encoded_byte_for_byte() {
        let command = Header::command(0x0102, Command::REGION_READ, 16);
        assert_eq!(command.as_bytes(), [2, 1, 9, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Header::posted(1, Command::REGION_WRITE, 0).flags, 0x10);
        assert_eq!(Header::reply(&command, 4).as_bytes()[4..], [20, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            Header::error_reply(&command, 22).as_bytes()[4..],
            [16, 0, 0, 0, 0x21, 0, 0, 0, 22, 0, 0, 0]
        );
    }

    #[test]
    fn kinds_are_told_by_the_flags_and_reserved_ones_are_refused() {
        let with = |flags| Header { flags, ..Header::command(0, Command::VERSION, 0) }.kind();
        assert_eq!(with(0), Ok(Kind::Command));
        assert_eq!(with(0x10), Ok(Kind::Posted));
        assert_eq!(with(1), Ok(Kind::Reply));
        assert_eq!(with(0x21), Ok(Kind::ErrorReply));
        assert_eq!(with(0x20), Ok(Kind::ErrorReply), "as old rust servers send it");
        for flags in [2, 0xf, 0x11, 0x31, 0x40, 0x8000_0001, u32::MAX] {
            assert_eq!(with(flags), Err(Fault::Flags(flags)));
        }
    }

    #[test]
    fn sizes_below_the_header_and_above_the_limit_are_refused() {
        let with = |size| Header { size, ..Header::command(0, Command::VERSION, 0) }.judge_size(8);
        assert_eq!((with(16), with(24)), (Ok(0), Ok(8)));
        for size in [0, 1, 15, 25, 0x8000_0000, u32::MAX] {
            assert_eq!(with(size), Err(Fault::Size { got: size, least: 16, most: 24 }));
        }
    }
}
