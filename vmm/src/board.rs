//! The board: the hardware of one boot. It consists of the VM, memory slots, interrupt controller, buses,
//! devices and vCPUs.
//!
//! Each boot builds a new board. A reboot takes the old board apart and builds another one around the same
//! RAM, console and backend connections. Power-on is therefore the only way in which a machine starts: there
//! is no reset path that could forget a register.

use std::sync::Arc;
use std::time::Instant;

use arch::boot::Entry;
use arch::cpu::HostCpu;
use arch::irq::RoutingTable;
use arch::layout;
use arch::platform::{AddressRange, Discovery, PciRoot, Platform};
use arch::ram::Ram;
use devices::bus::Bus;
use devices::event_line::EventLine;
use devices::pci::host_bridge::{CONFIG_PORTS, CONFIG_PORTS_LENGTH};
use devices::pci::{HostBridge, Hotplug, Intx, IntxLines, Window, Windows};
use devices::ports::{Access, Guard, Ports, Route};
use devices::pvpanic::PvPanic;
use devices::reset::{I8042, ResetKind, ResetPort};
use devices::serial::Serial;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::config::Transport;
use crate::console::transmit::Transmit;
use crate::control::Served;
use crate::devices::{DeviceList, Site};
use crate::error::Error;
use crate::host::kvm;
use crate::host::mapping::Mapping;
use crate::host::peer_memory::PeerMemory;
use crate::host::ports::KvmPorts;
use crate::host::slots::{Slot, Slots};
use crate::life::gate::{Lifecycle, Request};
use crate::life::vcpu::{Vcpu, VcpuCounters, Vcpus};

/// The parts that a board is built from. All of them outlive the board.
pub(crate) struct Parts<'m> {
    pub(crate) kvm: &'m Kvm,
    pub(crate) host_cpu: &'m HostCpu,
    pub(crate) ram: &'m Ram,
    pub(crate) ram_mappings: &'m [Mapping],
    pub(crate) platform: &'m Platform,
    pub(crate) output: &'m Arc<Transmit>,
    pub(crate) counters: &'m [Arc<VcpuCounters>],
    pub(crate) devices: &'m DeviceList,
    pub(crate) begun: Instant,
}

/// Step 1 of a board: a VM with its memory and vCPUs. No interrupt can reach the vCPUs yet.
pub(crate) struct Bare {
    vm: Arc<VmFd>,
    slots: Arc<Slots>,
    ram: Vec<Slot>,
    routes: RoutingTable,
    vcpus: Vec<VcpuFd>,
}

/// A complete board. Its vCPU threads wait at the gate.
pub(crate) struct Board {
    lifecycle: Arc<Lifecycle>,
    vcpus: Vcpus,
    serial: Arc<Serial>,
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    bridge: Option<Arc<HostBridge>>,
    hotplug: Option<Arc<Hotplug>>,
    peer_memory: Arc<PeerMemory>,
    // These fields are dropped after the devices: a device removes what it registered with the VM before the
    // VM goes.
    _interrupt: Guard,
    _ram: Vec<Slot>,
    _vm: Arc<VmFd>,
}

impl Bare {
    /// Makes the VM with an interrupt controller, which KVM requires before any vCPU; then guest memory and
    /// the vCPUs.
    pub(crate) fn construct(parts: &Parts<'_>) -> Result<Self, Error> {
        let (vm, routes) = create_vm(parts.kvm, parts.platform)?;
        let vm = Arc::new(vm);
        let slots = Slots::new(Arc::clone(&vm), kvm::slot_limit(parts.kvm));
        let mut ram = Vec::new();
        for (region, mapping) in parts.ram.regions().iter().zip(parts.ram_mappings) {
            let slot = slots.add(region.guest.0, mapping.clone(), Access::ReadWrite);
            ram.push(slot.map_err(|error| Error::host("cannot give the guest its memory").because(error))?);
        }
        let mut vcpus = Vec::new();
        for index in 0..parts.platform.cpus {
            let vcpu = vm.create_vcpu(u64::from(index));
            vcpus.push(
                vcpu.map_err(|error| Error::host(format!("cannot create vCPU {index}")).because(error))?,
            );
        }
        Ok(Self { vm, slots, ram, routes, vcpus })
    }

    /// Step 2: sets the state of a machine that is switched on. The interrupt routes are set last. KVM
    /// delivers an interrupt that is pending in a device's eventfd as soon as there is a route, and the
    /// vCPUs' interrupt controllers must be ready for it.
    pub(crate) fn power_on(self, parts: &Parts<'_>, entry: &Entry) -> Result<Self, Error> {
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            arch::cpu::configure(vcpu, index, parts.host_cpu, parts.platform)
                .and_then(|power_on| power_on.enter(vcpu, entry))
                .map_err(|error| Error::host(format!("cannot set up vCPU {index}")).because(error))?;
        }
        let routed = self.routes.apply(&self.vm);
        routed.map_err(|error| Error::host("cannot create the interrupt routes").because(error))?;
        Ok(self)
    }
}

impl Board {
    /// Step 3: connects the devices in numbered steps. Each step needs the steps before it.
    pub(crate) fn wire(bare: Bare, parts: &Parts<'_>) -> Result<Self, Error> {
        let Bare { vm, slots, ram, routes, vcpus } = bare;
        let (ports, peer_memory) = KvmPorts::ports(Arc::clone(&vm), slots, routes)
            .map_err(|error| Error::internal("cannot watch peers' memory").because(error))?;

        // 1. The legacy devices.
        let lifecycle = Arc::new(
            Lifecycle::new().map_err(|error| Error::internal("cannot make an eventfd").because(error))?,
        );
        let mut pio = Bus::new();
        let serial = legacy_devices(&mut pio, &lifecycle, parts.output)?;
        let interrupt = ports
            .interrupts
            .attach(serial.interrupt(), Route::Pin(layout::COM1_GSI.0))
            .map_err(|error| Error::host("cannot wire the serial port").because(error))?;

        // 2. The PCI root, if a device needs one. Then the virtio devices, then the vfio-user servers'
        //    devices, in the order of the configuration.
        let mut mmio = Bus::new();
        let bridge = match &parts.platform.pci {
            Some(root) => Some(pci_root(root, &ports, &mut mmio, &mut pio)?),
            None => None,
        };
        let removable = parts.platform.pci.filter(|root| !root.removable.is_empty()).and(bridge.as_ref());
        let hotplug = removable.map(|bridge| hotplug(bridge, &ports, &mut pio)).transpose()?;
        let mut pages = parts.platform.virtio_mmio.iter();
        for device in parts.devices.iter() {
            let no_place = || Error::internal("a device has no place on the board");
            let site = match device.transport() {
                Transport::Mmio => Site::Mmio(pages.next().ok_or_else(no_place)?, &mut mmio),
                Transport::Pci => Site::Pci(bridge.as_ref().ok_or_else(no_place)?, hotplug.as_ref()),
            };
            device.plug(&ports, site)?;
        }

        // 3. The threads come last, because they share the finished buses.
        let (pio, mmio) = (Arc::new(pio), Arc::new(mmio));
        let mut board = Board {
            vcpus: Vcpus::new(Arc::clone(&lifecycle), vcpus),
            lifecycle,
            serial,
            pio,
            mmio,
            bridge,
            hotplug,
            peer_memory,
            _interrupt: interrupt,
            _ram: ram,
            _vm: vm,
        };
        board.spawn_vcpus(parts)?;
        Ok(board)
    }

    fn spawn_vcpus(&mut self, parts: &Parts<'_>) -> Result<(), Error> {
        let fds = self.vcpus.fds().to_vec();
        for ((index, fd), counters) in (0..).zip(fds).zip(parts.counters) {
            let vcpu = Vcpu {
                fd,
                index,
                pio: Arc::clone(&self.pio),
                mmio: Arc::clone(&self.mmio),
                lifecycle: Arc::clone(&self.lifecycle),
                peer_memory: Arc::clone(&self.peer_memory),
                counters: Arc::clone(counters),
                faults: 0,
                begun: parts.begun,
            };
            self.vcpus.start(vcpu).map_err(|error| {
                Error::host(format!("cannot start a thread for vCPU {index}")).because(error)
            })?;
        }
        Ok(())
    }

    pub(crate) fn lifecycle(&self) -> &Arc<Lifecycle> {
        &self.lifecycle
    }

    /// The parts of this board that the control loop serves.
    pub(crate) fn served(&self) -> Served {
        Served {
            lifecycle: Arc::clone(&self.lifecycle),
            serial: Arc::clone(&self.serial),
            hotplug: self.hotplug.clone(),
            peer_memory: Arc::clone(&self.peer_memory),
            lines: self.bridge.as_ref().and_then(|bridge| bridge.lines().cloned()),
        }
    }

    /// The buses, which count exits to userspace for each range.
    pub(crate) fn buses(&self) -> Vec<(&'static str, Arc<Bus>)> {
        vec![("pio", Arc::clone(&self.pio)), ("mmio", Arc::clone(&self.mmio))]
    }

    /// Ends the vCPU threads. Afterwards the guest does not run and calls no device. Calls `meanwhile` again
    /// and again until the last vCPU has left the guest.
    pub(crate) fn end_vcpus(&mut self, meanwhile: impl FnMut()) {
        self.vcpus.end(meanwhile);
    }

    /// Drops the board's references to the devices. The devices may be unplugged afterwards.
    pub(crate) fn release(&mut self) {
        (self.pio, self.mmio) = Default::default();
        if let Some(bridge) = self.bridge.take() {
            bridge.clear();
        }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        self.end_vcpus(|| {});
    }
}

fn create_vm(kvm: &Kvm, platform: &Platform) -> Result<(VmFd, RoutingTable), Error> {
    let cannot = |what: &str| format!("cannot create {what}");
    let vm = loop {
        match kvm.create_vm() {
            // A signal arrived while the kernel waited for a grace period; the call is repeated.
            Err(error) if error.errno() == INTERRUPTED => {}
            done => break done.map_err(|error| Error::host(cannot("a virtual machine")).because(error))?,
        }
    };
    // Intel processors without "unrestricted guest" need both of these addresses. Other processors ignore
    // them.
    let tss = usize::try_from(layout::KVM_TSS.0).unwrap_or(usize::MAX);
    if let Err(error) =
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP.0).and_then(|()| vm.set_tss_address(tss))
    {
        log::debug!("KVM needs no TSS: {error}");
    }
    vm.create_irq_chip().map_err(|error| Error::host(cannot("the interrupt controller")).because(error))?;
    let limit = u32::try_from(kvm.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
    let routes = RoutingTable::new(platform.discovery, limit);
    if platform.discovery == Discovery::Cmdline {
        // A guest without ACPI calibrates its timers with the PIT.
        vm.create_pit2(kvm_bindings::kvm_pit_config::default())
            .map_err(|error| Error::host(cannot("the timer")).because(error))?;
    }
    Ok((vm, routes))
}

/// Places the PCI host bridge at its addresses on both buses.
fn pci_root(root: &PciRoot, ports: &Ports, mmio: &mut Bus, pio: &mut Bus) -> Result<Arc<HostBridge>, Error> {
    let window = |range: AddressRange| Window { base: range.base.0, size: range.size };
    let memory64 = root.memory64.map(window);
    let windows = Windows {
        memory32: window(root.memory32),
        memory64: memory64.unwrap_or_default(),
        io: Window { base: u64::from(root.io), size: u64::from(root.io_size) },
    };
    let lines = IntxLines::new(Arc::clone(&ports.interrupts))
        .map_err(|error| Error::internal("cannot make an eventfd").because(error))?;
    let bridge = HostBridge::with_lines(windows, Intx { lines, gsis: root.intx.map(|gsi| gsi.0) });
    let cannot = |error| Error::internal("cannot place the PCI root").because(error);
    mmio.insert(root.ecam.base.0, root.ecam.size, "pci-ecam", bridge.ecam()).map_err(cannot)?;
    for (window, name) in [(Some(windows.memory32), "pci-memory32"), (memory64, "pci-memory64")] {
        if let Some(window) = window {
            mmio.insert(window.base, window.size, name, bridge.memory(window)).map_err(cannot)?;
        }
    }
    pio.insert(CONFIG_PORTS, CONFIG_PORTS_LENGTH, "pci-config", bridge.config_ports()).map_err(cannot)?;
    pio.insert(windows.io.base, windows.io.size, "pci-io", bridge.io()).map_err(cannot)?;
    Ok(bridge)
}

/// Places the registers for PCI hot-plug, through which the guest ejects devices, and connects their
/// interrupt.
fn hotplug(bridge: &Arc<HostBridge>, ports: &Ports, pio: &mut Bus) -> Result<Arc<Hotplug>, Error> {
    let line = EventLine::new(ports.interrupts.as_ref(), layout::EVENT_GSI.0)
        .map_err(|error| Error::host("cannot wire the ACPI event device").because(error))?;
    let hotplug = Hotplug::new(Arc::clone(bridge), Arc::new(line));
    pio.insert(u64::from(layout::PCI_HOTPLUG_PORTS), Hotplug::LENGTH, "pci-hotplug", hotplug.clone())
        .map_err(|error| Error::internal("cannot place the registers of PCI hot-plug").because(error))?;
    Ok(hotplug)
}

fn legacy_devices(
    pio: &mut Bus,
    lifecycle: &Arc<Lifecycle>,
    output: &Arc<Transmit>,
) -> Result<Arc<Serial>, Error> {
    let serial = Arc::new(
        Serial::new(output.clone())
            .map_err(|error| Error::internal("cannot make the serial port").because(error))?,
    );
    let on_reset = |lifecycle: &Arc<Lifecycle>| {
        let lifecycle = Arc::clone(lifecycle);
        move |kind| {
            lifecycle.request(match kind {
                ResetKind::Reset => Request::Reset,
                ResetKind::PowerOff => Request::PowerOff,
            });
        }
    };
    let panicked = {
        let lifecycle = Arc::clone(lifecycle);
        move || lifecycle.request(Request::Panicked)
    };
    let ports: [(u16, u64, &str, Arc<dyn devices::bus::BusDevice>); 4] = [
        (layout::PVPANIC_PORT, PvPanic::LENGTH, "pvpanic", Arc::new(PvPanic::new(panicked))),
        (layout::COM1, Serial::LENGTH, "serial", serial.clone()),
        (
            layout::SLEEP_CONTROL_PORT,
            ResetPort::LENGTH,
            "reset",
            Arc::new(ResetPort::new(on_reset(lifecycle))),
        ),
        (layout::I8042_COMMAND_PORT, I8042::LENGTH, "i8042", Arc::new(I8042::new(on_reset(lifecycle)))),
    ];
    for (port, length, name, device) in ports {
        pio.insert(u64::from(port), length, name, device)
            .map_err(|error| Error::internal("cannot place a legacy device").because(error))?;
    }
    Ok(serial)
}

const INTERRUPTED: i32 = 4;
