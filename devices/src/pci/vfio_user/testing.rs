//! For tests: a server that follows a script.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use transport::peer::deadline::Deadline;

use super::VfioUserDevice;
use super::function::{FunctionShape, Said};
use super::pin::Look;
use super::server::{CONFIG_REGION, Irq, Server, ServerError, ServerStats, Writes};
use super::survey::{Piece, Region, Reset};
use crate::lock;

/// How every request ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) enum Mood {
    #[default]
    Works,
    Refuses,
    Lost,
    /// It closes the connection.
    Closes,
    /// It takes this long for each request.
    Slow(Duration),
}

#[derive(Default)]
pub(crate) struct Script {
    pub(crate) calls: Vec<String>,
    pub(crate) mood: Mood,
    pub(crate) config: Vec<u8>,
    /// The kind of interrupts that is armed, and its eventfds.
    pub(crate) armed: Option<(Irq, Vec<OwnedFd>)>,
    /// Its process has ended.
    pub(crate) is_dead: bool,
}

#[derive(Clone, Default)]
pub(crate) struct Scripted(pub(crate) Arc<Mutex<Script>>);

impl Scripted {
    pub(crate) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.0).calls)
    }

    pub(crate) fn mood(&self, mood: Mood) {
        lock(&self.0).mood = mood;
    }

    /// The device raises an interrupt.
    pub(crate) fn signal(&self, vector: usize) {
        let script = lock(&self.0);
        let (_, calls) = script.armed.as_ref().unwrap();
        rustix::io::write(&calls[vector], &1_u64.to_ne_bytes()).unwrap();
    }

    fn note(&self, call: String) -> Result<(), ServerError> {
        let mut script = lock(&self.0);
        script.calls.push(call);
        match script.mood {
            Mood::Works => Ok(()),
            Mood::Refuses => Err(ServerError::Refused("it says no".into())),
            Mood::Lost => Err(ServerError::Lost("it is silent".into())),
            Mood::Closes => Err(ServerError::Closed("it closed the connection".into())),
            Mood::Slow(time) => {
                drop(script);
                std::thread::sleep(time);
                Ok(())
            }
        }
    }
}

impl Server for Scripted {
    fn limit(&self) -> Duration {
        Duration::from_millis(500)
    }

    fn is_alive(&self) -> bool {
        !lock(&self.0).is_dead
    }

    fn read(&self, region: u8, offset: u64, data: &mut [u8], _: &Deadline) -> Result<(), ServerError> {
        self.note(format!("read {region}+{offset:x} {}", data.len()))?;
        if region == CONFIG_REGION {
            let at = usize::try_from(offset).unwrap();
            data.copy_from_slice(&lock(&self.0).config[at..at + data.len()]);
        } else {
            data.fill(0xa0 + region);
        }
        Ok(())
    }

    fn write(&self, region: u8, offset: u64, data: &[u8], _: &Deadline) -> Result<(), ServerError> {
        self.note(format!("write {region}+{offset:x} {data:02x?}"))
    }

    fn post(&self, region: u8, offset: u64, data: &[u8], _: &Deadline) -> Result<(), ServerError> {
        self.note(format!("post {region}+{offset:x} {data:02x?}"))
    }

    fn arm(&self, kind: Irq, calls: &[BorrowedFd<'_>], _: &Deadline) -> Result<(), ServerError> {
        self.note(format!("arm {kind:?} {}", calls.len()))?;
        let calls = calls.iter().map(|call| call.try_clone_to_owned().unwrap()).collect();
        lock(&self.0).armed = Some((kind, calls));
        Ok(())
    }

    fn disarm(&self, kind: Irq, _: &Deadline) -> Result<(), ServerError> {
        self.note(format!("disarm {kind:?}"))?;
        lock(&self.0).armed = None;
        Ok(())
    }

    fn unmask_pin(&self, _: Look) -> Result<(), ServerError> {
        self.note("unmask".into())
    }

    fn reset(&self, _: &Deadline) -> Result<(), ServerError> {
        self.note("reset".into())
    }

    fn shut_down(&self) {
        lock(&self.0).calls.push("shut down".into());
    }

    fn stats(&self) -> ServerStats {
        ServerStats::default()
    }
}

/// A function with these parts, changed by `change`:
/// - BAR 0 of 0x20 bytes, all of it answered by the server;
/// - BAR 2 of 0x4000 bytes, mapped from 0x1000 to 0x3000;
/// - four MSI-X vectors in BAR 4;
/// - MSI with two vectors;
/// - a pin;
/// - a function-level reset.
pub(crate) fn device_with(server: &Scripted, change: impl FnOnce(&mut [u8])) -> Arc<VfioUserDevice> {
    let mut config = vec![0; 0x100];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x34, 0x12, 0x78, 0x56]);
    put(6, &[0x10]);
    put(0x18, &[0x0c]);
    put(0x34, &[0x40]);
    put(0x3d, &[1]);
    put(0x40, &[0x11, 0x50, 3, 0, 4, 0, 0, 0, 4, 0x08, 0, 0]);
    put(0x50, &[0x05, 0x70, 0x82, 0x00]);
    put(0x70, &[0x10, 0x00, 0x02, 0x00, 0, 0, 0, 0x10]);
    let bars = [0x20, 0, 0x4000, 0, 0x1000, 0];
    change(&mut config);
    let shape = FunctionShape::judge(&Said { config: &config, bars: &bars, interrupts: &[1, 2, 4] }).unwrap();
    lock(&server.0).config = config;
    let file = rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = Arc::new(file);
    let regions = std::array::from_fn(|index| {
        let mapped = index == 2;
        let piece = Piece { offset: 0x1000, size: 0x2000, file_offset: 0x5000 };
        Region {
            readable: true,
            writable: true,
            file: mapped.then(|| Arc::clone(&file)),
            pieces: if mapped { vec![piece] } else { Vec::new() },
            doorbells: Vec::new(),
            writes: if mapped { Writes::Answered } else { Writes::Posted },
        }
    });
    let server = Arc::new(server.clone());
    VfioUserDevice::new("engine".into(), server, shape, regions, Reset::Used).unwrap()
}
