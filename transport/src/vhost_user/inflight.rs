//! vhost-user "Inflight I/O tracking": the inflight area, in which a backend notes its requests in flight.
//! After the backend is lost, another backend can finish those requests.
//!
//! We hold the area's fd. Must never read or write the area, as its format is the backend's.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::channel::{Answered, Channel};
use super::message::{Fault, Inflight, length, parse};
use super::request::Request;
use super::vring::Ring;
use crate::peer::deadline::Deadline;
use crate::peer::fds::{Protection, file_size};
use crate::peer::{Cause, Error};

/// Bytes of the description without its padding: some backends do not send the padding.
const UNPADDED: usize = 20;

/// Bytes for one descriptor in the layout of the specification. An area that is smaller than all descriptors
/// together is a fault.
const PER_DESCRIPTOR: u64 = 16;

/// An inflight area: its file, and the rings that it covers.
#[derive(Debug)]
pub struct InflightArea {
    fd: OwnedFd,
    description: Inflight,
}

impl InflightArea {
    /// Bytes.
    pub fn size(&self) -> u64 {
        self.description.mmap_size
    }

    /// True when the file still holds the whole area. The backend that made the file can shorten it.
    pub fn is_whole(&self) -> bool {
        file_size(&self.fd) >= self.end()
    }

    fn end(&self) -> u64 {
        self.description.mmap_offset.saturating_add(self.description.mmap_size)
    }

    /// The number of rings and the size of the largest ring, as asked for.
    pub fn covers(&self) -> (u16, u16) {
        (self.description.num_queues, self.description.queue_size)
    }
}

impl AsFd for InflightArea {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Reads the answer to GET_INFLIGHT_FD for `queues` rings of `queue_size`; `None` if the backend has no area.
pub fn parse_inflight(payload: &[u8], queues: u16, queue_size: u16) -> Result<Option<Inflight>, Fault> {
    let mut padded = payload.to_vec();
    if padded.len() == UNPADDED {
        padded.resize(size_of::<Inflight>(), 0);
    }
    let mut area: Inflight = parse(&padded).map_err(|fault| match fault {
        Fault::Size { most, .. } => Fault::Size { got: length(payload.len()), least: length(UNPADDED), most },
        other => other,
    })?;
    if area.mmap_size == 0 {
        return Ok(None);
    }
    let least = u64::from(queues) * u64::from(queue_size) * PER_DESCRIPTOR;
    if area.mmap_size < least {
        return Err(Fault::Value { field: "inflight area of size", value: area.mmap_size });
    }
    if area.mmap_offset.checked_add(area.mmap_size).is_none() {
        return Err(Fault::Value { field: "inflight area at offset", value: area.mmap_offset });
    }
    // Some backends set these fields to other values. The values that we asked for hold.
    area.num_queues = queues;
    area.queue_size = queue_size;
    Ok(Some(area))
}

fn get(
    channel: &mut Channel,
    queues: u16,
    queue_size: u16,
    deadline: &Deadline,
) -> Result<InflightArea, Error> {
    const REQUEST: Request = Request::GET_INFLIGHT_FD;
    let wanted = Inflight { mmap_size: 0, mmap_offset: 0, num_queues: queues, queue_size, padding: 0 };
    let Answered { payload, fds } = channel.exchange(REQUEST, wanted.as_bytes(), &[], deadline)?;
    let description = match parse_inflight(&payload, queues, queue_size) {
        Ok(Some(description)) => description,
        Ok(None) => return Err(channel.error(REQUEST, Cause::Refused(0))),
        Err(fault) => return Err(channel.malformed(REQUEST, fault)),
    };
    let Some(fd) = fds.into_iter().next() else {
        return Err(channel.malformed(REQUEST, Fault::Fds { got: 0, least: 1, most: 1 }));
    };
    let area = InflightArea { fd, description };
    if !area.is_whole() {
        // With a file that is too short, the next backend would be killed when it reads the area.
        let fault = Fault::Value { field: "inflight area that ends at", value: area.end() };
        return Err(channel.malformed(REQUEST, fault));
    }
    if !Protection::ReadWrite.is_open_for(&area) {
        // The next backend could not map the area.
        let fault = Fault::Value { field: "read-only inflight area of size", value: area.size() };
        return Err(channel.malformed(REQUEST, fault));
    }
    Ok(area)
}

/// Gives the backend the inflight area that was `kept`, or asks it for a new one, before the rings start.
pub(super) fn hand_over(
    channel: &mut Channel,
    kept: Option<Arc<InflightArea>>,
    rings: &[Ring<'_>],
    deadline: &Deadline,
) -> Result<Arc<InflightArea>, Error> {
    let queues = rings.iter().map(|ring| ring.index.saturating_add(1)).max().unwrap_or(0);
    let queue_size = rings.iter().map(|ring| ring.size).max().unwrap_or(0);
    let usable = |area: &Arc<InflightArea>| area.covers() == (queues, queue_size) && area.is_whole();
    let area = match kept.filter(usable) {
        Some(area) => area,
        None => Arc::new(get(channel, queues, queue_size, deadline)?),
    };
    let payload = area.description;
    channel.exchange(Request::SET_INFLIGHT_FD, payload.as_bytes(), &[area.as_fd()], deadline)?;
    Ok(area)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description(mmap_size: u64, mmap_offset: u64) -> Vec<u8> {
        let area = Inflight { mmap_size, mmap_offset, num_queues: 9, queue_size: 9, padding: 0 };
        area.as_bytes().to_vec()
    }

    #[test]
    fn descriptions_with_and_without_padding_are_the_same() {
        let padded = parse_inflight(&description(8192, 0), 2, 128).unwrap().unwrap();
        assert_eq!((padded.num_queues, padded.queue_size, padded.mmap_size), (2, 128, 8192));
        assert_eq!(parse_inflight(&description(8192, 0)[..20], 2, 128), Ok(Some(padded)));
        assert!(parse_inflight(&description(8192, 0)[..22], 2, 128).is_err());
    }

    #[test]
    fn no_area_small_areas_and_wrapping_areas_are_told_apart() {
        assert_eq!(parse_inflight(&description(0, 0), 2, 128), Ok(None));
        assert!(parse_inflight(&description(4095, 0), 2, 128).is_err());
        assert!(parse_inflight(&description(4096, u64::MAX), 2, 128).is_err());
    }
}
