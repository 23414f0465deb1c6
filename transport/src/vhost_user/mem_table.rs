//! SET_MEM_TABLE and the memory slots (GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG): guest memory for the back-end.
//!
//! The first 8 regions go by table, as every back-end takes it; more only where slots were negotiated.

use std::os::fd::BorrowedFd;

use zerocopy::IntoBytes;

use super::channel::Channel;
use super::error::Error;
use super::features::ProtocolFeatures;
use super::live::LiveSession;
use super::message::{MemRegion, MemTableHead, SingleMemRegion, length};
use super::request::Request;
use crate::deadline::Deadline;
use crate::memory_map::{MemoryMap, SharedRegion, UserAddr};

/// Regions that every back-end takes in one table.
const TABLE_MAX: usize = 8;

/// Slots that are used at most, whatever a back-end claims to have.
const SLOTS_MAX: u64 = 509;

fn entry(region: &SharedRegion) -> MemRegion {
    MemRegion {
        guest: region.guest().raw(),
        size: region.size(),
        user: region.user().map_or(0, UserAddr::raw),
        offset: region.offset(),
    }
}

/// Asks how many regions the back-end can hold.
pub(super) fn slots(channel: &mut Channel, deadline: &Deadline) -> Result<usize, Error> {
    let slots = channel.ask_u64(Request::GET_MAX_MEM_SLOTS, deadline)?;
    Ok(usize::try_from(slots.min(SLOTS_MAX)).unwrap_or(TABLE_MAX))
}

/// Judges whether `memory` can be told to the back-end at all.
pub(super) fn fits(channel: &Channel, memory: &MemoryMap, slots: usize) -> Result<(), Error> {
    if memory.regions().len() > TABLE_MAX.max(slots) {
        return Err(channel.invalid(Request::SET_MEM_TABLE, "there are more memory regions than it can hold"));
    }
    Ok(())
}

/// The payload and fds of SET_MEM_TABLE for the regions that a table holds.
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

/// Tells the back-end all of guest memory; what it was told before is replaced.
pub(super) fn send(channel: &mut Channel, memory: &MemoryMap, deadline: &Deadline) -> Result<(), Error> {
    let (payload, fds) = table(memory);
    channel.exchange(Request::SET_MEM_TABLE, &payload, &fds, deadline)?;
    for region in memory.regions().iter().skip(TABLE_MAX) {
        add(channel, region, deadline)?;
    }
    Ok(())
}

fn single(region: &SharedRegion) -> SingleMemRegion {
    SingleMemRegion { padding: 0, region: entry(region) }
}

fn add(channel: &mut Channel, region: &SharedRegion, deadline: &Deadline) -> Result<(), Error> {
    let payload = single(region);
    channel.exchange(Request::ADD_MEM_REG, payload.as_bytes(), &[region.fd()], deadline).map(|_| ())
}

impl LiveSession {
    /// True when memory can be added and removed while the device runs.
    pub fn has_mem_slots(&self) -> bool {
        self.session.protocol().contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    /// Adds a region of guest memory. Needs CONFIGURE_MEM_SLOTS. Whole multiples of 2 MiB are understood by all.
    pub fn add_region(&mut self, region: &SharedRegion) -> Result<(), Error> {
        let deadline = self.session.channel.deadline();
        add(&mut self.session.channel, region, &deadline)
    }

    /// Takes a region of guest memory away. Needs CONFIGURE_MEM_SLOTS.
    pub fn remove_region(&mut self, region: &SharedRegion) -> Result<(), Error> {
        let deadline = self.session.channel.deadline();
        let payload = single(region);
        let channel = &mut self.session.channel;
        // No fd: back-ends identify the region by its addresses, and some refuse a stray one.
        channel.exchange(Request::REM_MEM_REG, payload.as_bytes(), &[], &deadline).map(|_| ())
    }
}
