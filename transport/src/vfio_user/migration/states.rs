//! vfio-user migration: the states of a device, and the device's state data as a stream of messages.
//!
//! PRE_COPY and STOP_COPY each have a stream of their own. A read that returns fewer bytes than asked for
//! ends the stream. In STOP and STOP_COPY, servers refuse almost all other commands.

use std::fmt;
use std::io::{Read, Write};

use zerocopy::IntoBytes;

use crate::peer::{Cause, Error};
use crate::vfio_user::client::Client;
use crate::vfio_user::connection::Expected;
use crate::vfio_user::message::{
    Command, Fault, Feature, MigrationData, MigrationStatePayload, length, parse, parse_front,
};

/// What a device supports of migration: the flags of the feature MIGRATION.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrationSupport(pub u64);

impl MigrationSupport {
    /// True when the device's state can be read while the device is stopped.
    pub fn stop_copy(self) -> bool {
        self.0 & 1 != 0
    }

    /// True when the device can run without access to other devices.
    pub fn p2p(self) -> bool {
        self.0 & 2 != 0
    }

    /// True when the device's state can be read while the device runs.
    pub fn pre_copy(self) -> bool {
        self.0 & 4 != 0
    }
}

/// A state of a device's migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum MigrationState {
    /// The device failed and must be reset.
    Error = 0,
    /// The device is stopped.
    Stop = 1,
    /// The device runs.
    Running = 2,
    /// The device is stopped, and its state is being read.
    StopCopy = 3,
    /// The device is stopped, and its state is being written.
    Resuming = 4,
    /// The device runs without access to other devices.
    RunningP2p = 5,
    /// The device runs, and its state is being read.
    PreCopy = 6,
    /// The device runs without access to other devices, and its state is being read.
    PreCopyP2p = 7,
}

impl MigrationState {
    /// The state with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Error,
            1 => Self::Stop,
            2 => Self::Running,
            3 => Self::StopCopy,
            4 => Self::Resuming,
            5 => Self::RunningP2p,
            6 => Self::PreCopy,
            7 => Self::PreCopyP2p,
            _ => return None,
        })
    }
}

impl fmt::Display for MigrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "ERROR",
            Self::Stop => "STOP",
            Self::Running => "RUNNING",
            Self::StopCopy => "STOP_COPY",
            Self::Resuming => "RESUMING",
            Self::RunningP2p => "RUNNING_P2P",
            Self::PreCopy => "PRE_COPY",
            Self::PreCopyP2p => "PRE_COPY_P2P",
        })
    }
}

/// Reads the data of the feature MIG_DEVICE_STATE. Pure, so that it can be fuzzed.
///
/// # Errors
/// When no state has this number.
pub fn parse_migration_state(data: &[u8]) -> Result<MigrationState, Fault> {
    let payload: MigrationStatePayload = parse(data)?;
    let fault = Fault::Value { field: "migration state", value: u64::from(payload.state) };
    MigrationState::from_number(payload.state).ok_or(fault)
}

/// Reads the payload of a MIG_DATA_READ reply after `asked` bytes were asked for. Bytes behind the data are
/// padding. Pure, so that it can be fuzzed.
///
/// # Errors
/// When the reply claims more data than was asked for, or more than the payload holds.
pub fn parse_migration_data(payload: &[u8], asked: usize) -> Result<&[u8], Fault> {
    let (head, data) = parse_front::<MigrationData>(payload)?;
    let size = usize::try_from(head.size).unwrap_or(usize::MAX);
    let fault = Fault::Value { field: "size", value: u64::from(head.size) };
    data.get(..size).filter(|data| data.len() <= asked).ok_or(fault)
}

impl Client {
    /// What the device supports of migration; `None` when it cannot migrate.
    ///
    /// # Errors
    /// When the server fails.
    pub fn migration(&self) -> Result<Option<MigrationSupport>, Error> {
        match self.get_feature(Feature::MIGRATION, &[], 8) {
            Ok(data) => {
                let flags: u64 =
                    parse(&data).map_err(|fault| self.malformed(Command::DEVICE_FEATURE, fault))?;
                let support = MigrationSupport(flags);
                // Without STOP_COPY the state cannot be read at all, so the device cannot migrate.
                Ok(support.stop_copy().then_some(support))
            }
            Err(error) if matches!(error.cause(), Cause::Refused(_) | Cause::NotNegotiated) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads the device's migration state.
    ///
    /// # Errors
    /// When the server refuses or fails, or its state is unknown.
    pub fn migration_state(&self) -> Result<MigrationState, Error> {
        let data = self.get_feature(Feature::MIG_DEVICE_STATE, &[], 8)?;
        parse_migration_state(&data).map_err(|fault| self.malformed(Command::DEVICE_FEATURE, fault))
    }

    /// Brings the device into `state`, through the states between. Blocks until the device has reached it.
    ///
    /// # Errors
    /// When the server refuses (the device may be in [`MigrationState::Error`] then), fails, or says that the
    /// device is in another state.
    pub fn set_migration_state(&self, state: MigrationState) -> Result<(), Error> {
        let payload = MigrationStatePayload { state: state as u32, data_fd: u32::MAX };
        let data = self.set_feature(Feature::MIG_DEVICE_STATE, payload.as_bytes())?;
        let malformed = |fault| self.malformed(Command::DEVICE_FEATURE, fault);
        let reached = parse_migration_state(&data).map_err(malformed)?;
        if reached == state {
            return Ok(());
        }
        Err(malformed(Fault::Value { field: "migration state", value: u64::from(reached as u32) }))
    }

    /// Reads a part of the device's state: as many bytes as `data` holds and one message transfers. Fewer
    /// bytes than that end the stream.
    ///
    /// # Errors
    /// When the server refuses or fails, or sends more bytes than were asked for.
    pub fn read_migration_data(&self, data: &mut [u8]) -> Result<usize, Error> {
        let command = Command::MIG_DATA_READ;
        self.needs_extended(command)?;
        let asked = data.len().min(self.migration_piece());
        let head = length(size_of::<MigrationData>());
        let size = length(asked);
        let payload = MigrationData { argsz: head.saturating_add(size), size };
        // Servers pad replies by the size of a head at most.
        let expected = Expected::bytes(size.saturating_add(head).saturating_add(head));
        let reply = self.ask(command, &[payload.as_bytes()], &[], expected)?;
        let malformed = |fault| self.malformed(command, fault);
        let read = parse_migration_data(&reply.payload, asked).map_err(malformed)?;
        if let Some(into) = data.get_mut(..read.len()) {
            into.copy_from_slice(read);
        }
        Ok(read.len())
    }

    /// Writes a part of the device's state, at most as much as one message transfers. Returns the number of
    /// bytes written.
    ///
    /// # Errors
    /// When the server refuses or fails.
    pub fn write_migration_data(&self, data: &[u8]) -> Result<usize, Error> {
        let command = Command::MIG_DATA_WRITE;
        self.needs_extended(command)?;
        let data = data.get(..self.migration_piece()).unwrap_or(data);
        let head = length(size_of::<MigrationData>());
        let size = length(data.len());
        let payload = MigrationData { argsz: head.saturating_add(size), size };
        self.ask(command, &[payload.as_bytes(), data], &[], Expected::bytes(head))?;
        Ok(data.len())
    }

    /// Copies the stream of the device's current state (PRE_COPY or STOP_COPY) to `out`. Returns the number
    /// of bytes. Each message has a deadline of its own.
    ///
    /// # Errors
    /// When the server refuses or fails, or sends more than `most` bytes, or `out` cannot be written.
    pub fn save_migration_data(&self, out: &mut dyn Write, most: u64) -> Result<u64, Error> {
        let mut buffer = vec![0; self.migration_piece()];
        let mut total = 0_u64;
        loop {
            let count = self.read_migration_data(&mut buffer)?;
            total = total.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
            if total > most {
                let what = format!("its device's state has more than {most} bytes");
                return Err(self.error(Command::MIG_DATA_READ, Cause::Incompatible(what)));
            }
            out.write_all(buffer.get(..count).unwrap_or_default())
                .map_err(|source| self.error(Command::MIG_DATA_READ, Cause::Local(source)))?;
            if count < buffer.len() {
                return Ok(total);
            }
        }
    }

    /// Copies all of `from` to the device, which must be RESUMING. Returns the number of bytes. Each message
    /// has a deadline of its own. The server judges the data only when the device leaves RESUMING.
    ///
    /// # Errors
    /// When the server refuses or fails, or `from` cannot be read.
    pub fn load_migration_data(&self, from: &mut dyn Read) -> Result<u64, Error> {
        let mut buffer = vec![0; self.migration_piece()];
        let mut total = 0_u64;
        loop {
            let count = from
                .read(&mut buffer)
                .map_err(|source| self.error(Command::MIG_DATA_WRITE, Cause::Local(source)))?;
            if count == 0 {
                return Ok(total);
            }
            let mut rest = buffer.get(..count).unwrap_or_default();
            while !rest.is_empty() {
                let written = self.write_migration_data(rest)?;
                rest = rest.get(written..).unwrap_or_default();
            }
            total = total.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        }
    }

    /// The most bytes of state in one message.
    fn migration_piece(&self) -> usize {
        usize::try_from(self.version().agreed.max_data_xfer_size).unwrap_or(usize::MAX).max(1)
    }
}
