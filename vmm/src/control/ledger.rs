//! The statistics of a running machine. The control loop owns the ledger and gives out copies of its values.

use std::sync::{Arc, Mutex, PoisonError};

use devices::bus::Bus;

use crate::devices::DeviceList;
use crate::life::vcpu::VcpuCounters;
use crate::stats::{DeviceStats, Startup, Stats};

/// The sources of the statistics, from the start of the machine to its end.
pub(crate) struct Ledger {
    /// The values that are stored here: times, boots, and the counters of earlier boards' buses.
    pub(crate) kept: Stats,
    pub(crate) vcpus: Vec<Arc<VcpuCounters>>,
    pub(crate) devices: DeviceList,
    /// The buses of the present board.
    pub(crate) buses: Vec<(&'static str, Arc<Bus>)>,
    /// The state of each device before the connections were cut.
    settled: Mutex<Vec<DeviceStats>>,
}

impl Ledger {
    /// Begins to count.
    pub(crate) fn new(startup_us: Startup, vcpus: Vec<Arc<VcpuCounters>>, devices: DeviceList) -> Self {
        let kept = Stats { startup_us, ..Stats::default() };
        Self { kept, vcpus, devices, buses: Vec::new(), settled: Mutex::default() }
    }

    /// The statistics so far. Takes no lock that a thread holds over a wait.
    pub(crate) fn read(&self) -> Stats {
        let mut stats = self.kept.clone();
        stats.vcpus = self.vcpus.iter().map(|counters| counters.stats()).collect();
        stats.exits = stats.vcpus.iter().map(|vcpu| vcpu.exits).sum();
        stats.startup_us.first_entry = self.vcpus.first().map_or(0, |first| first.first_entry_us());
        for (name, bus) in &self.buses {
            stats.add_bus(name, bus.counters());
        }
        stats.devices = self.devices.iter().map(|device| device.stats()).collect();
        let settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        for (device, settled) in stats.devices.iter_mut().zip(&*settled) {
            (device.state, device.broken) = (settled.state, settled.broken.clone());
        }
        stats
    }

    /// Stores the present state of the devices for the statistics. Called before the connections are cut,
    /// because the devices would then show a loss that only the end of the machine caused.
    pub(crate) fn settle(&self) {
        let states = self.devices.iter().map(|device| device.stats()).collect();
        *self.settled.lock().unwrap_or_else(PoisonError::into_inner) = states;
    }

    /// The board is gone: adds the counters of its buses to the stored values.
    pub(crate) fn close_board(&mut self) {
        for (name, bus) in std::mem::take(&mut self.buses) {
            self.kept.add_bus(name, bus.counters());
        }
    }
}
