//! A traced vfio-user message as one line for people: direction, name, decoded payload, fds, time.
//!
//! The message may be any bytes of the peer. Must never fail on them: a payload that cannot be decoded is
//! printed as bytes.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use zerocopy::{FromBytes, IntoBytes};

use super::message::{
    Command, DeviceInfoPayload, DmaAccess, DmaMap, DmaUnmap, Feature, FeatureHead, Header, IoFdsHead,
    IrqInfoPayload, Kind, MigrationData, RegionAccess, RegionInfoPayload, SetIrqs, VersionHead,
};
use crate::peer::wire::describe_bytes as bytes;
use crate::peer::{Direction, Peer, Trace, TraceEvent};

/// The most characters of the capabilities that are printed.
const TEXT_MOST: usize = 512;

/// The fields of one message.
#[expect(missing_docs, reason = "the names say it")]
pub struct Fields<'a> {
    pub header: Header,
    pub payload: &'a [u8],
}

/// Passes a message to the trace, if there is one, with the number of its descriptors and the time of the
/// exchange.
pub(super) fn show(
    trace: Option<&Arc<dyn Trace>>,
    peer: &Peer,
    direction: Direction,
    fields: &Fields<'_>,
    (fds, took): (usize, Duration),
) {
    let Some(trace) = trace else { return };
    let Fields { header, payload } = fields;
    let (message, header) = (Command(header.command).into(), header.as_bytes());
    trace.message(&TraceEvent { peer, direction, message, header, payload, fields, fds, took });
}

impl fmt::Display for Fields<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let command = Command(self.header.command);
        write!(f, " id={}", self.header.id)?;
        match self.header.kind() {
            Ok(Kind::ErrorReply) => write!(f, " error {}", self.header.errno),
            Ok(Kind::Posted) => {
                payload(f, command, self.payload)?;
                f.write_str(" no_reply")
            }
            _ => payload(f, command, self.payload),
        }
    }
}

fn payload(f: &mut fmt::Formatter<'_>, command: Command, payload: &[u8]) -> fmt::Result {
    match command {
        Command::VERSION => decode(f, payload, |f, head: VersionHead, text| {
            let text = text.strip_suffix(&[0]).unwrap_or(text);
            let text = String::from_utf8_lossy(text.get(..TEXT_MOST).unwrap_or(text));
            // Control characters are replaced, so that the text stays on one line.
            let text: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
            write!(f, " {}.{} {text}", head.major, head.minor)
        }),
        Command::DMA_MAP => decode(f, payload, |f, map: DmaMap, _| {
            let DmaMap { flags, offset, address, size, .. } = map;
            write!(f, " address={address:#x} size={size:#x} offset={offset:#x} flags={flags:#x}")
        }),
        Command::DMA_UNMAP => decode(f, payload, |f, unmap: DmaUnmap, _| {
            write!(f, " address={:#x} size={:#x}", unmap.address, unmap.size)
        }),
        Command::DEVICE_GET_INFO => decode(f, payload, |f, info: DeviceInfoPayload, _| {
            write!(f, " flags={:#x} regions={} irqs={}", info.flags, info.regions, info.irqs)
        }),
        Command::DEVICE_GET_REGION_INFO => decode(f, payload, |f, info: RegionInfoPayload, rest| {
            let RegionInfoPayload { argsz, flags, index, size, offset, .. } = info;
            write!(f, " region={index} argsz={argsz} flags={flags:#x} size={size:#x} offset={offset:#x}")?;
            bytes(f, rest)
        }),
        Command::DEVICE_GET_REGION_IO_FDS => decode(f, payload, |f, head: IoFdsHead, rest| {
            write!(f, " region={} argsz={} count={}", head.index, head.argsz, head.count)?;
            bytes(f, rest)
        }),
        Command::DEVICE_GET_IRQ_INFO => decode(f, payload, |f, info: IrqInfoPayload, _| {
            write!(f, " index={} flags={:#x} count={}", info.index, info.flags, info.count)
        }),
        Command::DEVICE_SET_IRQS => decode(f, payload, |f, set: SetIrqs, _| {
            write!(f, " index={} flags={:#x} start={} count={}", set.index, set.flags, set.start, set.count)
        }),
        Command::REGION_READ | Command::REGION_WRITE => {
            decode(f, payload, |f, access: RegionAccess, data| {
                write!(f, " region={} offset={:#x} count={}", access.region, access.offset, access.count)?;
                bytes(f, data)
            })
        }
        Command::DMA_READ | Command::DMA_WRITE => decode(f, payload, |f, access: DmaAccess, data| {
            write!(f, " address={:#x} count={}", access.address, access.count)?;
            bytes(f, data)
        }),
        Command::REGION_WRITE_MULTI => decode(f, payload, |f, count: u64, rest| {
            write!(f, " count={count}")?;
            bytes(f, rest)
        }),
        Command::DEVICE_FEATURE => decode(f, payload, |f, head: FeatureHead, data| {
            let index = u16::try_from(head.flags & 0xffff).unwrap_or_default();
            match Feature(index).name() {
                Some(name) => write!(f, " {name}")?,
                None => write!(f, " feature={index}")?,
            }
            for (bit, name) in [(16, "get"), (17, "set"), (18, "probe")] {
                if head.flags & 1 << bit != 0 {
                    write!(f, " {name}")?;
                }
            }
            bytes(f, data)
        }),
        // The state of a device may hold secrets of the guest, so it is not printed.
        Command::MIG_DATA_READ | Command::MIG_DATA_WRITE => {
            decode(f, payload, |f, data: MigrationData, _| write!(f, " size={}", data.size))
        }
        _ => bytes(f, payload),
    }
}

/// Prints the front of `payload` as a `T`, then what follows it. Prints all of it as bytes when it is too
/// short.
fn decode<T: FromBytes>(
    f: &mut fmt::Formatter<'_>,
    payload: &[u8],
    print: impl FnOnce(&mut fmt::Formatter<'_>, T, &[u8]) -> fmt::Result,
) -> fmt::Result {
    match T::read_from_prefix(payload) {
        Ok((value, rest)) => print(f, value, rest),
        Err(_) => bytes(f, payload),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::Protocol;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Lines(Mutex<String>);

    impl Trace for Lines {
        fn message(&self, event: &TraceEvent<'_>) {
            *self.0.lock().unwrap() = event.to_string();
        }
    }

    fn line(direction: Direction, header: Header, payload: &[u8], fds: usize) -> String {
        let lines = Arc::new(Lines::default());
        let trace: Arc<dyn Trace> = Arc::<Lines>::clone(&lines);
        let peer = Peer::new(Protocol::VfioUser, "/run/s");
        show(Some(&trace), &peer, direction, &Fields { header, payload }, (fds, Duration::from_micros(17)));
        lines.0.lock().unwrap().clone()
    }

    #[test]
    fn messages_read_as_names_and_fields() {
        let access = RegionAccess { offset: 0x10, region: 0, count: 4 };
        let read = Header::command(7, Command::REGION_READ, 16);
        assert_eq!(
            line(Direction::Request, read, access.as_bytes(), 0),
            "/run/s > REGION_READ id=7 region=0 offset=0x10 count=4"
        );
        let data = [access.as_bytes(), &[1, 2, 3, 0xff]].concat();
        assert_eq!(
            line(Direction::Answer, Header::reply(&read, 20), &data, 0),
            "/run/s < REGION_READ id=7 region=0 offset=0x10 count=4 [010203ff] (17 us)"
        );
        assert_eq!(
            line(Direction::Answer, Header::error_reply(&read, 22), &[], 0),
            "/run/s < REGION_READ id=7 error 22 (17 us)"
        );
        let version = [&[0, 0, 1, 0][..], b"{\"a\":1}\0"].concat();
        assert_eq!(
            line(Direction::Request, Header::command(0, Command::VERSION, 12), &version, 0),
            "/run/s > VERSION id=0 0.1 {\"a\":1}"
        );
        let posted = Header::posted(1, Command::REGION_WRITE, 20);
        assert!(line(Direction::Request, posted, &data, 0).ends_with("[010203ff] no_reply"));
    }

    #[test]
    fn nonsense_of_any_length_is_printed_and_nothing_fails() {
        let all = [Direction::Request, Direction::Answer, Direction::PeerRequest, Direction::OurAnswer];
        for code in 0..30 {
            for len in 0..100 {
                for direction in all {
                    for flags in [0, 1, 0x10, 0x21, u32::MAX] {
                        let header = Header { flags, ..Header::command(0, Command(code), 0) };
                        assert!(!line(direction, header, &vec![0xa5; len], 2).is_empty());
                    }
                }
            }
        }
    }
}
