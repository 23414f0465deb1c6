//! Requests for one kind of device only: crypto sessions, the MTU and RARP of a network card, the socket of a
//! display, and shared objects.
//!
//! The specification does not define the payload of CREATE_CRYPTO_SESSION. It is the ABI of QEMU and DPDK;
//! see [`SymmetricSession`]. The pointers in it have no meaning between processes and are sent as zero.

use std::os::fd::{BorrowedFd, OwnedFd};

use zerocopy::IntoBytes;

use super::live::LiveSession;
use super::message::{Fault, Uuid, length, parse_front};
use super::request::Request;
use super::session::Session;
use crate::peer::{Cause, Error};

/// The most bytes of a cipher key.
pub const CIPHER_KEY_MAX: usize = 64;

/// The most bytes of an authentication key.
pub const AUTH_KEY_MAX: usize = 512;

/// Bytes of the CREATE_CRYPTO_SESSION payload.
const SIZE: usize = 8 + 7 * 4 + 4 + 2 * 8 + CIPHER_KEY_MAX + AUTH_KEY_MAX;

/// The parameters of a symmetric session. Numbers are those of virtio 1.2 §5.9.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SymmetricSession {
    /// VIRTIO_CRYPTO_..._CREATE_SESSION.
    pub op_code: u32,
    /// Cipher algorithm.
    pub cipher_algorithm: u32,
    /// Hash algorithm.
    pub hash_algorithm: u32,
    /// Bytes of the hash result.
    pub digest_length: u32,
    /// Bytes of additional authenticated data.
    pub aad_length: u32,
    /// None, cipher, or chained.
    pub op_type: u8,
    /// 1 encrypt, 2 decrypt.
    pub direction: u8,
    /// Plain, authenticated or nested hash.
    pub hash_mode: u8,
    /// Whether cipher or hash comes first in a chain.
    pub chain_order: u8,
    /// At most [`CIPHER_KEY_MAX`] bytes.
    pub cipher_key: Vec<u8>,
    /// At most [`AUTH_KEY_MAX`] bytes.
    pub auth_key: Vec<u8>,
}

impl SymmetricSession {
    /// The CREATE_CRYPTO_SESSION payload; `None` when a key is too long.
    pub fn encode(&self) -> Option<Vec<u8>> {
        if self.cipher_key.len() > CIPHER_KEY_MAX || self.auth_key.len() > AUTH_KEY_MAX {
            return None;
        }
        let mut payload = Vec::with_capacity(SIZE);
        // The session id, which the backend sets in its answer.
        payload.extend_from_slice(&0i64.to_ne_bytes());
        for word in [
            self.op_code,
            self.cipher_algorithm,
            length(self.cipher_key.len()),
            self.hash_algorithm,
            self.digest_length,
            length(self.auth_key.len()),
            self.aad_length,
        ] {
            payload.extend_from_slice(&word.to_ne_bytes());
        }
        payload.extend_from_slice(&[self.op_type, self.direction, self.hash_mode, self.chain_order]);
        payload.extend_from_slice([0u64; 2].as_bytes());
        let keys = payload.len();
        payload.extend_from_slice(&self.cipher_key);
        payload.resize(keys.saturating_add(CIPHER_KEY_MAX), 0);
        payload.extend_from_slice(&self.auth_key);
        payload.resize(SIZE, 0);
        Some(payload)
    }
}

/// The id of a session that the backend holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionId(pub u64);

/// Reads the answer to CREATE_CRYPTO_SESSION: the session, or the backend's negative error code.
pub fn parse_session(payload: &[u8]) -> Result<Result<SessionId, i64>, Fault> {
    let (id, _): (i64, _) = parse_front(payload)?;
    Ok(u64::try_from(id).map(SessionId).map_err(|_| id))
}

/// The payload of SEND_RARP: the MAC in the first 6 bytes.
fn rarp(mac: [u8; 6]) -> [u8; 8] {
    let [a, b, c, d, e, f] = mac;
    [a, b, c, d, e, f, 0, 0]
}

impl Session {
    /// Tells the backend the MTU that the guest sees. Needs MTU. For drivers with VIRTIO_NET_F_MTU only.
    pub fn set_mtu(&mut self, mtu: u16) -> Result<(), Error> {
        self.channel.order(Request::NET_SET_MTU, &u64::from(mtu).to_ne_bytes(), &[])
    }

    /// Gives a GPU backend the socket of its display.
    pub fn set_gpu_socket(&mut self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        self.channel.order(Request::GPU_SET_SOCKET, &[], &[socket])
    }
}

impl LiveSession {
    /// Opens a session. Needs CRYPTO_SESSION. The backend gets a copy of the keys.
    pub fn create_crypto_session(&mut self, session: &SymmetricSession) -> Result<SessionId, Error> {
        const REQUEST: Request = Request::CREATE_CRYPTO_SESSION;
        let channel = &mut self.session.channel;
        let payload = session.encode().ok_or_else(|| channel.invalid(REQUEST, "a key is too long"))?;
        let answered = channel.ask(REQUEST, &payload, &[])?;
        match parse_session(&answered.payload) {
            Ok(Ok(id)) => Ok(id),
            Ok(Err(code)) => Err(channel.error(REQUEST, Cause::Refused(code.unsigned_abs()))),
            Err(fault) => Err(channel.malformed(REQUEST, fault)),
        }
    }

    /// Closes a session.
    pub fn close_crypto_session(&mut self, session: SessionId) -> Result<(), Error> {
        self.session.channel.order(Request::CLOSE_CRYPTO_SESSION, &session.0.to_ne_bytes(), &[])
    }

    /// Makes the backend announce `mac` on its network after a migration. Needs RARP. For guests that do not
    /// announce themselves (VIRTIO_NET_F_GUEST_ANNOUNCE).
    pub fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        self.session.channel.order(Request::SEND_RARP, &rarp(mac), &[])
    }

    /// Asks for the fd of the object `uuid`. Needs SHARED_OBJECT. [`Cause::Refused`] when there is no such
    /// object.
    pub fn shared_object(&mut self, uuid: Uuid) -> Result<OwnedFd, Error> {
        const REQUEST: Request = Request::GET_SHARED_OBJECT;
        let channel = &mut self.session.channel;
        let answered = channel.ask(REQUEST, uuid.as_bytes(), &[])?;
        answered.fds.into_iter().next().ok_or_else(|| channel.error(REQUEST, Cause::Refused(0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_encoded_at_the_offsets_of_the_c_struct() {
        let session = SymmetricSession {
            op_code: 2,
            cipher_algorithm: 3,
            direction: 1,
            cipher_key: vec![0xaa; 16],
            auth_key: vec![0xbb; 20],
            ..SymmetricSession::default()
        };
        let wire = session.encode().unwrap();
        assert_eq!(wire.len(), 632);
        assert_eq!(wire[8..20], [2, 0, 0, 0, 3, 0, 0, 0, 16, 0, 0, 0]);
        assert_eq!(wire[28..32], [20, 0, 0, 0]);
        assert_eq!(wire[36..40], [0, 1, 0, 0]);
        assert_eq!(wire[40..56], [0; 16]);
        assert_eq!((wire[56], wire[71], wire[72]), (0xaa, 0xaa, 0));
        assert_eq!((wire[120], wire[139], wire[140]), (0xbb, 0xbb, 0));
    }

    #[test]
    fn keys_that_are_too_long_are_refused() {
        let long = SymmetricSession { cipher_key: vec![0; 65], ..SymmetricSession::default() };
        assert_eq!(long.encode(), None);
        let long = SymmetricSession { auth_key: vec![0; 513], ..SymmetricSession::default() };
        assert_eq!(long.encode(), None);
    }

    #[test]
    fn a_negative_id_is_an_error() {
        assert_eq!(parse_session(&7i64.to_ne_bytes()), Ok(Ok(SessionId(7))));
        assert_eq!(parse_session(&(-1i64).to_ne_bytes()), Ok(Err(-1)));
        assert!(parse_session(&[0; 7]).is_err());
    }

    #[test]
    fn the_mac_is_in_the_first_six_bytes() {
        assert_eq!(rarp([1, 2, 3, 4, 5, 6]), [1, 2, 3, 4, 5, 6, 0, 0]);
    }
}
