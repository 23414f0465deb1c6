//! Judges what a server says of its function (configuration space, region sizes, interrupt counts): which
//! parts guests are shown, and which bits of the configuration space the client answers instead of the
//! server. Pure functions. Must never trust a value: the server may have said anything.

use super::bars::{self, BarShape};
use super::capabilities::{self, Capability, extended_id, id, u8_at, u16_at, u32_at};
use super::overlay::Overlay;
use crate::pci::bar::{BarError, Command};
use crate::pci::config_space::{STATUS_CAPABILITIES, offset};
use crate::pci::{BarIndex, Identity, Msi, MsiSpec};

/// The bits of the command register that the client answers itself: I/O and memory decode, bus master, INTx
/// disable.
pub const COMMAND_OURS: u16 = Command::IO | Command::MEMORY | Command::MASTER | Command::INTX_DISABLE;

/// What a server says of its function.
#[derive(Debug, Clone, Copy)]
pub struct Said<'a> {
    /// The configuration space. Any size but 256 and 4096 bytes is refused.
    pub config: &'a [u8],
    /// The sizes of regions 0 to 5.
    pub bars: &'a [u64; 6],
    /// The counts of INTx, MSI and MSI-X.
    pub interrupts: &'a [u32; 3],
}

/// A structure in a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InBar {
    /// Which BAR.
    pub bar: BarIndex,
    /// The offset in the BAR.
    pub offset: u64,
    /// Its length in bytes.
    pub size: u64,
}

impl InBar {
    const NOWHERE: Self = Self { bar: BarIndex::FIRST, offset: 0, size: 0 };

    /// Whether an access touches the structure.
    #[must_use]
    pub fn is_touched(&self, bar: BarIndex, offset: u64, length: usize) -> bool {
        let size = u64::try_from(length).unwrap_or(u64::MAX);
        self.overlaps(&InBar { bar, offset, size })
    }

    /// The offset of the first byte behind the structure.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.size)
    }

    fn overlaps(&self, other: &InBar) -> bool {
        self.bar == other.bar && self.offset < other.end() && other.offset < self.end()
    }
}

/// MSI-X.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixShape {
    /// The offset of the capability.
    pub at: u8,
    /// The number of vectors, 1 to 2048.
    pub vectors: u16,
    /// The table, inside a memory BAR.
    pub table: InBar,
    /// The pending bits, inside a memory BAR and apart from the table.
    pub pba: InBar,
}

impl MsixShape {
    /// Cuts the table and the pending bits to the first `vectors`.
    fn limited(self, vectors: u16) -> Self {
        let table = InBar { size: u64::from(vectors) * 16, ..self.table };
        let pba = InBar { size: u64::from(vectors).div_ceil(64) * 8, ..self.pba };
        Self { vectors, table, pba, ..self }
    }
}

/// MSI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiShape {
    /// The offset of the capability.
    pub at: u8,
    /// The properties of the capability.
    pub spec: MsiSpec,
}

/// A property of the server's function that guests are not shown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Oddity {
    /// A capability list is invalid from some pointer on.
    #[error("the capability list is cut at {0:#x}, where none can be")]
    ChainCut(u16),
    /// MSI-X cannot work, for this reason.
    #[error("MSI-X is hidden: {0}")]
    MsixHidden(&'static str),
    /// Guests see fewer vectors than the capability has.
    #[error("{kind} has {entries} vectors, of which only {vectors} are shown: {why}")]
    FewerVectors {
        /// MSI-X or MSI.
        kind: &'static str,
        /// The number in the capability.
        entries: u16,
        /// The number that guests see.
        vectors: u16,
        /// The reason.
        why: &'static str,
    },
    /// MSI cannot work.
    #[error("MSI is hidden: the server has no interrupts for it")]
    MsiHidden,
    /// INTx cannot work, for this reason.
    #[error("the interrupt pin is hidden: {0}")]
    PinHidden(&'static str),
}

/// Why a function cannot be shown to guests.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// Its configuration space has a size that no function has.
    #[error("its configuration space has {0:#x} bytes, and not 0x100 or 0x1000")]
    ConfigSize(usize),
    /// The ids are those of an empty slot.
    #[error("its configuration space shows no function: the ids read {0:#010x}")]
    Absent(u32),
    /// It is a bridge, or of an unknown header type.
    #[error("it is no endpoint: its header is of type {0:#x}, and not 0")]
    HeaderType(u8),
    /// A BAR cannot be shown.
    #[error(transparent)]
    Bar(#[from] BarError),
}

/// A function that can be shown to guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionShape {
    /// Its ids and class.
    pub identity: Identity,
    /// Its BARs.
    pub bars: [Option<BarShape>; 6],
    /// MSI-X, if it works.
    pub msix: Option<MsixShape>,
    /// MSI, if it works.
    pub msi: Option<MsiShape>,
    /// The interrupt pin, 1 to 4, if it works.
    pub pin: Option<u8>,
    /// The device status of a virtio function.
    pub virtio_status: Option<InBar>,
    /// Offsets of bytes, each with the bits that reset the function when 1 is written to them.
    pub resets: Vec<(u16, u8)>,
    /// The client's bits that never change. [`VfioUserDevice`](super::device::VfioUserDevice) adds the
    /// client's bits that change: command, BARs, interrupt line, and the registers of MSI and MSI-X.
    pub overlay: Overlay,
    /// What guests are not shown.
    pub oddities: Vec<Oddity>,
}

impl FunctionShape {
    /// Judges what a server says of its function.
    ///
    /// # Errors
    /// When guests cannot be shown such a function.
    pub fn judge(said: &Said<'_>) -> Result<Self, Unfit> {
        let config = said.config;
        let size = config.len();
        let space = match size {
            0x100 => 0x100,
            0x1000 => 0x1000,
            _ => return Err(Unfit::ConfigSize(size)),
        };
        let ids = u32_at(config, offset::ID).unwrap_or(u32::MAX);
        if matches!(ids, 0 | 0xffff_0000) || ids & 0xffff == 0xffff {
            return Err(Unfit::Absent(ids));
        }
        let header_type = u8_at(config, offset::HEADER_TYPE).unwrap_or(u8::MAX);
        if header_type & 0x7f != 0 {
            return Err(Unfit::HeaderType(header_type));
        }
        let bars = bars::judge(config, said.bars)?;
        let [vendor_low, vendor_high, device_low, device_high] = ids.to_le_bytes();
        let class = u32_at(config, offset::REVISION).unwrap_or(0);
        let identity = Identity {
            vendor: u16::from_le_bytes([vendor_low, vendor_high]),
            device: u16::from_le_bytes([device_low, device_high]),
            class: class >> 8,
            revision: u8_at(config, offset::REVISION).unwrap_or(0),
            subsystem_vendor: u16_at(config, offset::SUBSYSTEM).unwrap_or(0),
            subsystem: u16_at(config, offset::SUBSYSTEM + 2).unwrap_or(0),
        };
        let mut shape = FunctionShape {
            identity,
            bars,
            msix: None,
            msi: None,
            pin: None,
            virtio_status: None,
            resets: Vec::new(),
            overlay: Overlay::new(space),
            oddities: Vec::new(),
        };
        // The ids never change, whatever the server says later.
        for constant in [offset::ID, offset::REVISION, offset::SUBSYSTEM] {
            shape.overlay.claim(constant, u32::MAX, u32_at(config, constant).unwrap_or(0));
        }
        shape.overlay.claim(offset::HEADER_TYPE, 0xff, 0);
        for index in 0..6 {
            shape.overlay.claim(offset::BARS + 4 * index, u32::MAX, 0);
        }
        shape.overlay.claim(offset::INTERRUPT_LINE, 0xff, 0);
        shape.overlay.claim(offset::ROM, u32::MAX, 0);
        shape.show_pin(said);
        shape.show_capabilities(said);
        shape.show_extended(config);
        Ok(shape)
    }

    fn show_pin(&mut self, said: &Said<'_>) {
        let [intx, ..] = *said.interrupts;
        let pin = u8_at(said.config, offset::INTERRUPT_PIN).unwrap_or(0);
        match (pin, intx) {
            (0, _) => {}
            (1..=4, 0) => self.oddities.push(Oddity::PinHidden("the server has no interrupt for it")),
            (1..=4, _) => self.pin = Some(pin),
            _ => self.oddities.push(Oddity::PinHidden("there are four pins only")),
        }
        self.overlay.claim(offset::INTERRUPT_PIN, 0xff, self.pin.unwrap_or(0).into());
    }

    fn show_capabilities(&mut self, said: &Said<'_>) {
        let chain = capabilities::capabilities(said.config);
        self.oddities.extend(chain.cut.map(Oddity::ChainCut));
        let mut shown: Vec<Capability> = Vec::new();
        let (mut seen_msi, mut seen_msix) = (false, false);
        for member in chain.members {
            let keep = match member.id {
                id::MSI_X => !std::mem::replace(&mut seen_msix, true) && self.show_msix(said, member.at),
                id::MSI => !std::mem::replace(&mut seen_msi, true) && self.show_msi(said, member.at),
                id::EXPRESS => {
                    self.show_express(said.config, member.at);
                    true
                }
                id::VENDOR => {
                    self.find_virtio(said.config, member.at);
                    true
                }
                id::ADVANCED_FEATURES => {
                    let from = u16::from(member.at);
                    if u8_at(said.config, from + 3).unwrap_or(0) & 2 != 0 {
                        self.resets.push((from + 4, 1));
                    }
                    true
                }
                _ => true,
            };
            if keep {
                shown.push(member);
            }
        }
        let flag = if shown.is_empty() { 0 } else { STATUS_CAPABILITIES };
        self.overlay.claim(offset::STATUS, STATUS_CAPABILITIES.into(), flag.into());
        let mut pointer = offset::CAPABILITIES;
        for member in shown {
            self.overlay.claim(pointer, 0xff, member.at.into());
            self.overlay.claim(member.at.into(), 0xff, member.id.into());
            pointer = u16::from(member.at) + 1;
        }
        self.overlay.claim(pointer, 0xff, 0);
    }

    /// Judges the capability. Returns whether guests can be shown it.
    fn show_msix(&mut self, said: &Said<'_>, at: u8) -> bool {
        let [.., count] = *said.interrupts;
        let from = u16::from(at);
        let control = u16_at(said.config, from + 2).unwrap_or(0);
        let entries = (control & 0x7ff) + 1;
        let vectors = entries.min(u16::try_from(count).unwrap_or(u16::MAX));
        let oddities = &mut self.oddities;
        let mut hide = |why| {
            oddities.push(Oddity::MsixHidden(why));
            false
        };
        if vectors == 0 {
            return hide("the server has no interrupts for it");
        }
        // The client answers the table and the pending bits, so the server need not have memory behind them.
        let bars = &mut self.bars;
        let mut place = |register: u16, size: u64| {
            let value = u32_at(said.config, from + register).unwrap_or(u32::MAX);
            let bar = u8::try_from(value & 7).ok().and_then(BarIndex::new)?;
            let place = InBar { bar, offset: u64::from(value & !7), size };
            (bars::make_memory(bars, &place)).then_some(place)
        };
        let whole = MsixShape { at, vectors, table: InBar::NOWHERE, pba: InBar::NOWHERE }.limited(vectors);
        let (Some(table), Some(pba)) = (place(4, whole.table.size), place(8, whole.pba.size)) else {
            return hide("its table or its pending bits are where no memory BAR can be");
        };
        if table.overlaps(&pba) {
            return hide("its table and its pending bits overlap");
        }
        if vectors < entries {
            let why = "the server has no more interrupts";
            self.oddities.push(Oddity::FewerVectors { kind: "MSI-X", entries, vectors, why });
        }
        self.msix = Some(MsixShape { table, pba, ..whole });
        // The table's size and both places are constant. The enable bit and the function mask change;
        // `Delivery` answers them.
        self.overlay.claim(from + 2, 0x3fff, u32::from(vectors - 1));
        for (register, place) in [(4, table), (8, pba)] {
            let low = u32::try_from(place.offset).unwrap_or(0) | u32::from(place.bar.get());
            self.overlay.claim(from + register, u32::MAX, low);
        }
        true
    }

    /// Judges the capability. Returns whether guests can be shown it.
    fn show_msi(&mut self, said: &Said<'_>, at: u8) -> bool {
        let [_, count, _] = *said.interrupts;
        let from = u16::from(at);
        let control = u16_at(said.config, from + 2).unwrap_or(0);
        let wanted = 1_u32 << ((control >> 1) & 7).min(5);
        let vectors = wanted.min(if count == 0 { 0 } else { 1 << count.ilog2() });
        let Some(vectors) = u8::try_from(vectors).ok().filter(|vectors| *vectors > 0) else {
            self.oddities.push(Oddity::MsiHidden);
            return false;
        };
        let spec = MsiSpec { vectors, wide: control & 0x80 != 0, maskable: control & 0x100 != 0 };
        self.msi = Some(MsiShape { at, spec });
        // Everything but the two enable fields of the control register is constant. `Delivery` answers these,
        // the address, the data and the masks.
        let constant = vectors.ilog2() << 1 | u32::from(control & 0x180);
        self.overlay.claim(from + 2, 0xff8e, constant);
        for offset in (4..u16::from(Msi::length(spec))).step_by(4) {
            self.overlay.claim(from + offset, u32::MAX, 0);
        }
        true
    }

    /// Finds the common configuration (Virtio 1.2 §4.1.4) and in it the device status.
    fn find_virtio(&mut self, config: &[u8], at: u8) {
        const VENDOR: u16 = 0x1af4;
        const COMMON_CONFIGURATION: u8 = 1;
        const DEVICE_STATUS: u64 = 0x14;
        let from = u16::from(at);
        let bar = u8_at(config, from + 4).and_then(BarIndex::new);
        if let (VENDOR, Some(COMMON_CONFIGURATION), None, Some(bar), Some(begin)) =
            (self.identity.vendor, u8_at(config, from + 3), self.virtio_status, bar, u32_at(config, from + 8))
        {
            self.virtio_status = Some(InBar { bar, offset: u64::from(begin) + DEVICE_STATUS, size: 1 });
        }
    }

    /// The number of message vectors that the guest may use at once.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        let msi = self.msi.map_or(0, |msi| msi.spec.vectors.into());
        self.msix.map_or(msi, |msix| msix.vectors.max(msi))
    }

    /// Limits the message vectors that guests see to `most`, the number of routes of the host. Guests see at
    /// least one.
    pub fn limit_vectors(&mut self, most: u16) {
        let most = most.max(1);
        let mut fewer = |kind, entries, vectors| {
            let why = "the host has no more interrupt routes";
            self.oddities.push(Oddity::FewerVectors { kind, entries, vectors, why });
        };
        if let Some(msix) = self.msix.as_mut().filter(|msix| msix.vectors > most) {
            fewer("MSI-X", msix.vectors, most);
            *msix = msix.limited(most);
            self.overlay.claim(u16::from(msix.at) + 2, 0x3fff, u32::from(most - 1));
        }
        if let Some(msi) = self.msi.as_mut().filter(|msi| u16::from(msi.spec.vectors) > most) {
            let vectors = 1_u8.checked_shl(most.ilog2()).unwrap_or(1);
            fewer("MSI", msi.spec.vectors.into(), vectors.into());
            msi.spec.vectors = vectors;
            self.overlay.claim(u16::from(msi.at) + 2, 0xe, vectors.ilog2() << 1);
        }
    }

    /// Logs what guests are not shown of the device called `name`, and what that costs them.
    pub fn report(&self, name: &str) {
        let cost = match (&self.msix, &self.msi, self.pin) {
            (Some(_), ..) => "",
            (None, Some(_), _) => "; the guest uses MSI instead",
            (None, None, Some(_)) => {
                "; the guest uses the pin instead: each interrupt costs exits and a round trip to the server"
            }
            (None, None, None) => "; the guest hears no interrupt of it",
        };
        for oddity in &self.oddities {
            let cost = if matches!(oddity, Oddity::ChainCut(_)) { "" } else { cost };
            log::warn!("device {name}: {oddity}{cost}");
        }
    }

    /// Shows the function as an integrated endpoint of the root complex, which has no link.
    fn show_express(&mut self, config: &[u8], at: u8) {
        const IN_ROOT_COMPLEX: u32 = 9;
        const FUNCTION_RESET: u32 = 1 << 28;
        let from = u16::from(at);
        if u32_at(config, from + 4).unwrap_or(0) & FUNCTION_RESET != 0 {
            self.resets.push((from + 9, 0x80));
        }
        self.overlay.claim(from + 2, 0xf0, IN_ROOT_COMPLEX << 4);
        self.overlay.claim(from + 0x0c, u32::MAX, 0);
        self.overlay.claim(from + 0x10, u32::MAX, 0);
        if u16_at(config, from + 2).unwrap_or(0) & 0xf >= 2 {
            self.overlay.claim(from + 0x2c, u32::MAX, 0);
            self.overlay.claim(from + 0x30, u32::MAX, 0);
        }
    }

    fn show_extended(&mut self, config: &[u8]) {
        const HIDDEN: [u16; 4] = [
            extended_id::ARI,
            extended_id::SR_IOV,
            extended_id::RESIZABLE_BAR,
            extended_id::VF_RESIZABLE_BAR,
        ];
        if config.len() <= 0x100 {
            return;
        }
        let chain = capabilities::extended(config);
        self.oddities.extend(chain.cut.map(Oddity::ChainCut));
        // The first capability must stay at 0x100. If it has to be hidden, it is shown with an id that means
        // nothing.
        let shown = chain.members.iter().filter(|member| member.at == 0x100 || !HIDDEN.contains(&member.id));
        let shown: Vec<_> = shown.collect();
        let nexts = shown.iter().skip(1).map(|member| u32::from(member.at)).chain([0]);
        for (member, next) in shown.iter().zip(nexts) {
            let header = if HIDDEN.contains(&member.id) {
                0xffff
            } else {
                u32::from(member.id) | u32::from(member.version) << 16
            };
            self.overlay.claim(member.at, u32::MAX, header | next << 20);
        }
        if shown.is_empty() {
            self.overlay.claim(0x100, u32::MAX, 0);
        }
    }
}

#[cfg(test)]
#[path = "function_tests.rs"]
mod tests;
