//! vfio-user DEVICE_FEATURE: what a device can do beyond its registers. What each feature means is elsewhere.

use zerocopy::IntoBytes;

use crate::peer::{Cause, Error};
use crate::vfio_user::client::Client;
use crate::vfio_user::connection::Expected;
use crate::vfio_user::message::{Command, Fault, Feature, FeatureHead, length, parse_front};

const INDEX: u32 = 0xffff;
const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;

/// What is done with a feature.
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

/// Reads the payload of a DEVICE_FEATURE reply to a command with these flags. Pure: for fuzzing, too. A success
/// without payload, as some servers have it, is one without data.
///
/// # Errors
/// When it is about another feature.
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
    /// Can `feature` be used so?
    ///
    /// # Errors
    /// When the server fails; that it refuses is the answer no, and one that may not be asked gives it, too.
    pub fn has_feature(&self, feature: Feature, with: FeatureUse) -> Result<bool, Error> {
        match self.feature(feature, PROBE | with.flag(), &[], 0) {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.cause(), Cause::Refused(_) | Cause::NotNegotiated) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads the data of `feature`, `most` bytes at most; `data` goes with the question.
    ///
    /// # Errors
    /// When the server refuses, fails, or sends more.
    pub fn get_feature(&self, feature: Feature, data: &[u8], most: u32) -> Result<Vec<u8>, Error> {
        self.feature(feature, GET, data, most)
    }

    /// Writes the data of `feature`; returns the server's version of it.
    ///
    /// # Errors
    /// When the server refuses, fails, or sends more than it got.
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
