//! Where a running machine is counted. The control loop owns it and answers with copies.

use std::sync::{Arc, Mutex, PoisonError};

use devices::bus::Bus;

use crate::devices::DeviceList;
use crate::life::vcpu::VcpuCounters;
use crate::stats::{DeviceStats, Startup, Stats};

/// Where a machine is counted, from its start to its end.
pub(crate) struct Ledger {
    /// What does not change by itself: times, boots, the buses of boards that are gone.
    pub(crate) kept: Stats,
    pub(crate) vcpus: Vec<Arc<VcpuCounters>>,
    pub(crate) devices: DeviceList,
    /// The buses of the present board.
    pub(crate) buses: Vec<(&'static str, Arc<Bus>)>,
    /// What the devices were before their connections were cut.
    settled: Mutex<Vec<DeviceStats>>,
}

impl Ledger {
    /// Begins to count.
    pub(crate) fn new(startup_us: Startup, vcpus: Vec<Arc<VcpuCounters>>, devices: DeviceList) -> Self {
        let kept = Stats { startup_us, ..Stats::default() };
        Self { kept, vcpus, devices, buses: Vec::new(), settled: Mutex::default() }
    }

    /// What has been counted so far. Takes no lock that is held over a wait.
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

    /// From now on devices lose their peers because the machine ends: what they are stays as it is.
    pub(crate) fn settle(&self) {
        let states = self.devices.iter().map(|device| device.stats()).collect();
        *self.settled.lock().unwrap_or_else(PoisonError::into_inner) = states;
    }

    /// The board is gone: what its buses counted is kept.
    pub(crate) fn close_board(&mut self) {
        for (name, bus) in std::mem::take(&mut self.buses) {
            self.kept.add_bus(name, bus.counters());
        }
    }
}
