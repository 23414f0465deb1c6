//! `outboard probe vfio-user`: reports what a server offers.
//!
//! The configuration space is read last, in naturally aligned dwords, because some servers crash at any other
//! access.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;
use transport::peer::{Cause, Limits};
use transport::vfio_user::migration::FeatureUse;
use transport::vfio_user::{Client, Feature, IoFdKind, IoFdPlace, IrqIndex, RegionIndex, RegionInfo};

use crate::error::Error;

/// The offer of a vfio-user server.
#[derive(Clone, Debug, Serialize)]
pub struct VfioUserReport {
    /// Its socket.
    pub socket: String,
    /// The version that it speaks.
    pub version: String,
    /// Its capabilities. A default stands for each one that it does not name.
    pub capabilities: Capabilities,
    /// It is a PCI device.
    pub pci: bool,
    /// It can be reset.
    pub reset: bool,
    /// The identity of the device, if it has a PCI configuration space.
    pub identity: Option<Identity>,
    /// Its regions that have a size.
    pub regions: Vec<Region>,
    /// Its interrupt indexes that have interrupts.
    pub interrupts: Vec<Interrupts>,
    /// Features beyond its registers.
    pub features: Vec<String>,
    /// Unusual properties of the server.
    pub quirks: Vec<String>,
}

/// Capabilities of a server.
#[derive(Clone, Debug, Serialize)]
pub struct Capabilities {
    /// Descriptors that it takes in one message.
    pub max_msg_fds: u64,
    /// Bytes that one message may transfer.
    pub max_data_xfer_size: u64,
    /// DMA maps that it takes.
    pub max_dma_maps: u64,
    /// Page sizes of DMA maps, or'ed together.
    pub pgsizes: u64,
    /// Whether its commands arrive on a socket of their own.
    pub twin_socket: bool,
    /// It takes several writes in one message.
    pub write_multiple: bool,
}

/// The first registers of a PCI configuration space.
#[derive(Clone, Debug, Serialize)]
pub struct Identity {
    /// Vendor and device, as `lspci -n` writes them.
    pub id: String,
    /// Vendor and device of the subsystem.
    pub subsystem: String,
    /// Base class, subclass and programming interface.
    pub class: String,
    /// The revision.
    pub revision: u8,
    /// The interrupt pin, 0 for none.
    pub pin: u8,
}

/// One region.
#[derive(Clone, Debug, Serialize)]
pub struct Region {
    /// Its number.
    pub index: u32,
    /// Its meaning for PCI.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// The flags that the server reports: `read`, `write`, `mmap`, `capabilities`.
    pub flags: Vec<&'static str>,
    /// The areas that can really be mapped: offset and size of each.
    pub areas: Vec<(u64, u64)>,
    /// The doorbells: writes that KVM turns into an eventfd signal without an exit to this process.
    pub doorbells: Vec<Doorbell>,
}

/// A sub-region of DEVICE_GET_REGION_IO_FDS: a write to it reaches the server by an eventfd, without a
/// message.
#[derive(Clone, Debug, Serialize)]
pub struct Doorbell {
    /// Its offset in the region.
    pub offset: u64,
    /// The size of a write in bytes; 0 stands for any size.
    pub size: u64,
    /// The value that must be written; without it, any value signals the eventfd.
    pub value: Option<u64>,
}

/// One interrupt index.
#[derive(Clone, Debug, Serialize)]
pub struct Interrupts {
    /// Its number.
    pub index: u32,
    /// Its meaning for PCI.
    pub name: String,
    /// Interrupts.
    pub count: u32,
    /// The flags that the server reports.
    pub flags: u32,
}

/// The largest number of regions and interrupt indexes that are asked for. PCI has 9 regions and 5 indexes.
const INDEXES_MOST: u32 = 32;

/// The number of bytes of the configuration space that hold the identity.
const HEADER: usize = 64;

const FEATURES: [(Feature, FeatureUse); 5] = [
    (Feature::MIGRATION, FeatureUse::Get),
    (Feature::MIG_DEVICE_STATE, FeatureUse::Set),
    (Feature::DMA_LOGGING_START, FeatureUse::Set),
    (Feature::DMA_LOGGING_STOP, FeatureUse::Set),
    (Feature::DMA_LOGGING_REPORT, FeatureUse::Get),
];

/// Asks the server at `socket`.
///
/// # Errors
/// When it cannot be reached, does not speak vfio-user, or fails while it is asked.
pub fn vfio_user(socket: &Path, limits: &Limits) -> Result<VfioUserReport, Error> {
    let report = Client::connect(socket, limits).and_then(|client| ask(socket, &client));
    report.map_err(|error| {
        let hint = error.hint();
        super::failed(socket, hint).because(error)
    })
}

fn ask(socket: &Path, client: &Client) -> Result<VfioUserReport, transport::peer::Error> {
    let mut quirks = Vec::new();
    let version = client.version();
    let theirs = version.theirs;
    let info = client.device_info()?;
    let mut regions = Vec::new();
    for index in 0..info.regions.min(INDEXES_MOST) {
        if let Some(found) = unless_refused(client.region_info(RegionIndex(index)), &mut quirks)?
            && found.size > 0
        {
            regions.push(region(client, &found, &mut quirks)?);
        }
    }
    let mut interrupts = Vec::new();
    for index in 0..info.irqs.min(INDEXES_MOST) {
        if let Some(found) = unless_refused(client.irq_info(IrqIndex(index)), &mut quirks)?
            && found.count > 0
        {
            let name = interrupt_name(index);
            interrupts.push(Interrupts { index, name, count: found.count, flags: found.flags });
        }
    }
    let mut features = Vec::new();
    for (feature, with) in FEATURES {
        if client.has_feature(feature, with)? {
            features.extend(feature.name().map(str::to_owned));
        }
    }
    notice(client, &regions, &info, &mut quirks);
    let config = regions.iter().find(|region| region.index == RegionIndex::CONFIG.0);
    let whole = config.is_some_and(|config| config.size >= HEADER as u64);
    let identity = if whole && info.is_pci() { identity(client, &mut quirks)? } else { None };
    Ok(VfioUserReport {
        socket: socket.display().to_string(),
        version: format!("{}.{}", version.server.0, version.server.1),
        capabilities: Capabilities {
            max_msg_fds: theirs.max_msg_fds,
            max_data_xfer_size: theirs.max_data_xfer_size,
            max_dma_maps: theirs.max_dma_maps,
            pgsizes: theirs.pgsizes,
            twin_socket: theirs.twin_socket,
            write_multiple: theirs.write_multiple,
        },
        pci: info.is_pci(),
        reset: info.can_reset(),
        identity,
        regions,
        interrupts,
        features,
        quirks,
    })
}

/// Notes a refusal as a quirk, so that the probe goes on.
fn unless_refused<T>(
    answer: Result<T, transport::peer::Error>,
    quirks: &mut Vec<String>,
) -> Result<Option<T>, transport::peer::Error> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if !error.is_fatal() => {
            if !matches!(error.cause(), Cause::NotNegotiated) {
                quirks.push(error.to_string());
            }
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn region(
    client: &Client,
    found: &RegionInfo,
    quirks: &mut Vec<String>,
) -> Result<Region, transport::peer::Error> {
    let index = found.index.0;
    let flags = ["read", "write", "mmap", "capabilities"].into_iter().enumerate();
    let flags = flags.filter(|(bit, _)| found.flags >> bit & 1 != 0).map(|(_, name)| name).collect();
    // Only BARs have doorbells. Most servers refuse this request when they have none, so a refusal is no
    // quirk.
    let mut fds = Vec::new();
    if index < 6 {
        fds = unless_refused(client.region_io_fds(found), &mut Vec::new())?.unwrap_or_default();
    }
    let places: Vec<_> = fds.iter().map(|fd| fd.place).collect();
    if found.flags & 4 != 0 && found.areas.is_empty() {
        quirks.push(format!("says that region {index} can be mapped, and nothing of it can"));
    }
    Ok(Region {
        index,
        name: region_name(index),
        size: found.size,
        flags,
        areas: found.areas.iter().map(|area| (area.offset, area.size)).collect(),
        doorbells: doorbells(index, &places, quirks),
    })
}

/// The doorbells that KVM can signal. A write to a shadow ioeventfd or an ioregionfd still costs a message.
fn doorbells(index: u32, places: &[IoFdPlace], quirks: &mut Vec<String>) -> Vec<Doorbell> {
    let (bells, others): (Vec<_>, Vec<_>) =
        places.iter().partition(|place| matches!(place.kind, IoFdKind::Ioeventfd));
    if !others.is_empty() {
        let count = others.len();
        quirks.push(format!(
            "has {count} descriptor(s) for region {index} that are no doorbells, and are not used"
        ));
    }
    let bell = |place: &IoFdPlace| Doorbell { offset: place.offset, size: place.size, value: place.value() };
    bells.into_iter().map(bell).collect()
}

fn region_name(index: u32) -> String {
    match index {
        0..=5 => format!("BAR {index}"),
        6 => "ROM".to_owned(),
        7 => "configuration".to_owned(),
        8 => "VGA".to_owned(),
        _ => format!("region {index}"),
    }
}

fn interrupt_name(index: u32) -> String {
    let known = ["INTx", "MSI", "MSI-X", "error", "request"];
    let name = usize::try_from(index).ok().and_then(|index| known.get(index));
    name.map_or_else(|| format!("interrupts {index}"), |name| (*name).to_owned())
}

fn identity(client: &Client, quirks: &mut Vec<String>) -> Result<Option<Identity>, transport::peer::Error> {
    let mut header = [0_u32; HEADER / 4];
    for (number, register) in (0_u64..).zip(header.iter_mut()) {
        let mut bytes = [0; 4];
        let read = client.read(RegionIndex::CONFIG, number * 4, &mut bytes);
        if unless_refused(read, quirks)?.is_none() {
            return Ok(None);
        }
        *register = u32::from_le_bytes(bytes);
    }
    let [id, _, class, _, _, _, _, _, _, _, _, subsystem, _, _, _, interrupt] = header;
    let pair = |register: u32| format!("{:04x}:{:04x}", register & 0xffff, register >> 16);
    let byte = |register: u32, shift: u32| u8::try_from(register >> shift & 0xff).unwrap_or_default();
    if id & 0xffff == 0xffff {
        quirks.push("has vendor ffff: no guest sees such a device".to_owned());
    }
    Ok(Some(Identity {
        id: pair(id),
        subsystem: pair(subsystem),
        class: format!("{:06x}", class >> 8),
        revision: byte(class, 0),
        pin: byte(interrupt, 8),
    }))
}

/// Notes properties of the offer that will cause trouble.
fn notice(
    client: &Client,
    regions: &[Region],
    info: &transport::vfio_user::DeviceInfo,
    quirks: &mut Vec<String>,
) {
    let version = client.version();
    let has = |index: u32| regions.iter().any(|region| region.index == index);
    let unusual: [(bool, &str); 6] = [
        (!info.is_pci(), "is no PCI device: a machine cannot take it"),
        (!has(RegionIndex::CONFIG.0), "has no configuration space: a machine cannot take it"),
        (!info.can_reset(), "cannot be reset: its guest reboots at its own risk"),
        (
            !version.is_extended(),
            "speaks the protocol's first form: no doorbells by descriptor, no migration",
        ),
        (
            version.theirs.max_msg_fds == 1,
            "takes one descriptor in a message: arming many interrupts takes as many messages",
        ),
        (
            version.must_not_cross(),
            "takes what it is told while it asks for memory for the answer: no writes are posted, unless posted-writes=on",
        ),
    ];
    quirks.extend(unusual.into_iter().filter(|(is, _)| *is).map(|(_, what)| what.to_owned()));
}

/// Runs `outboard probe vfio-user SOCKET [--json]`.
///
/// # Errors
/// The errors of [`vfio_user`], and a closed standard output.
pub fn command(socket: &Path, limits: &Limits, json: bool) -> Result<ExitCode, Error> {
    let report = vfio_user(socket, limits)?;
    crate::tools::print(&report, if json { None } else { Some(describe(&report)) })?;
    Ok(ExitCode::SUCCESS)
}

fn describe(report: &VfioUserReport) -> String {
    let mut text = format!("vfio-user server {}\n", report.socket);
    let mut line = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        writeln!(text, "  {name:<18} {value}").unwrap_or_default();
    };
    line("version", &report.version);
    let has = &report.capabilities;
    line(
        "capabilities",
        &format!(
            "max_msg_fds={} max_data_xfer_size={} max_dma_maps={} pgsizes={:#x} twin_socket={} write_multiple={}",
            has.max_msg_fds,
            has.max_data_xfer_size,
            has.max_dma_maps,
            has.pgsizes,
            has.twin_socket,
            has.write_multiple
        ),
    );
    match &report.identity {
        Some(pci) => line(
            "PCI device",
            &format!(
                "{} class {} revision {:02x} subsystem {} pin {}",
                pci.id, pci.class, pci.revision, pci.subsystem, pci.pin
            ),
        ),
        None => line("PCI device", if report.pci { "yes, identity not told" } else { "no" }),
    }
    line("reset", if report.reset { "yes" } else { "no" });
    for region in &report.regions {
        let flags =
            if region.flags.is_empty() { "nothing said of it".to_owned() } else { region.flags.join(" ") };
        let mut value = format!("{:#x} bytes, {flags}", region.size);
        for (offset, size) in &region.areas {
            write!(value, ", mapped {offset:#x}+{size:#x}").unwrap_or_default();
        }
        if !region.doorbells.is_empty() {
            write!(value, ", {} doorbells", region.doorbells.len()).unwrap_or_default();
        }
        line(&region.name, &value);
    }
    for interrupts in &report.interrupts {
        line(&interrupts.name, &format!("{} (flags {:#x})", interrupts.count, interrupts.flags));
    }
    let features = report.features.join(" ");
    line("features", if features.is_empty() { "none" } else { &features });
    for quirk in &report.quirks {
        line("note", quirk);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shadow_ioeventfds_and_ioregionfds_are_no_doorbells() {
        let place = |offset, kind| IoFdPlace { offset, size: 4, fd: 0, kind, flags: 0, datamatch: 0 };
        let kinds = [IoFdKind::Shadow { fd: 1, offset: 0 }, IoFdKind::Ioeventfd, IoFdKind::Ioregionfd];
        let places: Vec<_> = (0..).step_by(4).zip(kinds).map(|(offset, kind)| place(offset, kind)).collect();
        let mut quirks = Vec::new();
        let offsets: Vec<_> = doorbells(0, &places, &mut quirks).iter().map(|bell| bell.offset).collect();
        assert_eq!(offsets, [4]);
        assert!(quirks[0].contains("2 descriptor(s) for region 0"), "{quirks:?}");
    }
}
