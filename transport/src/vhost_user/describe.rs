//! A traced vhost-user message as one line for people: direction, name, decoded payload, fds, time.
//!
//! The message may be any bytes of the peer. Must never fail on them: a payload that cannot be decoded is
//! printed as bytes.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use zerocopy::{FromBytes, IntoBytes};

use super::features::{DeviceFeatures, ProtocolFeatures};
use super::message::{
    ConfigHead, Header, Inflight, Iotlb, LogArea, MemRegion, MemTableHead, ShmemArea, SingleMemRegion,
    StateTransfer, VringAddr, VringArea, VringState,
};
use super::request::{BackendRequest, Request};
use crate::peer::wire::describe_bytes as bytes;
use crate::peer::{Direction, Peer, Trace, TraceEvent};

/// The fields of one message.
#[expect(missing_docs, reason = "the names say it")]
pub struct Fields<'a> {
    pub direction: Direction,
    pub header: Header,
    pub payload: &'a [u8],
}

/// Passes a message to the trace, if there is one.
pub(super) fn show(
    trace: Option<&Arc<dyn Trace>>,
    peer: &Peer,
    fields: &Fields<'_>,
    fds: usize,
    took: Duration,
) {
    let Some(trace) = trace else { return };
    let code = fields.header.request;
    let message = match fields.direction {
        Direction::Request | Direction::Answer => Request(code).into(),
        Direction::PeerRequest | Direction::OurAnswer => BackendRequest(code).into(),
    };
    let Fields { direction, header, payload } = fields;
    let (direction, header) = (*direction, header.as_bytes());
    trace.message(&TraceEvent { peer, direction, message, header, payload, fields, fds, took });
}

impl fmt::Display for Fields<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = self.header.request;
        match self.direction {
            Direction::Request => request(f, Request(code), self.payload)?,
            Direction::Answer => answer(f, Request(code), self.payload)?,
            Direction::PeerRequest => backend_request(f, BackendRequest(code), self.payload)?,
            Direction::OurAnswer => number(f, "code", self.payload)?,
        }
        if self.header.wants_reply() && matches!(self.direction, Direction::Request | Direction::PeerRequest)
        {
            f.write_str(" need_reply")?;
        }
        Ok(())
    }
}

fn request(f: &mut fmt::Formatter<'_>, request: Request, payload: &[u8]) -> fmt::Result {
    match request {
        Request::SET_FEATURES => features(f, payload),
        Request::SET_PROTOCOL_FEATURES => protocol(f, payload),
        Request::SET_MEM_TABLE => memory(f, payload),
        Request::ADD_MEM_REG | Request::REM_MEM_REG => {
            decode(f, payload, |f, single: SingleMemRegion| region(f, &single.region))
        }
        Request::SET_LOG_BASE => {
            decode(f, payload, |f, log: LogArea| write!(f, " size={:#x} offset={:#x}", log.size, log.offset))
        }
        Request::SET_VRING_NUM
        | Request::SET_VRING_BASE
        | Request::GET_VRING_BASE
        | Request::GET_VRING_BASE_SKIP_DRAIN
        | Request::SET_VRING_ENABLE
        | Request::SET_VRING_ENDIAN
        | Request::VRING_KICK => ring_state(f, payload),
        Request::SET_VRING_ADDR => decode(f, payload, |f, ring: VringAddr| {
            write!(
                f,
                " ring={} flags={:#x} desc={:#x} avail={:#x} used={:#x} log={:#x}",
                ring.index, ring.flags, ring.descriptor, ring.available, ring.used, ring.log
            )
        }),
        Request::SET_VRING_KICK | Request::SET_VRING_CALL | Request::SET_VRING_ERR => {
            number(f, "ring", payload)
        }
        Request::GET_CONFIG | Request::SET_CONFIG => config(f, payload),
        Request::IOTLB_MSG => iotlb(f, payload),
        Request::GET_INFLIGHT_FD | Request::SET_INFLIGHT_FD => inflight(f, payload),
        Request::SET_DEVICE_STATE_FD => decode(f, payload, |f, state: StateTransfer| {
            write!(f, " direction={} phase={}", state.direction, state.phase)
        }),
        // The payload holds keys, which must not be logged.
        Request::CREATE_CRYPTO_SESSION => write!(f, " ({} bytes)", payload.len()),
        _ => number(f, "value", payload),
    }
}

fn answer(f: &mut fmt::Formatter<'_>, request: Request, payload: &[u8]) -> fmt::Result {
    match request {
        Request::GET_FEATURES => features(f, payload),
        Request::GET_PROTOCOL_FEATURES => protocol(f, payload),
        Request::GET_VRING_BASE | Request::GET_VRING_BASE_SKIP_DRAIN => ring_state(f, payload),
        Request::GET_CONFIG => config(f, payload),
        Request::GET_INFLIGHT_FD => inflight(f, payload),
        Request::SET_MEM_TABLE if payload.len() > 8 => memory(f, payload),
        Request::CREATE_CRYPTO_SESSION => write!(f, " ({} bytes)", payload.len()),
        _ => number(f, "value", payload),
    }
}

fn backend_request(f: &mut fmt::Formatter<'_>, request: BackendRequest, payload: &[u8]) -> fmt::Result {
    match request {
        BackendRequest::IOTLB_MSG => iotlb(f, payload),
        BackendRequest::VRING_HOST_NOTIFIER_MSG => decode(f, payload, |f, area: VringArea| {
            write!(f, " ring={:#x} size={:#x} offset={:#x}", area.index, area.size, area.offset)
        }),
        BackendRequest::VRING_CALL | BackendRequest::VRING_ERR => ring_state(f, payload),
        BackendRequest::SHMEM_MAP | BackendRequest::SHMEM_UNMAP => {
            decode(f, payload, |f, area: ShmemArea| {
                write!(
                    f,
                    " region={} at={:#x} len={:#x} fd_offset={:#x} flags={:#x}",
                    area.shmid, area.shm_offset, area.len, area.fd_offset, area.flags
                )
            })
        }
        _ => number(f, "value", payload),
    }
}

/// Prints `payload` as a `T`. Prints it as bytes when its size does not fit.
fn decode<T: FromBytes>(
    f: &mut fmt::Formatter<'_>,
    payload: &[u8],
    print: impl FnOnce(&mut fmt::Formatter<'_>, T) -> fmt::Result,
) -> fmt::Result {
    match T::read_from_bytes(payload) {
        Ok(value) => print(f, value),
        Err(_) => bytes(f, payload),
    }
}

fn number(f: &mut fmt::Formatter<'_>, name: &str, payload: &[u8]) -> fmt::Result {
    decode(f, payload, |f, value: u64| write!(f, " {name}={value:#x}"))
}

fn features(f: &mut fmt::Formatter<'_>, payload: &[u8]) -> fmt::Result {
    decode(f, payload, |f, bits: u64| write!(f, " {bits:#x} ({})", DeviceFeatures::from_bits(bits)))
}

fn protocol(f: &mut fmt::Formatter<'_>, payload: &[u8]) -> fmt::Result {
    decode(f, payload, |f, bits: u64| write!(f, " {bits:#x} ({})", ProtocolFeatures::from_bits(bits)))
}

fn ring_state(f: &mut fmt::Formatter<'_>, payload: &[u8]) -> fmt::Result {
    decode(f, payload, |f, state: VringState| write!(f, " ring={} num={}", state.index, state.num))
}

fn region(f: &mut fmt::Formatter<'_>, region: &MemRegion) -> fmt::Result {
    let MemRegion { guest, size, user, offset } = region;
    write!(f, " [guest={guest:#x} size={size:#x} user={user:#x} offset={offset:#x}]")
}

fn memory(f: &mut fmt::Formatter<'_>, payload: &[u8]) -> fmt::Result {
    let Ok((head, rest)) = MemTableHead::read_from_prefix(payload) else { return bytes(f, payload) };
    write!(f, " regions={}", head.count)?;
    for entry in rest.chunks(size_of::<MemRegion>()) {
        decode(f, entry, |f, entry: MemRegion| region(f, &entry))?;
    }
    Ok(())
}

fn config(f: &mut fmt::Formatter<'_>, payload: &[u8]) -> fmt::Result {
    let Ok((head, rest)) = ConfigHead::read_from_prefix(payload) else { return bytes(f, payload) };
    write!(f, " offset={} size={} flags={}", head.offset, head.size, head.flags)?;
    bytes(f, rest)
}

fn iotlb(f: &mut fmt::Formatter<'_>, payload: &[u8]) -> fmt::Result {
    decode(f, payload, |f, entry: Iotlb| {
        write!(
            f,
            " iova={:#x} size={:#x} user={:#x} permission={} type={}",
            entry.iova, entry.size, entry.user, entry.permission, entry.kind
        )
    })
}

fn inflight(f: &mut fmt::Formatter<'_>, payload: &[u8]) -> fmt::Result {
    decode(f, payload, |f, area: Inflight| {
        let Inflight { mmap_size, mmap_offset, num_queues, queue_size, .. } = area;
        write!(f, " size={mmap_size:#x} offset={mmap_offset:#x} queues={num_queues} queue_size={queue_size}")
    })
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
        let peer = Peer::new(Protocol::VhostUser, "/run/s");
        show(Some(&trace), &peer, &Fields { direction, header, payload }, fds, Duration::from_micros(17));
        lines.0.lock().unwrap().clone()
    }

    #[test]
    fn messages_read_as_names_and_fields() {
        let state = [1u32, 256].map(u32::to_ne_bytes).concat();
        let num = Header::asking(Request::SET_VRING_NUM.0, 8);
        assert_eq!(
            line(Direction::Request, num, &state, 0),
            "/run/s > SET_VRING_NUM ring=1 num=256 need_reply"
        );
        let offered = (1u64 << 32).to_ne_bytes();
        assert_eq!(
            line(Direction::Answer, Header::reply(1, 8), &offered, 0),
            "/run/s < GET_FEATURES 0x100000000 (version_1) (17 us)"
        );
        assert_eq!(
            line(Direction::PeerRequest, Header::request(2, 0), &[], 0),
            "/run/s << CONFIG_CHANGE_MSG"
        );
        let kick = Header::request(Request::SET_VRING_KICK.0, 8);
        assert_eq!(
            line(Direction::Request, kick, &3u64.to_ne_bytes(), 1),
            "/run/s > SET_VRING_KICK ring=0x3 fds=1"
        );
    }

    #[test]
    fn nonsense_of_any_length_is_printed_and_nothing_fails() {
        for code in 0..60 {
            for len in 0..300 {
                for direction in
                    [Direction::Request, Direction::Answer, Direction::PeerRequest, Direction::OurAnswer]
                {
                    assert!(!line(direction, Header::request(code, 0), &vec![0xa5; len], 2).is_empty());
                }
            }
        }
    }

    #[test]
    fn keys_are_not_printed() {
        let header = Header::request(Request::CREATE_CRYPTO_SESSION.0, 632);
        let line = line(Direction::Request, header, &[0xab; 632], 0);
        assert_eq!(line, "/run/s > CREATE_CRYPTO_SESSION (632 bytes)");
    }
}
