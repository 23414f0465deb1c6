//! The capability lists of a configuration space (PCI 3.0 §6.7, PCI Express 4.0 §7.6). Pure functions. Must
//! never trust the lists, which may loop and overlap: reading ends after each position was seen once.

use crate::pci::config_space::{STATUS_CAPABILITIES, offset};

/// PCI capability ids.
pub mod id {
    /// Message signalled interrupts.
    pub const MSI: u8 = 0x05;
    /// Advanced features: resets a function that has no PCI Express capability.
    pub const ADVANCED_FEATURES: u8 = 0x13;
    /// PCI Express.
    pub const EXPRESS: u8 = 0x10;
    /// MSI-X.
    pub const MSI_X: u8 = 0x11;
    /// Vendor-specific. Virtio describes its structures by such capabilities.
    pub const VENDOR: u8 = 0x09;
}

/// PCI Express extended capability ids.
pub mod extended_id {
    /// Alternative routing-ID interpretation. The function is on the root complex, which does not support it.
    pub const ARI: u16 = 0x0e;
    /// Virtual functions: no server could serve them.
    pub const SR_IOV: u16 = 0x10;
    /// Resizable BARs: the size of a region is fixed.
    pub const RESIZABLE_BAR: u16 = 0x15;
    /// Resizable BARs of virtual functions.
    pub const VF_RESIZABLE_BAR: u16 = 0x24;
}

/// One capability of the first 256 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Its offset.
    pub at: u8,
    /// What it is.
    pub id: u8,
}

/// One capability of the extended space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extended {
    /// Its offset.
    pub at: u16,
    /// What it is.
    pub id: u16,
    /// Its version.
    pub version: u8,
}

/// A capability list, up to the first invalid member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain<T> {
    /// Its members, in order.
    pub members: Vec<T>,
    /// The pointer at which the list was cut; `None` if the list ended by itself.
    pub cut: Option<u16>,
}

/// The byte of `config` at `at`; `None` beyond the end. The wider readers below are little-endian.
pub fn u8_at(config: &[u8], at: u16) -> Option<u8> {
    config.get(usize::from(at)).copied()
}

/// See [`u8_at`].
pub fn u16_at(config: &[u8], at: u16) -> Option<u16> {
    let bytes = config.get(usize::from(at)..)?.first_chunk()?;
    Some(u16::from_le_bytes(*bytes))
}

/// See [`u8_at`].
pub fn u32_at(config: &[u8], at: u16) -> Option<u32> {
    let bytes = config.get(usize::from(at)..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

/// The length in bytes of the capability at `at`. A capability of unknown kind counts as one dword.
fn length(config: &[u8], Capability { at, id }: Capability) -> u16 {
    let control = u16_at(config, u16::from(at) + 2).unwrap_or(0);
    match id {
        id::MSI_X => 12,
        id::MSI => 10 + if control & 0x80 == 0 { 0 } else { 4 } + if control & 0x100 == 0 { 0 } else { 10 },
        id::EXPRESS if control & 0xf >= 2 => 0x3c,
        id::EXPRESS => 0x14,
        // Power management.
        0x01 => 8,
        _ => 4,
    }
}

/// The dwords that members of the list occupy so far.
struct Taken(Vec<bool>);

impl Taken {
    /// Occupies `length` bytes from `at`. False when one of the dwords is occupied already or lies beyond the
    /// end.
    fn take(&mut self, at: u16, length: u16) -> bool {
        let first = usize::from(at / 4);
        let Some(dwords) = self.0.get_mut(first..first + usize::from(length.div_ceil(4))) else {
            return false;
        };
        let free = !dwords.iter().any(|taken| *taken);
        if free {
            dwords.fill(true);
        }
        free
    }
}

/// The capability list of the first 256 bytes.
#[must_use]
pub fn capabilities(config: &[u8]) -> Chain<Capability> {
    let mut chain = Chain { members: Vec::new(), cut: None };
    if u16_at(config, offset::STATUS).unwrap_or(0) & STATUS_CAPABILITIES == 0 {
        return chain;
    }
    let mut taken = Taken(vec![false; 64]);
    let mut next = u8_at(config, offset::CAPABILITIES).unwrap_or(0);
    while next != 0 {
        let at = u16::from(next);
        let member = u8_at(config, at).map(|id| Capability { at: next, id });
        let good = at >= 0x40 && at.is_multiple_of(4);
        match member {
            Some(member) if good && taken.take(at, length(config, member)) => chain.members.push(member),
            _ => {
                chain.cut = Some(at);
                break;
            }
        }
        next = u8_at(config, at + 1).unwrap_or(0);
    }
    chain
}

/// The capability list of the space above 256 bytes, if there is one.
#[must_use]
pub fn extended(config: &[u8]) -> Chain<Extended> {
    let mut chain = Chain { members: Vec::new(), cut: None };
    let mut taken = Taken(vec![false; 1024]);
    let mut next = 0x100;
    while next != 0 {
        let header = u32_at(config, next);
        let Some(header) = header.filter(|header| next == 0x100 || (*header != 0 && *header != u32::MAX))
        else {
            chain.cut = (next != 0x100).then_some(next);
            break;
        };
        if header == 0 || header == u32::MAX {
            break;
        }
        if next < 0x100 || !next.is_multiple_of(4) || !taken.take(next, 4) {
            chain.cut = Some(next);
            break;
        }
        let [low, high, version, _] = header.to_le_bytes();
        chain.members.push(Extended {
            at: next,
            id: u16::from_le_bytes([low, high]),
            version: version & 0xf,
        });
        next = u16::try_from(header >> 20).unwrap_or(0);
    }
    chain
}
