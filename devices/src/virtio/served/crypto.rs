//! Virtio 1.2 §5.9.7: the control queue of a crypto device, which the VMM serves in place of the backend. The
//! driver opens and closes sessions there; we pass this on by vhost-user messages. The backend serves the
//! data queues, which use the sessions. Must never keep a key.

use std::collections::BTreeSet;

use transport::vhost_user::extras::{AUTH_KEY_MAX, CIPHER_KEY_MAX, SessionId, SymmetricSession};

/// The most sessions of a driver.
const SESSIONS_MAX: usize = 1024;

/// Bytes of a request without its keys: a header of 16 bytes and a union of 56.
const REQUEST: usize = 72;

/// VIRTIO_CRYPTO_… (§5.9.7.1, §5.9.7.2).
mod code {
    pub(crate) const CIPHER_CREATE: u32 = 0x0002;
    pub(crate) const CIPHER_DESTROY: u32 = 0x0003;
    pub(crate) const OP_CIPHER: u32 = 1;
    pub(crate) const OP_CHAIN: u32 = 2;
    pub(crate) const HASH_MODE_PLAIN: u32 = 1;
    pub(crate) const HASH_MODE_AUTH: u32 = 2;

    pub(crate) const OK: u32 = 0;
    pub(crate) const ERROR: u32 = 1;
    pub(crate) const BAD_MESSAGE: u32 = 2;
    pub(crate) const NOT_SUPPORTED: u32 = 3;
    pub(crate) const INVALID_SESSION: u32 = 4;
}

/// A driver's request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Asked {
    Create(Box<SymmetricSession>),
    Close(SessionId),
    /// Nothing to do. The status says why.
    Nothing(u32),
}

fn word(request: &[u8], offset: usize) -> Option<u32> {
    request.get(offset..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

/// Reads a field that is 32 bits wide in the request and a byte in the vhost-user message.
fn byte(request: &[u8], offset: usize) -> Option<u8> {
    u8::try_from(word(request, offset)?).ok()
}

/// Reads a request.
pub(crate) fn parse(request: &[u8]) -> Asked {
    match word(request, 0) {
        _ if request.len() < REQUEST => Asked::Nothing(code::BAD_MESSAGE),
        Some(code::CIPHER_CREATE) => match create(request) {
            Some(Ok(session)) => Asked::Create(Box::new(session)),
            Some(Err(status)) => Asked::Nothing(status),
            None => Asked::Nothing(code::BAD_MESSAGE),
        },
        Some(code::CIPHER_DESTROY) => {
            let id = request.get(16..).and_then(|rest| rest.first_chunk());
            id.map_or(Asked::Nothing(code::BAD_MESSAGE), |id| {
                Asked::Close(SessionId(u64::from_le_bytes(*id)))
            })
        }
        // vhost-user has no message for hashes, MACs, AEAD and public keys.
        _ => Asked::Nothing(code::NOT_SUPPORTED),
    }
}

/// Reads a symmetric session; `None` when the request contradicts itself.
fn create(request: &[u8]) -> Option<Result<SymmetricSession, u32>> {
    // The union: 48 bytes for the algorithm, then the kind of algorithm.
    let kind = word(request, 16 + 48)?;
    let cipher = |at: usize| {
        let (algorithm, length) = (word(request, at)?, word(request, at + 4)?);
        Some((algorithm, usize::try_from(length).ok()?, byte(request, at + 8)?))
    };
    let mut session = SymmetricSession { op_code: code::CIPHER_CREATE, ..SymmetricSession::default() };
    let keys = request.get(REQUEST..)?;
    let (key_length, auth_length) = match kind {
        code::OP_CIPHER => {
            let (algorithm, length, direction) = cipher(16)?;
            (session.cipher_algorithm, session.direction) = (algorithm, direction);
            (length, 0)
        }
        code::OP_CHAIN => {
            session.chain_order = byte(request, 16)?;
            session.hash_mode = byte(request, 20)?;
            let (algorithm, length, direction) = cipher(24)?;
            (session.cipher_algorithm, session.direction) = (algorithm, direction);
            (session.hash_algorithm, session.digest_length) = (word(request, 40)?, word(request, 44)?);
            session.aad_length = word(request, 56)?;
            match u32::from(session.hash_mode) {
                code::HASH_MODE_PLAIN => (length, 0),
                code::HASH_MODE_AUTH => (length, usize::try_from(word(request, 48)?).ok()?),
                _ => return Some(Err(code::NOT_SUPPORTED)),
            }
        }
        _ => return Some(Err(code::NOT_SUPPORTED)),
    };
    session.op_type = u8::try_from(kind).ok()?;
    if key_length > CIPHER_KEY_MAX || auth_length > AUTH_KEY_MAX {
        return Some(Err(code::ERROR));
    }
    session.cipher_key = keys.get(..key_length)?.to_vec();
    session.auth_key = keys.get(key_length..key_length.checked_add(auth_length)?)?.to_vec();
    Some(Ok(session))
}

/// The sessions that the driver holds.
#[derive(Debug, Default)]
pub(crate) struct Sessions(BTreeSet<u64>);

/// The outcome of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    Created(SessionId),
    Closed,
    Failed(u32),
}

impl Done {
    /// The backend refused.
    pub(crate) const REFUSED: Self = Self::Failed(code::ERROR);
    /// There is no such session.
    pub(crate) const UNKNOWN: Self = Self::Failed(code::INVALID_SESSION);

    /// The answer for a driver that left `room` bytes. It holds a session id if there is room for one
    /// (§5.9.7.2.1), and otherwise only the status.
    pub(crate) fn encode(self, room: u64) -> Vec<u8> {
        let (id, status) = match self {
            Self::Created(SessionId(id)) => (id, code::OK),
            Self::Closed => (0, code::OK),
            Self::Failed(status) => (0, status),
        };
        let [low, ..] = status.to_le_bytes();
        match (self, room) {
            (Self::Closed, _) | (_, 0..16) => vec![low],
            _ => [&id.to_le_bytes()[..], &status.to_le_bytes(), &[0; 4]].concat(),
        }
    }
}

impl Sessions {
    /// Whether another session is allowed.
    pub(crate) fn have_room(&self) -> bool {
        self.0.len() < SESSIONS_MAX
    }

    pub(crate) fn add(&mut self, SessionId(id): SessionId) {
        self.0.insert(id);
    }

    /// Removes a session; false when the driver does not hold it.
    pub(crate) fn remove(&mut self, SessionId(id): SessionId) -> bool {
        self.0.remove(&id)
    }

    /// Removes and returns all sessions.
    pub(crate) fn take(&mut self) -> impl Iterator<Item = SessionId> {
        std::mem::take(&mut self.0).into_iter().map(SessionId)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
#[path = "crypto_tests.rs"]
mod tests;
