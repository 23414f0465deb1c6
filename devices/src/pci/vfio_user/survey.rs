//! Asks a vfio-user server what its function is, and gives the server guest memory. Must never show guests
//! what [`FunctionShape::judge`] refused.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use transport::memory::MemoryMap;
use transport::peer::Error;
use transport::vfio_user::{Client, IoFd, IoFdKind, IrqIndex, Receiver, RegionIndex, RegionInfo, Sharing};

use super::bars::{self, BarShape};
use super::capabilities::{u16_at, u32_at};
use super::function::{COMMAND_OURS, FunctionShape, MsixShape, Said, Unfit};
use super::server::{CONFIG_REGION, Server, Writes};
use super::session::Session;
use crate::pci::config_space::offset;
use crate::ports::WriteWidth;

/// What the user may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wishes {
    /// How BARs are written. The default is posted, if no part of the BAR is mapped into the guest and the
    /// server accepts messages while it waits for our reply to a request of its own.
    pub writes: Option<Writes>,
    /// Whether the server is asked to reset the device. The default is what the server says that it can.
    pub reset: Option<Reset>,
}

/// Whether DEVICE_RESET is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reset {
    /// At each boot, and at the end.
    Used,
    /// Never.
    Unused,
}

/// A part of a region that may be mapped into the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins in the region.
    pub offset: u64,
    /// Its length in bytes.
    pub size: u64,
    /// Where it begins in the region's file.
    pub file_offset: u64,
}

/// A write of the guest that the server learns of by an eventfd.
#[derive(Debug)]
pub struct Doorbell {
    /// The offset in the region.
    pub offset: u64,
    /// The width of the write.
    pub width: WriteWidth,
    /// The value that is written; `None` matches every value.
    pub value: Option<u64>,
    /// The eventfd that is signalled.
    pub fd: OwnedFd,
}

/// The region behind a BAR. By default nothing is behind it.
#[derive(Debug)]
pub struct Region {
    /// The server answers reads.
    pub readable: bool,
    /// The server takes writes.
    pub writable: bool,
    /// The file that `pieces` are parts of.
    pub file: Option<Arc<OwnedFd>>,
    /// The parts that may be mapped into the guest.
    pub pieces: Vec<Piece>,
    /// Its doorbells.
    pub doorbells: Vec<Doorbell>,
    /// Whether writes wait for the server's answer.
    pub writes: Writes,
}

impl Default for Region {
    fn default() -> Self {
        let (pieces, doorbells) = (Vec::new(), Vec::new());
        Self { readable: false, writable: false, file: None, pieces, doorbells, writes: Writes::Answered }
    }
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The server failed.
    #[error(transparent)]
    Server(#[from] Error),
    /// The server serves something other than a PCI device.
    #[error("vfio-user server {0} serves no PCI device")]
    NotPci(String),
    /// Its function cannot be shown to guests.
    #[error("the function that vfio-user server {0} serves cannot be shown to a guest")]
    Unfit(String, #[source] Unfit),
    /// The process has no descriptor left.
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

/// A server that has answered all questions and shares guest memory.
pub struct Surveyed {
    /// The server.
    pub server: Arc<dyn Server>,
    /// What its function is.
    pub shape: FunctionShape,
    /// The regions behind its BARs.
    pub regions: [Region; 6],
    /// Whether the server is asked to reset the device.
    pub reset: Reset,
    /// The reader of messages that no caller waits for. The owner has to serve it from now on.
    pub receiver: Receiver,
    /// A descriptor that hangs up when the connection is gone.
    pub hang_up: OwnedFd,
}

/// Asks a server what its function is, and gives the server guest memory. Waits for the server.
///
/// # Errors
/// When the server fails or refuses, or its function cannot be shown to guests. The connection then ends, so
/// nothing stays mapped.
pub fn survey(client: Client, wishes: Wishes, memory: &MemoryMap) -> Result<Surveyed, OpenError> {
    let surveyed = ask(&client, wishes, memory);
    if surveyed.is_err() {
        client.shut_down();
    }
    surveyed
}

fn ask(client: &Client, wishes: Wishes, memory: &MemoryMap) -> Result<Surveyed, OpenError> {
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
    let shape = FunctionShape::judge(&said).map_err(|unfit| OpenError::Unfit(peer(), unfit))?;
    quieten(client, &bytes, &shape)?;
    let sharing = if client.version().agreed.fds() == 0 { Sharing::Messages } else { Sharing::Descriptor };
    client.dma_map_all(memory, sharing)?;
    let mut regions: [Region; 6] = Default::default();
    for ((region, info), bar) in regions.iter_mut().zip(infos).zip(&shape.bars) {
        if let Some(bar) = bar {
            *region = behind(client, info, bar, shape.msix.as_ref(), wishes)?;
        }
    }
    let offered = if info.can_reset() { Reset::Used } else { Reset::Unused };
    let session = Session::new(client).map_err(|error| OpenError::Duplicate(peer(), error))?;
    Ok(Surveyed {
        server: Arc::new(session),
        shape,
        regions,
        reset: wishes.reset.unwrap_or(offered),
        receiver: client.receiver()?,
        hang_up: client.hang_up()?,
    })
}

/// Switches off what an earlier client may have left on, because some servers keep their configuration.
/// Otherwise the function would access the memory that it is given now, or hold on to a kind of interrupts
/// that the guest sees switched off.
fn quieten(client: &Client, config: &[u8], shape: &FunctionShape) -> Result<(), OpenError> {
    const MSI_ENABLE: u16 = 1;
    const MSIX_ENABLE: u16 = 1 << 15;
    let capabilities = [
        shape.msi.map(|msi| (u16::from(msi.at) + 2, MSI_ENABLE)),
        shape.msix.map(|msix| (u16::from(msix.at) + 2, MSIX_ENABLE)),
    ];
    let switches = [(offset::COMMAND, COMMAND_OURS)].into_iter().chain(capabilities.into_iter().flatten());
    for (at, _) in switches.filter(|(at, bits)| u16_at(config, *at).unwrap_or(0) & bits != 0) {
        match client.write(RegionIndex::CONFIG, at.into(), &[0, 0]) {
            Ok(()) => {}
            Err(error) if error.is_fatal() => return Err(error.into()),
            Err(error) => log::debug!("what was on stays on at {at:#x}: {error}"),
        }
    }
    Ok(())
}

/// Reads the configuration space: the first 256 bytes, and the headers of the extended capabilities. All
/// reads are aligned dwords, because some servers abort on anything else.
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
    // The list ends after 960 members, as no valid list has more, or after the deadline: a server must not
    // stretch the survey. `FunctionShape::judge` rejects what is wrong with the list, and the unread part is
    // cut off.
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
        let header = u32_at(&bytes, next).filter(|header| *header != u32::MAX).unwrap_or(0);
        next = u16::try_from(header >> 20).unwrap_or(0);
        seen += 1;
    }
    Ok(bytes)
}

fn behind(
    client: &Client,
    info: RegionInfo,
    bar: &BarShape,
    msix: Option<&MsixShape>,
    wishes: Wishes,
) -> Result<Region, OpenError> {
    let listed: Vec<_> = info.areas.iter().map(|area| (area.offset, area.size)).collect();
    let pieces: Vec<_> = bars::mappable(bar, &listed, msix)
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

/// The doorbell of an ioeventfd. `None` for other kinds, which the kernel cannot signal without us.
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

#[cfg(test)]
#[path = "survey_tests.rs"]
mod tests;
