//! The statistics, which `--stats` writes when the machine ends.
//!
//! Times are in microseconds. Counters cover the machine's whole life, including reboots.

use devices::bus::BusCounters;
use serde::Serialize;

use crate::life::vcpu::VcpuStats;

/// Everything counted while a machine lived.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stats {
    /// Why it ended: `power-off`, `reset`, `quit`, `signal` or `crash`.
    pub end: &'static str,
    /// How often the guest was started: once, and once more for each reboot.
    pub boots: u64,
    /// When each step of the first start was done, counted from the start of the build.
    pub startup_us: Startup,
    /// All exits to userspace of all vCPUs.
    pub exits: u64,
    /// Exits to userspace, for each vCPU.
    pub vcpus: Vec<VcpuStats>,
    /// Exits to userspace, for each range of ports and of addresses.
    pub ranges: Vec<RangeStats>,
    /// Accesses that no device claimed.
    pub unclaimed: Unclaimed,
    /// The virtio devices, then the vfio-user servers' devices, each in the order of the configuration.
    pub devices: Vec<DeviceStats>,
}

/// When each step of the first start was done, in microseconds from the start of the build.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Startup {
    /// Every backend and server is connected and has described its device.
    pub peers: u64,
    /// Guest RAM exists.
    pub ram: u64,
    /// Kernel, initramfs, command line and tables are in it.
    pub image: u64,
    /// The VM, its vCPUs and devices exist.
    pub board: u64,
    /// The first vCPU enters the guest.
    pub first_entry: u64,
}

/// Accesses to one range that caused an exit to userspace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RangeStats {
    /// `pio` or `mmio`.
    pub bus: &'static str,
    /// The device's name.
    pub name: String,
    /// The first address.
    pub start: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// Accesses that no device claimed. Such a read gave all ones; such a write was dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Unclaimed {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// One device.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DeviceStats {
    /// Its name.
    pub id: String,
    /// Its type.
    pub kind: String,
    /// `idle`, `recovering`, `broken`, or `ejected` where the guest let go of a working PCI device.
    pub state: &'static str,
    /// Why it is broken.
    pub broken: Option<String>,
    /// For a virtio device: kicks and interrupt acknowledgements that passed through the VMM while the device
    /// ran. This should be 0. For a vfio-user server's device: trapped accesses to its BARs.
    pub requests_through_vmm: u64,
    /// How often a lost backend was found again.
    pub recoveries: u64,
    /// Writes to the other registers: initialisation and configuration changes.
    pub register_writes: u64,
    /// The messages to its peer.
    pub peer: PeerStats,
    /// For a vfio-user server's PCI device: its identity, and its trapped accesses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci: Option<PciStats>,
}

/// A vfio-user server's PCI device. Accesses to mapped memory and to doorbells are not counted, because they
/// cause no exit to userspace.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PciStats {
    /// Vendor, device and class.
    pub identity: String,
    /// Reads of BARs 0 to 5 that came to userspace.
    pub bar_reads: Vec<u64>,
    /// Writes of them.
    pub bar_writes: Vec<u64>,
    /// Reads of the configuration space.
    pub config_reads: u64,
    /// Writes of it.
    pub config_writes: u64,
    /// Requests that the server refused.
    pub refused: u64,
}

/// Messages to one peer.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct PeerStats {
    /// Messages sent.
    pub messages: u64,
    /// How often we waited for an answer.
    pub waits: u64,
    /// The longest of these waits.
    pub worst_wait_us: u64,
}

impl Stats {
    /// Adds the counters of one boot's bus to those of earlier boots.
    pub fn add_bus(&mut self, bus: &'static str, counters: BusCounters) {
        self.unclaimed.reads += counters.unclaimed_reads;
        self.unclaimed.writes += counters.unclaimed_writes;
        for range in counters.ranges {
            let known = self.ranges.iter_mut().find(|seen| seen.bus == bus && seen.name == range.name);
            match known {
                Some(seen) => {
                    seen.reads += range.reads;
                    seen.writes += range.writes;
                }
                None => self.ranges.push(RangeStats {
                    bus,
                    name: range.name,
                    start: range.start,
                    reads: range.reads,
                    writes: range.writes,
                }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use devices::bus::RangeCounters;

    use super::*;

    #[test]
    fn counters_of_two_boots_add_up() {
        let one = BusCounters {
            ranges: vec![RangeCounters {
                name: "serial".into(),
                start: 0x3f8,
                length: 8,
                reads: 1,
                writes: 2,
            }],
            unclaimed_reads: 3,
            unclaimed_writes: 0,
        };
        let mut stats = Stats::default();
        stats.add_bus("pio", one.clone());
        stats.add_bus("pio", one);
        assert_eq!(stats.ranges.len(), 1);
        assert_eq!((stats.ranges[0].reads, stats.ranges[0].writes, stats.unclaimed.reads), (2, 4, 6));
    }
}
