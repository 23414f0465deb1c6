//! SET_MEM_TABLE and the memory slots (GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG): guest memory for the
//! backend.
//!
//! The first 8 regions are sent in a table, which every backend accepts. Further regions need
//! CONFIGURE_MEM_SLOTS.

use std::os::fd::BorrowedFd;

use zerocopy::IntoBytes;

use super::channel::Channel;
use super::message::{MemRegion, MemTableHead, SingleMemRegion, length};
use super::request::Request;
use crate::memory::{MemoryMap, SharedRegion, UserAddr};
use crate::peer::Error;
use crate::peer::deadline::Deadline;

/// The most regions in one table that every backend accepts.
const TABLE_MAX: usize = 8;

/// The most slots that are used, even when a backend has more.
const SLOTS_MAX: u64 = 509;

fn entry(region: &SharedRegion) -> MemRegion {
    MemRegion {
        guest: region.guest().raw(),
        size: region.size(),
        user: region.user().map_or(0, UserAddr::raw),
        offset: region.offset(),
    }
}

/// Asks how many regions the backend can hold.
pub(super) fn slots(channel: &mut Channel) -> Result<usize, Error> {
    let slots = channel.ask_u64(Request::GET_MAX_MEM_SLOTS, &channel.deadline())?;
    Ok(usize::try_from(slots.min(SLOTS_MAX)).unwrap_or(TABLE_MAX))
}

/// Checks that the backend can be given all regions of `memory`.
pub(super) fn fits(channel: &Channel, memory: &MemoryMap, slots: usize) -> Result<(), Error> {
    if memory.regions().len() > TABLE_MAX.max(slots) {
        return Err(channel.invalid(Request::SET_MEM_TABLE, "there are more memory regions than it can hold"));
    }
    Ok(())
}

/// The payload and fds of SET_MEM_TABLE, for the regions that fit into a table.
pub(super) fn table(memory: &MemoryMap) -> (Vec<u8>, Vec<BorrowedFd<'_>>) {
    let regions = memory.regions().iter().take(TABLE_MAX);
    let count = length(regions.len());
    let mut payload = MemTableHead { count, padding: 0 }.as_bytes().to_vec();
    let mut fds = Vec::with_capacity(TABLE_MAX);
    for region in regions {
        payload.extend_from_slice(entry(region).as_bytes());
        fds.push(region.fd());
    }
    (payload, fds)
}

/// Gives the backend all of guest memory, in place of the memory that it had.
pub(super) fn send(channel: &mut Channel, memory: &MemoryMap, deadline: &Deadline) -> Result<(), Error> {
    let (payload, fds) = table(memory);
    channel.exchange(Request::SET_MEM_TABLE, &payload, &fds, deadline)?;
    for region in memory.regions().iter().skip(TABLE_MAX) {
        add(channel, region, deadline)?;
    }
    Ok(())
}

pub(super) fn single(region: &SharedRegion) -> SingleMemRegion {
    SingleMemRegion { padding: 0, region: entry(region) }
}

pub(super) fn add(channel: &mut Channel, region: &SharedRegion, deadline: &Deadline) -> Result<(), Error> {
    let payload = single(region);
    channel.exchange(Request::ADD_MEM_REG, payload.as_bytes(), &[region.fd()], deadline).map(|_| ())
}
