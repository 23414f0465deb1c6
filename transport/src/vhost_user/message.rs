//! vhost-user "Message Specification": the header and the payloads as bytes. Holds layouts only; makes no
//! decisions.
//!
//! All numbers are native endian. No struct has padding, and the size of each is asserted below.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(crate) use crate::peer::wire::length;
use crate::peer::wire::payloads;
pub use crate::peer::wire::{Fault, parse, parse_front};

/// The version in bits 0-1 of the flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0x3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Bytes of a message header.
pub const HEADER_SIZE: usize = size_of::<Header>();

/// The header of each message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// The request code of the front end or of the backend.
    pub request: u32,
    /// Version, reply flag, need_reply flag.
    pub flags: u32,
    /// Bytes of payload behind the header.
    pub size: u32,
}

impl Header {
    /// The header of a request.
    pub fn request(code: u32, size: u32) -> Self {
        Self { request: code, flags: VERSION, size }
    }

    /// The header of a request with need_reply.
    pub fn asking(code: u32, size: u32) -> Self {
        Self { request: code, flags: VERSION | NEED_REPLY, size }
    }

    /// The header of a reply.
    pub fn reply(code: u32, size: u32) -> Self {
        Self { request: code, flags: VERSION | REPLY, size }
    }

    /// True when the sender asks for a reply (need_reply).
    pub fn wants_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// Checks the header of an answer to `asked`. `most` is the largest payload that may follow.
    ///
    /// need_reply may be set, as libvhost-user leaves it set in its answers.
    pub fn judge_reply(&self, asked: u32, most: u32) -> Result<(), Fault> {
        if self.flags & !NEED_REPLY != VERSION | REPLY {
            return Err(Fault::Flags(self.flags));
        }
        if self.request != asked {
            return Err(Fault::Request(self.request));
        }
        if self.size > most {
            return Err(Fault::Size { got: self.size, least: 0, most });
        }
        Ok(())
    }

    /// Checks the header of a backend request. `most` is the largest payload that may follow.
    pub fn judge_request(&self, most: u32) -> Result<(), Fault> {
        if self.flags & !NEED_REPLY != VERSION {
            return Err(Fault::Flags(self.flags));
        }
        if self.size > most {
            return Err(Fault::Size { got: self.size, least: 0, most });
        }
        Ok(())
    }

    /// True when version and direction are those of a reply.
    pub fn is_reply(&self) -> bool {
        self.flags & REPLY != 0 && self.flags & VERSION_MASK == VERSION
    }
}

const _: () = assert!(HEADER_SIZE == 12);

payloads! {
    /// "A vring state description".
    VringState, 8 {
        /// The ring.
        index: u32,
        /// A size, a base, or 0/1, depending on the request.
        num: u32,
    }
    /// "A vring address description". The used ring's address comes before the available ring's.
    VringAddr, 40 {
        /// The ring.
        index: u32,
        /// Bit 0: log writes to the used ring.
        flags: u32,
        /// User address of the descriptor table.
        descriptor: u64,
        /// User address of the used ring.
        used: u64,
        /// User address of the available ring.
        available: u64,
        /// Guest address at which the used ring is logged.
        log: u64,
    }
    /// The front of SET_MEM_TABLE. The regions follow.
    MemTableHead, 8 {
        /// The number of regions.
        count: u32,
        /// Zero.
        padding: u32,
    }
    /// One region of "Memory regions description".
    MemRegion, 32 {
        /// Guest-physical address.
        guest: u64,
        /// Bytes.
        size: u64,
        /// User address.
        user: u64,
        /// First byte of the region in its fd.
        offset: u64,
    }
    /// "Single memory region description".
    SingleMemRegion, 40 {
        /// Zero.
        padding: u64,
        /// The region.
        region: MemRegion,
    }
    /// "Log description".
    LogArea, 16 {
        /// Bytes of the log.
        size: u64,
        /// First byte of the log in its fd.
        offset: u64,
    }
    /// "An IOTLB message", padded to the size of the kernel's struct.
    Iotlb, 32 {
        /// I/O virtual address.
        iova: u64,
        /// Bytes.
        size: u64,
        /// User address.
        user: u64,
        /// 0 none, 1 read, 2 write, 3 both.
        permission: u8,
        /// 1 miss, 2 update, 3 invalidate, 4 access fail.
        kind: u8,
        /// Zero.
        padding: [u8; 6],
    }
    /// The front of "Virtio device config space". The bytes follow.
    ConfigHead, 12 {
        /// First byte of the configuration space.
        offset: u32,
        /// Bytes.
        size: u32,
        /// 0: write by the driver; 1: live migration.
        flags: u32,
    }
    /// "Vring area description" (host notifier).
    VringArea, 24 {
        /// Bits 0-7: the ring; bit 8: no fd comes with the message.
        index: u64,
        /// Bytes.
        size: u64,
        /// First byte of the area in its fd.
        offset: u64,
    }
    /// "Inflight description", with the padding that C gives it.
    Inflight, 24 {
        /// Bytes of the inflight area.
        mmap_size: u64,
        /// First byte of the inflight area in its fd.
        mmap_offset: u64,
        /// The number of rings.
        num_queues: u16,
        /// The number of descriptors of each ring.
        queue_size: u16,
        /// Zero.
        padding: u32,
    }
    /// "Device state transfer parameters".
    StateTransfer, 8 {
        /// 0 save, 1 load.
        direction: u32,
        /// 0: stopped.
        phase: u32,
    }
    /// "MMAP request" (SHMEM_MAP, SHMEM_UNMAP).
    ShmemArea, 40 {
        /// The shared memory region's id.
        shmid: u8,
        /// Zero.
        padding: [u8; 7],
        /// First byte of the area in its fd.
        fd_offset: u64,
        /// First byte of the area in the shared memory region.
        shm_offset: u64,
        /// Bytes.
        len: u64,
        /// Bit 0: writable.
        flags: u64,
    }
    /// The front of GET_SHMEM_CONFIG. The sizes follow.
    ShmemHead, 8 {
        /// The number of regions that have a size.
        count: u32,
        /// Zero.
        padding: u32,
    }
    /// "VhostUserShared": the name of an object that devices share.
    Uuid, 16 {
        /// The 16 bytes, in order.
        bytes: [u8; 16],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_encoded_byte_for_byte() {
        assert_eq!(Header::request(1, 0).as_bytes(), [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Header::asking(8, 8).as_bytes(), [8, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(Header::reply(2, 0x102).as_bytes(), [2, 0, 0, 0, 5, 0, 0, 0, 2, 1, 0, 0]);
    }

    #[test]
    fn payloads_are_encoded_byte_for_byte() {
        let addr = VringAddr { index: 1, flags: 1, descriptor: 2, used: 3, available: 4, log: 5 };
        let mut wire = vec![1, 0, 0, 0, 1, 0, 0, 0];
        for n in [2u8, 3, 4, 5] {
            wire.extend([n, 0, 0, 0, 0, 0, 0, 0]);
        }
        assert_eq!(addr.as_bytes(), wire);
        let inflight = Inflight { mmap_size: 1, mmap_offset: 2, num_queues: 3, queue_size: 4, padding: 0 };
        let wire = [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 4, 0, 0, 0, 0, 0];
        assert_eq!(inflight.as_bytes(), wire);
        let iotlb = Iotlb { iova: 1, size: 2, user: 3, permission: 3, kind: 2, padding: [0; 6] };
        assert_eq!(iotlb.as_bytes()[24..], [3, 2, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_reply_is_judged_by_flags_then_request_then_size() {
        let good = Header { request: 1, flags: 5, size: 8 };
        assert_eq!(good.judge_reply(1, 8), Ok(()));
        assert_eq!(Header { flags: 0xd, ..good }.judge_reply(1, 8), Ok(()));
        for flags in [0, 1, 4, 6, 7, 0x15, 0x8000_0005, u32::MAX] {
            assert_eq!(Header { flags, ..good }.judge_reply(1, 8), Err(Fault::Flags(flags)));
        }
        assert_eq!(good.judge_reply(2, 8), Err(Fault::Request(1)));
        for size in [9, 0x8000_0000, u32::MAX] {
            let fault = Fault::Size { got: size, least: 0, most: 8 };
            assert_eq!(Header { size, ..good }.judge_reply(1, 8), Err(fault));
        }
    }

    #[test]
    fn payloads_of_any_other_size_are_refused() {
        for len in (0..64).filter(|len| *len != 8) {
            assert!(parse::<VringState>(&vec![0; len]).is_err(), "{len} bytes");
        }
        assert_eq!(parse::<VringState>(&[1, 0, 0, 0, 2, 0, 0, 0]), Ok(VringState { index: 1, num: 2 }));
        assert!(parse_front::<ConfigHead>(&[0; 11]).is_err());
        assert_eq!(parse_front::<ConfigHead>(&[0; 13]).unwrap().1, [0]);
    }

    #[test]
    fn faults_read_as_the_end_of_a_sentence() {
        assert_eq!(Fault::Size { got: 4, least: 8, most: 8 }.to_string(), "with 4 bytes where 8 are due");
        assert_eq!(
            Fault::Fds { got: 2, least: 0, most: 0 }.to_string(),
            "with 2 file descriptors where 0 are due"
        );
        assert_eq!(Fault::Value { field: "ring", value: 3 }.to_string(), "with ring 0x3");
    }
}
