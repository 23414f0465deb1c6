//! For tests: ports that record what is registered, and a backend that follows a script.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

use transport::memory::{GuestAddr, MemoryAccess, MemoryMap, SharedRegion};
use transport::vhost_user::features::DeviceFeatures;
use transport::vhost_user::vring::RingBase;
use transport::vhost_user::{InflightArea, IovaMap, LiveSession, Session};

use crate::lock;
use crate::ports::{
    Access, DeviceMemory, Doorbells, FileRange, Guard, Interrupts, OnVanished, PortError, Ports,
    RegisterPage, Route, WriteMatch,
};
use crate::virtio::backend::{Backend, BackendError, BackendStats, MemoryChange, Start, Stop};
use crate::virtio::types::model::{ConfigSource, Model};
use crate::virtio::types::table::DeviceType;

/// The size of the tests' guest RAM: one region from address 0.
pub(crate) const RAM: u64 = 0x40_0000;

pub(crate) fn memory() -> MemoryMap {
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, RAM).unwrap();
    MemoryMap::new(vec![SharedRegion::new(GuestAddr(0), RAM, Arc::new(fd), 0)]).unwrap()
}

/// Guest RAM whose file can be neither read nor written, so that all accesses go through its access
/// functions. The file of huge pages cannot be written either.
pub(crate) fn memory_without_a_file() -> MemoryMap {
    let fd = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
    let bytes = vec![0; usize::try_from(RAM).unwrap()];
    let region = SharedRegion::new(GuestAddr(0), RAM, fd, 0).with_access(Arc::new(Bytes(Mutex::new(bytes))));
    MemoryMap::new(vec![region]).unwrap()
}

#[derive(Debug)]
struct Bytes(Mutex<Vec<u8>>);

impl MemoryAccess for Bytes {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        data.copy_from_slice(&lock(&self.0)[at..at + data.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        lock(&self.0)[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn store_index(&self, offset: u64, index: u16) -> io::Result<()> {
        self.write(offset, &index.to_le_bytes())
    }
}

/// A disk with `queues` queues and the configuration 1, 2, 3, …
pub(crate) fn disk(queues: u16) -> Model {
    Model {
        device_type: DeviceType::named("blk").unwrap(),
        features: DeviceFeatures::from_bits(1 << 32 | 1 << 9),
        queues,
        queue_size: 256,
        config: (1..=60).collect(),
        config_source: ConfigSource::Backend,
        shared_memory: vec![],
    }
}

/// A piece of a peer's file that the guest sees: its guest address, its offset in the file, its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Shown {
    pub(crate) at: GuestAddr,
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) read_only: bool,
}

/// Doorbells and interrupts hold descriptors of their own, as KVM does.
#[derive(Default)]
struct Registered {
    doorbells: Vec<(WriteMatch, OwnedFd)>,
    routes: BTreeMap<i32, (Route, OwnedFd)>,
    /// Level-triggered lines: GSI, the eventfd that raises the line, the eventfd that the end of interrupt
    /// signals.
    levels: Vec<(u32, OwnedFd, OwnedFd)>,
    shown: Vec<(Shown, OnVanished)>,
    refuse_doorbell: Option<WriteMatch>,
    refuse_routes: bool,
    refuse_maps: bool,
}

/// Ports that remember what is registered now.
#[derive(Clone, Default)]
pub(crate) struct Recorder {
    now: Arc<Mutex<Registered>>,
    page: Arc<Page>,
}

#[derive(Default)]
struct Page {
    bytes: Mutex<Vec<u8>>,
    generations: Mutex<Vec<u32>>,
}

// PCI devices, which use all of it, are still to come.
#[allow(dead_code)]
impl Recorder {
    pub(crate) fn ports(&self) -> Ports {
        let all = Arc::new(self.clone());
        Ports { doorbells: all.clone(), interrupts: all.clone(), memory: all }
    }

    pub(crate) fn doorbells(&self) -> Vec<WriteMatch> {
        let mut doorbells: Vec<_> = lock(&self.now).doorbells.iter().map(|(when, _)| *when).collect();
        doorbells.sort_unstable();
        doorbells
    }

    /// The pieces of peers' files that the guest sees, by address.
    pub(crate) fn shown(&self) -> Vec<Shown> {
        let mut shown: Vec<_> = lock(&self.now).shown.iter().map(|(shown, _)| *shown).collect();
        shown.sort_unstable();
        shown
    }

    /// The peer makes its files shorter: every piece vanishes from the guest.
    pub(crate) fn vanish_all(&self) {
        let gone = std::mem::take(&mut lock(&self.now).shown);
        gone.iter().for_each(|(_, vanished)| vanished());
    }

    /// The lines that were raised, and how often since the last call. Takes the signals.
    pub(crate) fn take_raised(&self) -> Vec<(u32, u64)> {
        let take = |(gsi, call, _): &(u32, OwnedFd, OwnedFd)| (*gsi, take(call));
        lock(&self.now).levels.iter().map(take).collect()
    }

    /// The guest ends an interrupt on this line.
    pub(crate) fn end_of_interrupt(&self, gsi: u32) {
        for (_, _, resample) in lock(&self.now).levels.iter().filter(|(line, _, _)| *line == gsi) {
            rustix::io::write(resample, &1_u64.to_ne_bytes()).unwrap();
        }
    }

    pub(crate) fn routes(&self) -> Vec<Route> {
        lock(&self.now).routes.values().map(|(route, _)| *route).collect()
    }

    /// A write by the guest. Returns whether it signals a doorbell.
    pub(crate) fn guest_writes(&self, address: u64, value: u32) -> bool {
        let exact = WriteMatch::register(GuestAddr(address), value);
        let any = WriteMatch::anything(GuestAddr(address));
        let now = lock(&self.now);
        let bound = now.doorbells.iter().find(|(bound, _)| [exact, any].contains(bound));
        let Some((_, fd)) = bound else { return false };
        rustix::io::write(fd, &1_u64.to_ne_bytes()).unwrap();
        true
    }

    /// Takes the interrupts that the guest got since the last time.
    pub(crate) fn take_interrupts(&self) -> u64 {
        lock(&self.now).routes.values().map(|(_, fd)| take(fd)).sum()
    }

    pub(crate) fn refuse_doorbell(&self, when: WriteMatch) {
        lock(&self.now).refuse_doorbell = Some(when);
    }

    /// From now on maps are refused, as for a file that is read-only or of a kind that is not mapped.
    pub(crate) fn refuse_maps(&self) {
        lock(&self.now).refuse_maps = true;
    }

    pub(crate) fn refuse_routes(&self) {
        lock(&self.now).refuse_routes = true;
    }

    pub(crate) fn accept_routes(&self) {
        lock(&self.now).refuse_routes = false;
    }

    /// The value that the guest reads in a register page, without an exit.
    pub(crate) fn page_u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.page_bytes(offset, 4).try_into().unwrap())
    }

    pub(crate) fn page_bytes(&self, offset: usize, length: usize) -> Vec<u8> {
        lock(&self.page.bytes)[offset..offset + length].to_vec()
    }

    /// The values that the generation register had, in order.
    pub(crate) fn generations(&self) -> Vec<u32> {
        let mut seen = lock(&self.page.generations).clone();
        seen.dedup();
        seen
    }
}

/// Reads the count of an eventfd, which is 0 afterwards.
fn take(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(fd, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

fn refusal() -> PortError {
    PortError::new("do that in a test", io::ErrorKind::OutOfMemory.into())
}

impl Doorbells for Recorder {
    fn bind(&self, fd: BorrowedFd<'_>, when: WriteMatch) -> Result<Guard, PortError> {
        let mut now = lock(&self.now);
        if now.refuse_doorbell == Some(when) || now.doorbells.iter().any(|(bound, _)| *bound == when) {
            return Err(refusal());
        }
        now.doorbells.push((when, fd.try_clone_to_owned().unwrap()));
        let undo = Arc::clone(&self.now);
        Ok(Guard::on_drop(move || lock(&undo).doorbells.retain(|(other, _)| *other != when)))
    }
}

impl Interrupts for Recorder {
    fn attach(&self, call: BorrowedFd<'_>, route: Route) -> Result<Guard, PortError> {
        let mut now = lock(&self.now);
        let fd = call.as_raw_fd();
        if now.refuse_routes || now.routes.contains_key(&fd) {
            return Err(refusal());
        }
        now.routes.insert(fd, (route, call.try_clone_to_owned().unwrap()));
        let undo = Arc::clone(&self.now);
        Ok(Guard::on_drop(move || {
            lock(&undo).routes.remove(&fd);
        }))
    }

    fn attach_level(
        &self,
        call: BorrowedFd<'_>,
        gsi: u32,
        resample: BorrowedFd<'_>,
    ) -> Result<Guard, PortError> {
        let mut now = lock(&self.now);
        if now.refuse_routes {
            return Err(refusal());
        }
        let (call, resample) = (call.try_clone_to_owned().unwrap(), resample.try_clone_to_owned().unwrap());
        let id = call.as_raw_fd();
        now.levels.push((gsi, call, resample));
        let undo = Arc::clone(&self.now);
        Ok(Guard::on_drop(move || lock(&undo).levels.retain(|(_, call, _)| call.as_raw_fd() != id)))
    }
}

impl DeviceMemory for Recorder {
    fn register_page(&self, _: GuestAddr) -> Result<Arc<dyn RegisterPage>, PortError> {
        *lock(&self.page.bytes) = vec![0; 4096];
        Ok(self.page.clone())
    }

    fn map(
        &self,
        piece: &FileRange,
        at: GuestAddr,
        access: Access,
        vanished: OnVanished,
    ) -> Result<Guard, PortError> {
        let shown =
            Shown { at, offset: piece.offset, size: piece.size, read_only: access == Access::ReadOnly };
        let mut now = lock(&self.now);
        let overlaps = |(other, _): &(Shown, OnVanished)| {
            at.0 < other.at.0 + other.size && other.at.0 < at.0 + piece.size
        };
        let unaligned = !(at.0 | piece.offset | piece.size).is_multiple_of(4096) || piece.size == 0;
        if unaligned || now.refuse_maps || now.shown.iter().any(overlaps) {
            return Err(refusal());
        }
        now.shown.push((shown, vanished));
        let undo = Arc::clone(&self.now);
        Ok(Guard::on_drop(move || lock(&undo).shown.retain(|(other, _)| *other != shown)))
    }
}

impl RegisterPage for Page {
    fn store(&self, offset: u16, value: u32) {
        if offset == 0xfc {
            lock(&self.generations).push(value);
        }
        self.store_bytes(offset, &value.to_le_bytes());
    }

    fn store_bytes(&self, offset: u16, bytes: &[u8]) {
        let offset = usize::from(offset);
        lock(&self.bytes)[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

/// How a scripted call ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) enum Outcome {
    #[default]
    Works,
    Refused,
    Lost,
}

/// What a backend saw, and how it answers.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) calls: Vec<String>,
    pub(crate) on_start: Outcome,
    pub(crate) on_stop: Outcome,
    pub(crate) on_read: Outcome,
    pub(crate) on_write: Outcome,
    pub(crate) config: Vec<u8>,
    /// The positions of its queues when they stop.
    pub(crate) bases: Vec<RingBase>,
    /// It has closed the connection without an answer.
    pub(crate) hung_up: bool,
    /// A start waits until a message comes here.
    pub(crate) hold_start: Option<Receiver<()>>,
    /// Read in every call, to note what the machine had registered at that moment.
    pub(crate) watch: Option<Recorder>,
}

/// A backend that follows a script.
#[derive(Clone, Default)]
pub(crate) struct Scripted(pub(crate) Arc<Mutex<Script>>);

impl Scripted {
    pub(crate) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.0).calls)
    }

    fn note(&self, call: String, outcome: impl FnOnce(&Script) -> Outcome) -> Result<(), BackendError> {
        let mut script = lock(&self.0);
        let doorbells = script.watch.as_ref().map(|watch| format!(" [{}]", watch.doorbells().len()));
        script.calls.push(format!("{call}{}", doorbells.unwrap_or_default()));
        match outcome(&script) {
            Outcome::Works => Ok(()),
            Outcome::Refused => Err(BackendError::Refused("scripted".into())),
            Outcome::Lost => Err(BackendError::Lost("scripted".into())),
        }
    }
}

impl Backend for Scripted {
    fn start(&mut self, start: &Start<'_>) -> Result<Option<Arc<InflightArea>>, BackendError> {
        let rings: Vec<String> = start
            .rings
            .iter()
            .map(|r| {
                let base = if r.base.0 == 0 { String::new() } else { format!("+{:x}", r.base.0) };
                let (desc, avail, used) = (r.descriptor.0, r.available.0, r.used.0);
                format!("{}:{}@{desc:x},{avail:x},{used:x}{base}", r.index, r.size)
            })
            .collect();
        let gate = lock(&self.0).hold_start.take();
        if let Some(gate) = gate {
            gate.recv().unwrap();
        }
        self.note(format!("start {:x} {}", start.features.bits(), rings.join(" ")), |s| s.on_start)?;
        Ok(None)
    }

    fn has_hung_up(&self) -> bool {
        lock(&self.0).hung_up
    }

    fn stop(&mut self, how: Stop) -> Result<Vec<RingBase>, BackendError> {
        let word = match how {
            Stop::Reset => "stop",
            Stop::Drain => "drain",
            Stop::Suspend => "suspend",
        };
        self.note(word.into(), |s| s.on_stop)?;
        Ok(lock(&self.0).bases.clone())
    }

    fn config(&mut self, written: Option<(u32, &[u8])>) -> Result<Vec<u8>, BackendError> {
        if let Some((offset, bytes)) = written {
            self.note(format!("write {offset} {bytes:?}"), |s| s.on_write)?;
        }
        self.note("read".into(), |s| s.on_read)?;
        Ok(lock(&self.0).config.clone())
    }

    fn change_memory(&mut self, _: &MemoryMap) -> Result<MemoryChange, BackendError> {
        Ok(MemoryChange::NeedsRestart)
    }

    fn live(&mut self) -> Result<&mut LiveSession, BackendError> {
        Err(BackendError::Refused("scripted".into()))
    }

    fn standing(&mut self) -> Result<&mut Session, BackendError> {
        Err(BackendError::Refused("scripted".into()))
    }

    fn translations(&self) -> Option<&IovaMap> {
        None
    }

    fn notifies_in_band(&self) -> bool {
        false
    }

    fn takes_inflight(&self) -> bool {
        false
    }

    fn disconnect(&mut self) {
        lock(&self.0).calls.push("disconnect".into());
    }

    fn stats(&self) -> BackendStats {
        BackendStats::default()
    }
}
