//! The request table of vhost-user "Front-end message types": what each request needs, carries and is
//! answered with.
//!
//! This file holds the rules as data; `channel.rs` applies them to every exchange. A request is sent only
//! when its `needs` column was negotiated.

use std::fmt;

use super::features::ProtocolFeatures;
use crate::peer::MessageName;

/// A front-end request code. Open: an unknown code can be printed and never crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Request(pub u32);

/// The condition for sending a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// No condition.
    Nothing,
    /// Device feature bit 30 was offered.
    ProtocolOffered,
    /// These protocol features, all of them, were negotiated.
    Features(ProtocolFeatures),
}

/// How a request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// With a u64 (0 = success) when REPLY_ACK is negotiated and need_reply is set, otherwise not at all.
    Ack,
    /// Always, with a payload of `least` to `most` bytes and `fds.0` to `fds.1` fds.
    Always {
        /// Fewest bytes of payload.
        least: u32,
        /// Most bytes of payload.
        most: u32,
        /// Fewest and most fds.
        fds: (u8, u8),
    },
    /// Like `Always` with a u64. need_reply is set if REPLY_ACK allows it, as rust backends answer only then.
    AlwaysAsked,
    /// Always, with any payload: backends disagree about the payload, and nothing in it matters.
    Unjudged,
}

const U64: Answer = Answer::Always { least: 8, most: 8, fds: (0, 0) };

/// The largest payload of an answer that is not judged.
pub const UNJUDGED_MOST: u32 = 64;

/// The most bytes of configuration space that GET_CONFIG and SET_CONFIG carry.
pub const CONFIG_MOST: u32 = 256;

/// The most bytes of a virtio-crypto session payload. The size of QEMU's struct differs between versions.
const CRYPTO_MOST: u32 = 2048;

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The request.
    pub request: Request,
    /// Its name in the specification, without the VHOST_USER_ prefix.
    pub name: &'static str,
    /// The condition for sending it.
    pub needs: Needs,
    /// The fewest and the most fds that travel with it.
    pub fds: (u8, u8),
    /// How it is answered.
    pub answer: Answer,
}

macro_rules! requests {
    ($($code:literal $name:ident, $needs:expr, fds $least:literal..$most:literal, $answer:expr;)*) => {
        impl Request {
            $(#[doc = concat!("VHOST_USER_", stringify!($name), ".")] pub const $name: Self = Self($code);)*
        }

        /// Every front-end request, by code.
        pub const TABLE: &[Row] = &[
            $(Row {
                request: Request::$name,
                name: stringify!($name),
                needs: $needs,
                fds: ($least, $most),
                answer: $answer,
            },)*
        ];
    };
}

const fn feature(features: ProtocolFeatures) -> Needs {
    Needs::Features(features)
}

use Answer::{Ack, Always, AlwaysAsked, Unjudged};
use Needs::{Nothing, ProtocolOffered};
use ProtocolFeatures as P;

requests! {
    1  GET_FEATURES, Nothing, fds 0..0, U64;
    2  SET_FEATURES, Nothing, fds 0..0, Ack;
    3  SET_OWNER, Nothing, fds 0..0, Ack;
    // Deprecated and never sent: backends disagree about what it resets. RESET_DEVICE replaces it.
    4  RESET_OWNER, Nothing, fds 0..0, Ack;
    5  SET_MEM_TABLE, Nothing, fds 1..32, Ack;
    6  SET_LOG_BASE, feature(P::LOG_SHMFD), fds 1..1, Unjudged;
    7  SET_LOG_FD, Nothing, fds 1..1, Ack;
    8  SET_VRING_NUM, Nothing, fds 0..0, Ack;
    9  SET_VRING_ADDR, Nothing, fds 0..0, Ack;
    10 SET_VRING_BASE, Nothing, fds 0..0, Ack;
    11 GET_VRING_BASE, Nothing, fds 0..0, U64;
    12 SET_VRING_KICK, Nothing, fds 0..1, Ack;
    13 SET_VRING_CALL, Nothing, fds 0..1, Ack;
    14 SET_VRING_ERR, Nothing, fds 0..1, Ack;
    15 GET_PROTOCOL_FEATURES, ProtocolOffered, fds 0..0, U64;
    16 SET_PROTOCOL_FEATURES, ProtocolOffered, fds 0..0, Ack;
    17 GET_QUEUE_NUM, feature(P::MQ), fds 0..0, U64;
    18 SET_VRING_ENABLE, ProtocolOffered, fds 0..0, Ack;
    19 SEND_RARP, feature(P::RARP), fds 0..0, Ack;
    20 NET_SET_MTU, feature(P::MTU), fds 0..0, Ack;
    21 SET_BACKEND_REQ_FD, feature(P::BACKEND_REQ), fds 1..1, Ack;
    22 IOTLB_MSG, feature(P::BACKEND_REQ.with(P::REPLY_ACK)), fds 0..0, Ack;
    // For legacy devices of the other endianness only. The guests and hosts of this VMM are both x86-64.
    23 SET_VRING_ENDIAN, feature(P::CROSS_ENDIAN), fds 0..0, Ack;
    24 GET_CONFIG, feature(P::CONFIG), fds 0..0, Always { least: 0, most: 12 + CONFIG_MOST, fds: (0, 0) };
    25 SET_CONFIG, feature(P::CONFIG), fds 0..0, Ack;
    26 CREATE_CRYPTO_SESSION, feature(P::CRYPTO_SESSION), fds 0..0,
        Always { least: 8, most: CRYPTO_MOST, fds: (0, 0) };
    27 CLOSE_CRYPTO_SESSION, feature(P::CRYPTO_SESSION), fds 0..0, Ack;
    28 POSTCOPY_ADVISE, feature(P::PAGEFAULT), fds 0..0, Always { least: 0, most: 8, fds: (0, 1) };
    29 POSTCOPY_LISTEN, feature(P::PAGEFAULT), fds 0..0, AlwaysAsked;
    30 POSTCOPY_END, feature(P::PAGEFAULT), fds 0..0, AlwaysAsked;
    31 GET_INFLIGHT_FD, feature(P::INFLIGHT_SHMFD), fds 0..0, Always { least: 20, most: 24, fds: (0, 1) };
    32 SET_INFLIGHT_FD, feature(P::INFLIGHT_SHMFD), fds 1..1, Ack;
    33 GPU_SET_SOCKET, Nothing, fds 1..1, Ack;
    34 RESET_DEVICE, feature(P::RESET_DEVICE), fds 0..0, Ack;
    35 VRING_KICK, feature(P::INBAND_NOTIFICATIONS), fds 0..0, Ack;
    36 GET_MAX_MEM_SLOTS, feature(P::CONFIGURE_MEM_SLOTS), fds 0..0, U64;
    37 ADD_MEM_REG, feature(P::CONFIGURE_MEM_SLOTS), fds 1..1, Ack;
    38 REM_MEM_REG, feature(P::CONFIGURE_MEM_SLOTS), fds 0..0, Ack;
    39 SET_STATUS, feature(P::STATUS), fds 0..0, Ack;
    40 GET_STATUS, feature(P::STATUS), fds 0..0, U64;
    41 GET_SHARED_OBJECT, feature(P::SHARED_OBJECT), fds 0..0, Always { least: 0, most: 16, fds: (0, 1) };
    42 SET_DEVICE_STATE_FD, feature(P::DEVICE_STATE), fds 1..1, Always { least: 8, most: 8, fds: (0, 1) };
    43 CHECK_DEVICE_STATE, feature(P::DEVICE_STATE), fds 0..0, U64;
    44 GET_SHMEM_CONFIG, feature(P::SHMEM), fds 0..0, Always { least: 8, most: 8 + 256 * 8, fds: (0, 0) };
    // Like GET_VRING_BASE, but the requests in flight are suspended and stay noted in the inflight area.
    45 GET_VRING_BASE_SKIP_DRAIN, feature(P::GET_VRING_BASE_SKIP_DRAIN), fds 0..0, U64;
}

impl Request {
    /// The request's row; `None` for a code that the specification does not have.
    pub fn row(self) -> Option<&'static Row> {
        TABLE.iter().find(|row| row.request == self)
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        MessageName::from(*self).fmt(f)
    }
}

/// A request code of the backend. Open: an unknown code can be printed and never crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendRequest(pub u32);

macro_rules! backend_requests {
    ($($code:literal $name:ident, $needs:expr;)*) => {
        impl BackendRequest {
            $(#[doc = concat!("VHOST_USER_BACKEND_", stringify!($name), ".")] pub const $name: Self = Self($code);)*

            /// Its name in the specification, without the VHOST_USER_BACKEND_ prefix.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($code => Some(stringify!($name)),)*
                    _ => None,
                }
            }

            /// The protocol features that the request needs; `None` for an unknown request.
            pub fn needs(self) -> Option<ProtocolFeatures> {
                match self.0 {
                    $($code => Some($needs),)*
                    _ => None,
                }
            }
        }
    };
}

impl BackendRequest {
    /// True when a descriptor travels with the request.
    pub fn carries_fd(self) -> bool {
        matches!(self, Self::VRING_HOST_NOTIFIER_MSG | Self::SHMEM_MAP)
    }
}

backend_requests! {
    1 IOTLB_MSG, P::BACKEND_REQ;
    2 CONFIG_CHANGE_MSG, P::CONFIG;
    3 VRING_HOST_NOTIFIER_MSG, P::HOST_NOTIFIER;
    4 VRING_CALL, P::INBAND_NOTIFICATIONS;
    5 VRING_ERR, P::INBAND_NOTIFICATIONS;
    6 SHARED_OBJECT_ADD, P::SHARED_OBJECT;
    7 SHARED_OBJECT_REMOVE, P::SHARED_OBJECT;
    8 SHARED_OBJECT_LOOKUP, P::SHARED_OBJECT;
    9 SHMEM_MAP, P::SHMEM;
    10 SHMEM_UNMAP, P::SHMEM;
}

impl fmt::Display for BackendRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        MessageName::from(*self).fmt(f)
    }
}

impl From<Request> for MessageName {
    fn from(request: Request) -> Self {
        Self { code: request.0, name: request.row().map(|row| row.name).ok_or("request") }
    }
}

impl From<BackendRequest> for MessageName {
    fn from(request: BackendRequest) -> Self {
        Self { code: request.0, name: request.name().ok_or("backend request") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_code_once_in_order() {
        let codes: Vec<u32> = TABLE.iter().map(|row| row.request.0).collect();
        assert_eq!(codes, (1..=45).collect::<Vec<_>>());
    }

    #[test]
    fn names_are_printed_and_unknown_codes_are_numbers() {
        assert_eq!(Request(15).to_string(), "GET_PROTOCOL_FEATURES");
        assert_eq!(Request(77).to_string(), "request 77");
    }

    #[test]
    fn no_answer_is_larger_than_a_few_pages() {
        for row in TABLE {
            if let Answer::Always { least, most, .. } = row.answer {
                assert!(least <= most && most <= 4096, "{}", row.name);
            }
        }
    }
}
