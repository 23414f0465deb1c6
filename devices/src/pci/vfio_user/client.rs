//! A server over vfio-user: asked what its function is, then for whatever the device wants of it.

use std::sync::{Arc, Mutex, MutexGuard};

use transport::memory::MemoryMap;
use transport::peer::Error;
use transport::vfio_user::{
    Client, ClientStats, IoFd, IoFdKind, IrqIndex, Receiver, RegionIndex, RegionInfo, Sharing,
};

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use super::areas;
use super::bars::BarShape;
use super::chain;
use super::contents::{COMMAND_OURS, Contents, MsixShape, Said, Unfit, register};
use super::link::Writes;
use super::pin::Look;
use super::remote::{Doorbell, Piece, Region, Remote, Reset};
use super::server::{CONFIG_REGION, Irq, Server, ServerError, ServerStats};
use crate::lock;
use crate::ports::WriteWidth;

/// What the user may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wishes {
    /// How BARs are written; by default posted where nothing of the BAR is memory of the guest, and the server can be
    /// told something while it asks us.
    pub writes: Option<Writes>,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The server failed.
    #[error(transparent)]
    Server(#[from] Error),
    /// It serves something else.
    #[error("vfio-user server {0} serves no PCI device")]
    NotPci(String),
    /// Its function cannot be shown to guests.
    #[error("the function that vfio-user server {0} serves cannot be shown to a guest")]
    Unfit(String, #[source] Unfit),
    /// There are no more descriptors.
    #[error("no descriptor can be had for vfio-user server {0}")]
    Duplicate(String, #[source] std::io::Error),
}

impl OpenError {
    /// What the user may try.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Server(error) => error.hint(),
            Self::NotPci(_) | Self::Unfit(..) => {
                Some("`outboard probe vfio-user SOCKET` shows what the server says of its device")
            }
            Self::Duplicate(..) => Some("raise the limit of open files (ulimit -n)"),
        }
    }
}

/// A server that was asked all, with guest memory shared.
pub struct Opened {
    /// Its function.
    pub remote: Arc<Remote>,
    /// What reads while nobody waits; to be served from now on.
    pub receiver: Receiver,
    /// Hangs up when the connection is gone.
    pub hang_up: OwnedFd,
}

/// Asks a server what its function is, and gives it guest memory. Waits for the server.
///
/// # Errors
/// When it fails, refuses, or serves what guests cannot be shown. Nothing stays mapped then: the connection ends.
pub fn open(client: Client, name: String, wishes: Wishes, memory: &MemoryMap) -> Result<Opened, OpenError> {
    let opened = ask(&client, name, wishes, memory);
    if opened.is_err() {
        client.shut_down();
    }
    opened
}

fn ask(client: &Client, name: String, wishes: Wishes, memory: &MemoryMap) -> Result<Opened, OpenError> {
    let peer = || client.peer().to_owned();
    let info = client.device_info()?;
    if !info.is_pci() || info.regions <= u32::from(CONFIG_REGION) {
        return Err(OpenError::NotPci(peer()));
    }
    let mut infos = Vec::new();
    for index in 0..6 {
        infos.push(client.region_info(RegionIndex(index))?);
    }
    let config = client.region_info(RegionIndex::CONFIG)?;
    let bytes = config_bytes(client, config.size)?;
    let mut interrupts = [0; 3];
    for (kind, count) in [IrqIndex::INTX, IrqIndex::MSI, IrqIndex::MSIX].into_iter().zip(&mut interrupts) {
        if kind.0 < info.irqs {
            *count = client.irq_info(kind)?.count;
        }
    }
    let mut bars = [0; 6];
    bars.iter_mut().zip(&infos).for_each(|(size, info)| *size = info.size);
    let said = Said { config: &bytes, bars: &bars, interrupts: &interrupts };
    let contents = Contents::judge(&said).map_err(|unfit| OpenError::Unfit(peer(), unfit))?;
    for oddity in &contents.oddities {
        log::warn!("device {name}: {oddity}");
    }
    quieten(client, &bytes, &contents)?;
    let sharing = if client.version().agreed.fds() == 0 { Sharing::Messages } else { Sharing::Descriptor };
    client.dma_map_all(memory, sharing)?;
    let mut regions = Vec::new();
    for (info, bar) in infos.into_iter().zip(&contents.bars) {
        regions.push(region(client, info, bar.as_ref(), contents.msix.as_ref(), wishes)?);
    }
    let regions = <[Region; 6]>::try_from(regions).unwrap_or_else(|_| std::array::from_fn(|_| absent()));
    let reset = if info.can_reset() { Reset::Offered } else { Reset::NotOffered };
    let receiver = client.receiver()?;
    let hang_up = client.hang_up()?;
    let turn = client.version().must_not_cross().then(Mutex::default);
    let session = Arc::new(Session { client: client.clone(), turn });
    let remote = Remote::new(name, session, contents, regions, reset)
        .map_err(|error| OpenError::Duplicate(peer(), error))?;
    Ok(Opened { remote: Arc::new(remote), receiver, hang_up })
}

/// Who was served before may have left the function at work, as some servers keep its configuration: it must not go on in
/// the memory that it is given now, nor hold on to a kind of interrupts that the guest, who sees all of them off, does not
/// want.
fn quieten(client: &Client, config: &[u8], contents: &Contents) -> Result<(), OpenError> {
    const MSI_ENABLE: u16 = 1;
    const MSIX_ENABLE: u16 = 1 << 15;
    let capabilities = [
        contents.msi.map(|msi| (u16::from(msi.at) + 2, MSI_ENABLE)),
        contents.msix.map(|msix| (u16::from(msix.at) + 2, MSIX_ENABLE)),
    ];
    let switches = [(register::COMMAND, COMMAND_OURS)].into_iter().chain(capabilities.into_iter().flatten());
    for (at, _) in switches.filter(|(at, bits)| chain::u16_at(config, *at).unwrap_or(0) & bits != 0) {
        match client.write(RegionIndex::CONFIG, at.into(), &[0, 0]) {
            Ok(()) => {}
            Err(error) if error.is_fatal() => return Err(error.into()),
            Err(error) => log::debug!("what was on stays on at {at:#x}: {error}"),
        }
    }
    Ok(())
}

/// The configuration space: the first 256 bytes, and of the rest what capability lists are made of. By naturally
/// aligned dwords, as some servers abort on anything else.
fn config_bytes(client: &Client, size: u64) -> Result<Vec<u8>, OpenError> {
    let size = match size {
        0x1000.. => 0x1000,
        0x100.. => 0x100,
        _ => {
            let size = usize::try_from(size).unwrap_or(usize::MAX);
            return Err(OpenError::Unfit(client.peer().to_owned(), Unfit::ConfigSize(size)));
        }
    };
    let mut bytes = vec![0; size];
    let (header, _) = bytes.split_at_mut(0x100);
    let mut pending = Vec::new();
    for (at, dword) in (0..).step_by(4).zip(header.chunks_mut(4)) {
        pending.push((client.begin_read(RegionIndex::CONFIG, at, 4)?, dword));
    }
    for (read, dword) in pending {
        read.wait(dword)?;
    }
    let mut next: u16 = if size > 0x100 { 0x100 } else { 0 };
    let (mut seen, begun) = (0, Instant::now());
    // No list has more members than that; what lies about it is judged afterwards. Nor is a server that makes one last
    // listened to for long: what was not read is cut off.
    while (0x100..0x1000).contains(&next)
        && next.is_multiple_of(4)
        && seen < 960
        && begun.elapsed() < client.limit()
    {
        let at = usize::from(next);
        let Some(dword) = bytes.get_mut(at..at + 4) else { break };
        match client.read(RegionIndex::CONFIG, next.into(), dword) {
            Ok(()) => {}
            Err(error) if error.is_fatal() => return Err(error.into()),
            Err(error) => {
                log::debug!("no extended configuration space: {error}");
                break;
            }
        }
        let header = chain::u32_at(&bytes, next).filter(|header| *header != u32::MAX).unwrap_or(0);
        next = u16::try_from(header >> 20).unwrap_or(0);
        seen += 1;
    }
    Ok(bytes)
}

fn absent() -> Region {
    Region {
        readable: false,
        writable: false,
        file: None,
        pieces: Vec::new(),
        doorbells: Vec::new(),
        writes: Writes::Answered,
    }
}

fn region(
    client: &Client,
    info: RegionInfo,
    bar: Option<&BarShape>,
    msix: Option<&MsixShape>,
    wishes: Wishes,
) -> Result<Region, OpenError> {
    let Some(bar) = bar else { return Ok(absent()) };
    let listed: Vec<_> = info.areas.iter().map(|area| (area.offset, area.size)).collect();
    let pieces: Vec<_> = areas::mappable(bar, &listed, msix)
        .into_iter()
        .map(|piece| Piece {
            offset: piece.start,
            size: piece.end - piece.start,
            file_offset: info.offset.saturating_add(piece.start),
        })
        .collect();
    let fds = match client.region_io_fds(&info) {
        Ok(fds) => fds,
        Err(error) if error.is_fatal() => return Err(error.into()),
        Err(error) => {
            log::debug!("{}: {error}", bar.index);
            Vec::new()
        }
    };
    let mut doorbells = Vec::new();
    for fd in &fds {
        let kept = doorbell(fd).transpose();
        doorbells.extend(kept.map_err(|error| OpenError::Duplicate(client.peer().to_owned(), error))?);
    }
    let posted = pieces.is_empty() && !client.version().must_not_cross();
    let default = if posted { Writes::Posted } else { Writes::Answered };
    Ok(Region {
        readable: info.is_readable(),
        writable: info.is_writable(),
        file: info.fd.map(Arc::new),
        pieces,
        doorbells,
        writes: wishes.writes.unwrap_or(default),
    })
}

/// A doorbell that the kernel can ring without us: one whose value is not wanted.
fn doorbell(fd: &IoFd) -> Option<std::io::Result<Doorbell>> {
    if fd.place.kind != IoFdKind::Ioeventfd {
        return None;
    }
    let value = fd.place.value();
    let width = match fd.place.size {
        0 if value.is_none() => WriteWidth::Any,
        1 => WriteWidth::One,
        2 => WriteWidth::Two,
        4 => WriteWidth::Four,
        8 => WriteWidth::Eight,
        _ => return None,
    };
    let bell = |fd_| Doorbell { offset: fd.place.offset, width, value, fd: fd_ };
    Some(fd.fd.try_clone().map(bell))
}

/// Of the status register: the device asserts its pin.
const INTERRUPT_STATUS: u8 = 1 << 3;

/// One connection.
struct Session {
    client: Client,
    /// Who asks, where nothing may be asked while an answer is due: the server may have something to ask meanwhile, and
    /// takes what comes for our reply. Held for one exchange.
    turn: Option<Mutex<()>>,
}

impl Session {
    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.turn.as_ref().map(lock)
    }
}

fn sort(error: Error) -> ServerError {
    if error.is_fatal() { ServerError::Lost(error.into()) } else { ServerError::Refused(error.into()) }
}

fn index(kind: Irq) -> IrqIndex {
    match kind {
        Irq::Intx => IrqIndex::INTX,
        Irq::Msi => IrqIndex::MSI,
        Irq::MsiX => IrqIndex::MSIX,
    }
}

impl Server for Session {
    fn read(&self, region: u8, offset: u64, data: &mut [u8]) -> Result<(), ServerError> {
        let _turn = self.turn();
        self.client.read(RegionIndex(region.into()), offset, data).map_err(sort)
    }

    fn write(&self, region: u8, offset: u64, data: &[u8]) -> Result<(), ServerError> {
        let _turn = self.turn();
        self.client.write(RegionIndex(region.into()), offset, data).map_err(sort)
    }

    fn post(&self, region: u8, offset: u64, data: &[u8]) -> Result<(), ServerError> {
        let _turn = self.turn();
        self.client.post_write(RegionIndex(region.into()), offset, data).map_err(sort)
    }

    fn arm(&self, kind: Irq, calls: &[BorrowedFd<'_>]) -> Result<(), ServerError> {
        let _turn = self.turn();
        self.client.arm_irqs(index(kind), calls).map_err(sort)
    }

    fn disarm(&self, kind: Irq) -> Result<(), ServerError> {
        let _turn = self.turn();
        self.client.disable_irqs(index(kind)).map_err(sort)
    }

    fn unmask_pin(&self, look: Look) -> Result<(), ServerError> {
        // Nobody may wait for a turn here. Every server is told, whether or not it said that it masks its pin (no library
        // says it): one that does would never raise it again.
        let pin = IrqIndex::INTX;
        // Those of version 0.0 are not on libvfio-user, and raise it again by themselves: the guest would be interrupted
        // twice.
        if !self.client.version().is_extended() {
            return self.client.unmask_irqs_then(pin, 0, 1, move || drop(look)).map_err(sort);
        }
        self.client.unmask_irqs_then(pin, 0, 1, || ()).map_err(sort)?;
        // libvfio-user does nothing then, and signals a level that stays as it is once. Where the device keeps it, the
        // status register tells. Some servers abort on anything but aligned dwords.
        let told = move |dword: &[u8]| {
            if dword.get(2).is_some_and(|status| status & INTERRUPT_STATUS != 0) {
                look.asserted();
            }
        };
        self.client.read_then(RegionIndex::CONFIG, register::COMMAND.into(), 4, told).map_err(sort)
    }

    fn reset(&self) -> Result<(), ServerError> {
        let _turn = self.turn();
        self.client.reset().map_err(sort)
    }

    fn shut_down(&self) {
        self.client.shut_down();
    }

    fn stats(&self) -> ServerStats {
        let ClientStats { exchanges, posted, .. } = self.client.stats();
        ServerStats {
            messages: exchanges.sent.saturating_add(posted),
            waits: exchanges.answers.saturating_add(exchanges.failures),
            worst_wait: exchanges.worst_wait,
        }
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
