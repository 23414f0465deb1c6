//! POSTCOPY_ADVISE, POSTCOPY_LISTEN and POSTCOPY_END: a migration whose guest runs before all memory has
//! arrived.
//!
//! Backends differ in their order. libvhost-user expects SET_MEM_TABLE after POSTCOPY_LISTEN and answers it
//! with its own addresses, which we acknowledge. Rust backends register their current memory at
//! POSTCOPY_LISTEN. [`Postcopy`] is the state between POSTCOPY_ADVISE and POSTCOPY_END.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::memory::{GuestAddr, MemoryMap};
use crate::peer::{Cause, Error};
use crate::vhost_user::mem_table;
use crate::vhost_user::message::{Fault, MemRegion, MemTableHead, length, parse, parse_front};
use crate::vhost_user::request::{Answer, Request};
use crate::vhost_user::session::Session;

/// The place of a region of guest memory in the backend's address space. The backend's userfaultfd reports
/// such addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionBase {
    /// The region's guest address.
    pub guest: GuestAddr,
    /// Bytes.
    pub size: u64,
    /// The first byte in the backend's own address space.
    pub base: u64,
}

/// Reads the memory table that the backend returns. It must equal `sent` in all but the user addresses.
pub fn parse_table(payload: &[u8], sent: &[u8]) -> Result<Vec<RegionBase>, Fault> {
    let (head, rest): (MemTableHead, _) = parse_front(payload)?;
    let (asked, regions): (MemTableHead, _) = parse_front(sent)?;
    let due = length(regions.len());
    if head.count != asked.count || rest.len() < regions.len() {
        return Err(Fault::Size { got: length(rest.len()), least: due, most: due });
    }
    let each = size_of::<MemRegion>();
    let mut bases = Vec::new();
    for (theirs, ours) in rest.chunks_exact(each).zip(regions.chunks_exact(each)) {
        let (theirs, ours): (MemRegion, MemRegion) = (parse(theirs)?, parse(ours)?);
        if (theirs.guest, theirs.size) != (ours.guest, ours.size) {
            return Err(Fault::Value { field: "memory region at", value: theirs.guest });
        }
        bases.push(RegionBase { guest: GuestAddr(ours.guest), size: ours.size, base: theirs.user });
    }
    Ok(bases)
}

/// A backend after POSTCOPY_ADVISE, with its userfaultfd.
#[derive(Debug)]
pub struct Postcopy {
    uffd: OwnedFd,
}

impl AsFd for Postcopy {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

impl Session {
    /// Announces a migration that may become a postcopy one. Needs PAGEFAULT, and no memory slots.
    pub fn postcopy_advise(&mut self) -> Result<Postcopy, Error> {
        const REQUEST: Request = Request::POSTCOPY_ADVISE;
        let answered = self.channel.ask(REQUEST, &[], &[])?;
        let uffd = answered.fds.into_iter().next();
        uffd.map(|uffd| Postcopy { uffd }).ok_or_else(|| self.channel.error(REQUEST, Cause::Refused(0)))
    }

    /// Starts postcopy. From now on the backend reports missing pages of registered memory.
    pub fn postcopy_listen(&mut self, _advised: &Postcopy) -> Result<(), Error> {
        self.postcopy_step(Request::POSTCOPY_LISTEN)
    }

    /// Gives the backend guest memory during postcopy. Returns the places at which the backend mapped the
    /// regions. For backends of the libvhost-user family, after [`Session::postcopy_listen`].
    pub fn postcopy_memory(
        &mut self,
        _advised: &Postcopy,
        memory: &MemoryMap,
    ) -> Result<Vec<RegionBase>, Error> {
        const REQUEST: Request = Request::SET_MEM_TABLE;
        mem_table::fits(&self.channel, memory, 0)?;
        let deadline = self.channel.deadline();
        let (payload, fds) = mem_table::table(memory);
        let least = length(payload.len());
        // Some backends return their whole C struct, with room for 8 regions whatever their number.
        let most = least.max(length(size_of::<MemTableHead>() + 8 * size_of::<MemRegion>()));
        let sent = (payload.as_slice(), fds.as_slice());
        let answered = self.channel.exchange_sized(REQUEST, sent, (least, most), &deadline)?;
        let bases = parse_table(&answered.payload, &payload)
            .map_err(|fault| self.channel.malformed(REQUEST, fault))?;
        // The backend may access the memory only after this acknowledgement.
        self.channel.tell(REQUEST, &0u64.to_ne_bytes(), &deadline)?;
        Ok(bases)
    }

    /// Ends postcopy: all memory has arrived.
    pub fn postcopy_end(&mut self, advised: Postcopy) -> Result<(), Error> {
        drop(advised);
        self.postcopy_step(Request::POSTCOPY_END)
    }

    fn postcopy_step(&mut self, request: Request) -> Result<(), Error> {
        debug_assert!(request.row().is_some_and(|row| row.answer == Answer::AlwaysAsked));
        let deadline = self.channel.deadline();
        match self.channel.ask_u64(request, &deadline)? {
            0 => Ok(()),
            code => Err(self.channel.error(request, Cause::Refused(code))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn table(count: u32, regions: &[(u64, u64, u64)]) -> Vec<u8> {
        let mut bytes = MemTableHead { count, padding: 0 }.as_bytes().to_vec();
        for &(guest, size, user) in regions {
            bytes.extend(MemRegion { guest, size, user, offset: 0 }.as_bytes());
        }
        bytes
    }

    #[test]
    fn the_table_comes_back_with_other_addresses_and_nothing_else_changed() {
        let sent = table(2, &[(0, 0x1000, 1), (0x2000, 0x1000, 2)]);
        let bases = parse_table(&table(2, &[(0, 0x1000, 7), (0x2000, 0x1000, 8)]), &sent).unwrap();
        assert_eq!(bases[1], RegionBase { guest: GuestAddr(0x2000), size: 0x1000, base: 8 });
        assert!(parse_table(&table(1, &[(0, 0x1000, 7)]), &sent).is_err());
        assert!(parse_table(&table(2, &[(0, 0x1000, 7)]), &sent).is_err());
        assert!(parse_table(&table(2, &[(0, 0x1000, 7), (0x3000, 0x1000, 8)]), &sent).is_err());
        assert!(parse_table(&[0; 4], &sent).is_err());
    }
}
