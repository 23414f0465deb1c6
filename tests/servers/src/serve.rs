//! A device and the crate's server: one client after another, and a thread that works while no message comes.
//!
//! Locks: the device's, held for one message or one round of work. A device that sends messages of its own
//! waits for their answers with the lock held; whoever receives those answers must not take it.

use std::fs::File;
use std::io::Result;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use vfio_user::{DmaMapFlags, DmaUnmapFlags, Error, IrqInfo, Server, ServerBackend, ServerRegion};

use crate::front;
use crate::guest_memory::GuestMemory;
use crate::interrupts::Interrupts;
use crate::options::{Common, Wire};

/// What became of a round of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There was work, and there may be more.
    Busy,
    /// There was none, but the guest may bring some without a message.
    Idle,
    /// There is none before the next message.
    Asleep,
}

/// A device, as the protocol sees it.
pub trait Device: Send {
    /// What GET_REGION_INFO answers.
    fn regions(&self) -> Vec<ServerRegion>;

    /// What GET_IRQ_INFO answers.
    fn irqs(&self) -> Vec<IrqInfo>;

    /// REGION_READ.
    ///
    /// # Errors
    /// The client is told that it failed.
    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<()>;

    /// REGION_WRITE.
    ///
    /// # Errors
    /// The client is told that it failed, even of a posted write: so does the crate.
    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<()>;

    /// DEVICE_RESET.
    fn reset(&mut self);

    /// Where DMA goes.
    fn memory(&mut self) -> &mut GuestMemory;

    /// Who listens to interrupts.
    fn interrupts(&mut self) -> &mut Interrupts;

    /// Does some work.
    fn poll(&mut self) -> Progress;

    /// Which writes may come as a signal alone (GET_REGION_IO_FDS).
    fn io_events(&self) -> Vec<IoEvent> {
        Vec::new()
    }

    /// The write of this number in [`Device::io_events`] came so often.
    fn doorbell(&mut self, _number: u64, _times: u64) {}
}

/// A write that the client's kernel may turn into the signal of an eventfd.
#[derive(Clone, Copy, Debug)]
pub struct IoEvent {
    /// Which region.
    pub region: u32,
    /// Where in it.
    pub offset: u64,
    /// Bytes written.
    pub size: u64,
    /// Only this value; otherwise every one.
    pub value: Option<u64>,
}

/// A device between the protocol's thread and the worker's.
#[derive(Debug)]
pub struct Shared<D> {
    device: Arc<(Mutex<D>, Condvar)>,
}

impl<D> Clone for Shared<D> {
    fn clone(&self) -> Self {
        Self { device: Arc::clone(&self.device) }
    }
}

impl<D: Device> Shared<D> {
    /// Shares it.
    #[must_use]
    pub fn new(device: D) -> Self {
        Self { device: Arc::new((Mutex::new(device), Condvar::new())) }
    }

    /// The device; may wait for a round of work.
    pub fn lock(&self) -> MutexGuard<'_, D> {
        self.device.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the worker: there may be work.
    pub fn wake(&self) {
        self.device.1.notify_all();
    }

    /// Works for ever. Looks often while there is work, and once in a millisecond when there has long been
    /// none.
    fn work(&self) {
        let mut idle: u32 = 0;
        let mut device = self.lock();
        loop {
            let pause = match device.poll() {
                Progress::Busy => {
                    idle = 0;
                    drop(device);
                    thread::yield_now();
                    device = self.lock();
                    continue;
                }
                Progress::Idle => {
                    idle = idle.saturating_add(1);
                    match idle {
                        0..40 => Duration::from_micros(50),
                        40..400 => Duration::from_micros(250),
                        _ => Duration::from_millis(1),
                    }
                }
                Progress::Asleep => Duration::from_secs(60),
            };
            device = match self.device.1.wait_timeout(device, pause) {
                Ok((device, _)) => device,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    fn disconnected(&self) {
        let mut device = self.lock();
        device.reset();
        device.memory().set_messages(None);
        device.memory().clear();
        device.interrupts().clear();
    }
}

impl<D: Device> ServerBackend for Shared<D> {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        self.lock().read(region, offset, data)
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let done = self.lock().write(region, offset, data);
        self.wake();
        done
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> Result<()> {
        log::debug!("map {address:#x}+{size:#x} {flags:?} from {fd:?} at {offset:#x}");
        self.lock().memory().map(flags, offset, address, size, fd)
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> Result<()> {
        log::debug!("unmap {address:#x}+{size:#x} {flags:?}");
        if flags.contains(DmaUnmapFlags::UNMAP_ALL) {
            self.lock().memory().clear();
            return Ok(());
        }
        self.lock().memory().unmap(address, size)
    }

    fn reset(&mut self) -> Result<()> {
        self.lock().reset();
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) -> Result<()> {
        log::debug!("interrupts {index}: flags {flags:#x}, {start}+{count}, {} descriptors", fds.len());
        self.lock().interrupts().set(index, flags, start, count, fds)
    }
}

/// Serves one client after another.
///
/// # Errors
/// When there is no listening on the socket.
pub fn serve<D: Device + 'static>(shared: &Shared<D>, common: &Common) -> std::result::Result<(), Error> {
    let (regions, irqs) = {
        let device = shared.lock();
        (device.regions(), device.irqs())
    };
    let server = match common.wire {
        Wire::Plain => Server::new(&common.socket, true, irqs, regions)?,
        Wire::Extended => front::listen(shared, common, irqs, regions).map_err(Error::SocketBind)?,
    };
    let worker = shared.clone();
    thread::spawn(move || worker.work());
    loop {
        let mut backend = shared.clone();
        match server.run(&mut backend) {
            Ok(()) => log::info!("the client has gone"),
            Err(error) => log::warn!("the client is lost: {error}"),
        }
        shared.disconnected();
        if common.once {
            return Ok(());
        }
    }
}
