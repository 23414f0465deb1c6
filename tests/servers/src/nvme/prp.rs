//! NVMe 1.4 §4.3: physical region pages. Turns a command's two pointers and a length into pieces of the
//! guest's memory.
//!
//! Must never follow more list pages than the length can need.

use std::io::Result;

use super::command::{Status, u64_at};
use crate::guest_memory::GuestMemory;

const PAGE: u64 = 4096;
/// Most bytes of one command: what MDTS says.
pub const MAX_TRANSFER: u64 = PAGE << MAX_TRANSFER_PAGES_LOG2;
/// The same as a power of two of pages: 1 MiB.
pub const MAX_TRANSFER_PAGES_LOG2: u8 = 8;

/// Pieces of memory: address and length.
pub type Pieces = Vec<(u64, u64)>;

/// Where `length` bytes are.
///
/// # Errors
/// The status that the command ends with.
pub fn pieces(memory: &GuestMemory, prp: [u64; 2], length: u64) -> std::result::Result<Pieces, Status> {
    if length > MAX_TRANSFER {
        return Err(Status::INVALID_FIELD);
    }
    let [first, second] = prp;
    let here = (PAGE - first % PAGE).min(length);
    let mut found = vec![(first, here)];
    let mut left = length - here;
    if left == 0 {
        return Ok(found);
    }
    if left <= PAGE {
        if !second.is_multiple_of(PAGE) {
            return Err(Status::INVALID_PRP);
        }
        found.push((second, left));
        return Ok(found);
    }
    let mut list = second;
    if !list.is_multiple_of(8) {
        return Err(Status::INVALID_PRP);
    }
    while left > 0 {
        let mut bytes = vec![0; usize::try_from(PAGE - list % PAGE).unwrap_or(0)];
        memory.read(list, &mut bytes).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        let entries = bytes.len() / 8;
        for entry in 0..entries {
            let page = u64_at(&bytes, entry * 8);
            if !page.is_multiple_of(PAGE) {
                return Err(Status::INVALID_PRP);
            }
            if entry + 1 == entries && left > PAGE {
                // The last one leads to the next list, which begins at the start of its page: the loop ends.
                list = page;
                break;
            }
            let here = left.min(PAGE);
            found.push((page, here));
            left -= here;
            if left == 0 {
                break;
            }
        }
    }
    Ok(found)
}

/// Writes data to the guest.
///
/// # Errors
/// When a piece is not mapped.
pub fn write(memory: &GuestMemory, pieces: &[(u64, u64)], data: &[u8]) -> Result<()> {
    let mut rest = data;
    for (address, length) in pieces {
        let (now, later) = rest.split_at(usize::try_from(*length).unwrap_or(0).min(rest.len()));
        memory.write(*address, now)?;
        rest = later;
    }
    Ok(())
}

/// Reads data from the guest.
///
/// # Errors
/// When a piece is not mapped.
pub fn read(memory: &GuestMemory, pieces: &[(u64, u64)], data: &mut [u8]) -> Result<()> {
    let mut rest = data;
    for (address, length) in pieces {
        let (now, later) = rest.split_at_mut(usize::try_from(*length).unwrap_or(0).min(rest.len()));
        memory.read(*address, now)?;
        rest = later;
    }
    Ok(())
}
