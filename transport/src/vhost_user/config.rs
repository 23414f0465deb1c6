//! GET_CONFIG and SET_CONFIG: the device's configuration space.
//!
//! The space is read whole, with one request at offset 0, as several backends ignore the offset. Backends
//! refuse a size in two ways: with an empty payload, or with a head alone. Both count as a refusal, and a
//! smaller size is tried next.

use zerocopy::IntoBytes;

use super::channel::Channel;
use super::message::{ConfigHead, Fault, length, parse_front};
use super::request::{CONFIG_MOST, Request};
use crate::peer::deadline::Deadline;
use crate::peer::{Cause, Error};

/// The step by which a refused size is reduced, in bytes: the granularity of virtio's configuration fields.
const STEP: usize = 4;

/// The reason for a SET_CONFIG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum WriteKind {
    /// The driver wrote a field.
    Driver = 0,
    /// The configuration is restored at the end of a migration.
    Migration = 1,
}

/// The answer to GET_CONFIG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigReply<'a> {
    /// These bytes of the configuration space, from offset 0 on.
    Bytes(&'a [u8]),
    /// The backend does not answer a request of that size.
    Refused,
}

/// Reads the answer to a GET_CONFIG of `asked` bytes at offset 0.
pub fn parse_reply(payload: &[u8], asked: u32) -> Result<ConfigReply<'_>, Fault> {
    if payload.is_empty() {
        return Ok(ConfigReply::Refused);
    }
    let (head, bytes): (ConfigHead, _) = parse_front(payload)?;
    if bytes.is_empty() || head.size == 0 {
        return Ok(ConfigReply::Refused);
    }
    if head.offset != 0 {
        return Err(Fault::Value { field: "configuration offset", value: head.offset.into() });
    }
    let got = length(bytes.len());
    if head.size > got || got > asked {
        return Err(Fault::Size { got, least: head.size.min(asked), most: asked });
    }
    // Bytes past the size in the head are padding or stale memory.
    let size = usize::try_from(head.size).unwrap_or(usize::MAX);
    Ok(ConfigReply::Bytes(bytes.get(..size).unwrap_or(bytes)))
}

/// Reads the configuration space: `size` bytes, or as many below that as the backend returns.
pub(crate) fn read(channel: &mut Channel, size: usize, deadline: &Deadline) -> Result<Vec<u8>, Error> {
    const REQUEST: Request = Request::GET_CONFIG;
    if size == 0 || length(size) > CONFIG_MOST {
        return Err(channel.invalid(REQUEST, "the configuration space has 1 to 256 bytes"));
    }
    let mut size = size;
    loop {
        let asked = length(size);
        let mut payload = ConfigHead { offset: 0, size: asked, flags: 0 }.as_bytes().to_vec();
        payload.resize(payload.len().saturating_add(size), 0);
        let answered = channel.exchange(REQUEST, &payload, &[], deadline)?;
        match parse_reply(&answered.payload, asked) {
            Ok(ConfigReply::Bytes(bytes)) => return Ok(bytes.to_vec()),
            Ok(ConfigReply::Refused) => {}
            Err(fault) => return Err(channel.malformed(REQUEST, fault)),
        }
        size = size.saturating_sub(1) / STEP * STEP;
        if size == 0 {
            return Err(channel.error(REQUEST, Cause::Refused(0)));
        }
    }
}

/// Writes `bytes` at `offset`.
pub(crate) fn write(
    channel: &mut Channel,
    offset: u32,
    bytes: &[u8],
    kind: WriteKind,
    deadline: &Deadline,
) -> Result<(), Error> {
    const REQUEST: Request = Request::SET_CONFIG;
    let size = length(bytes.len());
    if size == 0 || offset.checked_add(size).is_none_or(|end| end > CONFIG_MOST) {
        return Err(channel.invalid(REQUEST, "the range lies outside the configuration space"));
    }
    let flags = match kind {
        WriteKind::Driver => 0,
        WriteKind::Migration => 1,
    };
    let mut payload = ConfigHead { offset, size, flags }.as_bytes().to_vec();
    payload.extend_from_slice(bytes);
    channel.exchange(REQUEST, &payload, &[], deadline).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(offset: u32, size: u32, bytes: &[u8]) -> Vec<u8> {
        [ConfigHead { offset, size, flags: 0 }.as_bytes(), bytes].concat()
    }

    #[test]
    fn refusals_come_in_three_shapes() {
        assert_eq!(parse_reply(&[], 8), Ok(ConfigReply::Refused));
        assert_eq!(parse_reply(&reply(0, 8, &[]), 8), Ok(ConfigReply::Refused));
        assert_eq!(parse_reply(&reply(0, 0, &[1; 8]), 8), Ok(ConfigReply::Refused));
    }

    #[test]
    fn whole_and_shorter_answers_are_taken_and_padding_is_cut() {
        assert_eq!(parse_reply(&reply(0, 4, &[1, 2, 3, 4]), 4), Ok(ConfigReply::Bytes(&[1, 2, 3, 4])));
        assert_eq!(parse_reply(&reply(0, 2, &[1, 2]), 4), Ok(ConfigReply::Bytes(&[1, 2])));
        assert_eq!(parse_reply(&reply(0, 2, &[1, 2, 3, 4]), 4), Ok(ConfigReply::Bytes(&[1, 2])));
    }

    #[test]
    fn lies_about_offset_and_size_are_faults() {
        assert!(parse_reply(&reply(4, 4, &[0; 4]), 4).is_err());
        assert!(parse_reply(&reply(0, 8, &[0; 4]), 8).is_err());
        assert!(parse_reply(&reply(0, 8, &[0; 8]), 4).is_err());
        assert!(parse_reply(&reply(0, u32::MAX, &[0; 4]), 4).is_err());
        for len in 1..12 {
            assert!(parse_reply(&vec![0; len], 4).is_err(), "{len}");
        }
    }
}
