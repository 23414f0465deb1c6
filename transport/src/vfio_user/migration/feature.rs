//! vfio-user DEVICE_FEATURE: probing, reading and writing a feature. The meaning of each feature is in the
//! other files.

use zerocopy::IntoBytes;

use crate::peer::{Cause, Error};
use crate::vfio_user::client::Client;
use crate::vfio_user::connection::Expected;
use crate::vfio_user::message::{Command, Fault, Feature, FeatureHead, length, parse_front};

const INDEX: u32 = 0xffff;
const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;

/// How a feature is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureUse {
    /// Its data is read.
    Get,
    /// Its data is written.
    Set,
}

impl FeatureUse {
    fn flag(self) -> u32 {
        match self {
            Self::Get => GET,
            Self::Set => SET,
        }
    }
}

/// Reads the payload of the DEVICE_FEATURE reply to a command with `flags`. Some servers send a success
/// without a payload; it counts as one without data. Pure, so that it can be fuzzed.
///
/// # Errors
/// When the reply is about another feature.
pub fn parse_feature(payload: &[u8], flags: u32) -> Result<&[u8], Fault> {
    if payload.is_empty() {
        return Ok(payload);
    }
    let (head, data) = parse_front::<FeatureHead>(payload)?;
    if head.flags & INDEX != flags & INDEX {
        return Err(Fault::Value { field: "feature", value: u64::from(head.flags & INDEX) });
    }
    Ok(data)
}

impl Client {
    /// True when `feature` can be used in the way `with`.
    ///
    /// # Errors
    /// When the server fails. A refusal is the answer `false`, and a server that may not be asked counts as
    /// one that refuses.
    pub fn has_feature(&self, feature: Feature, with: FeatureUse) -> Result<bool, Error> {
        match self.feature(feature, PROBE | with.flag(), &[], 0) {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.cause(), Cause::Refused(_) | Cause::NotNegotiated) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads the data of `feature`, at most `most` bytes. `data` is sent with the command.
    ///
    /// # Errors
    /// When the server refuses or fails, or sends more bytes.
    pub fn get_feature(&self, feature: Feature, data: &[u8], most: u32) -> Result<Vec<u8>, Error> {
        self.feature(feature, GET, data, most)
    }

    /// Writes the data of `feature`. Returns the data of the reply.
    ///
    /// # Errors
    /// When the server refuses or fails, or sends more bytes than it got.
    pub fn set_feature(&self, feature: Feature, data: &[u8]) -> Result<Vec<u8>, Error> {
        self.feature(feature, SET, data, length(data.len()))
    }

    fn feature(&self, feature: Feature, with: u32, data: &[u8], most: u32) -> Result<Vec<u8>, Error> {
        let command = Command::DEVICE_FEATURE;
        self.needs_extended(command)?;
        let flags = u32::from(feature.0) | with;
        let argsz = length(size_of::<FeatureHead>()).saturating_add(most);
        let head = FeatureHead { argsz, flags };
        let reply = self.ask(command, &[head.as_bytes(), data], &[], Expected::bytes(argsz))?;
        let data = parse_feature(&reply.payload, flags).map_err(|fault| self.malformed(command, fault))?;
        Ok(data.to_vec())
    }
}
