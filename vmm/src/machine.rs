//! Builds a machine from a configuration, runs the guest with its reboots, and ends the machine.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use arch::boot::{BootImage, Entry, cmdline};
use arch::cpu::HostCpu;
use arch::layout::{self, Gpa};
use arch::platform::{Discovery, PciRoot, PciSlots, Platform, SerialPort};
use arch::ram::Ram;
use devices::pci::DeviceNumber;
use kvm_ioctls::Kvm;
use rustix::fs::{MemfdFlags, memfd_create};
use transport::memory::{GuestAddr, MemoryMap, SharedRegion};
use transport::peer::Limits;

use crate::board::{Bare, Board, Parts};
use crate::config::{Config, Image, OnReset, Transport};
use crate::console::Console;
use crate::console::transmit::Transmit;
use crate::control::Loop;
use crate::control::ledger::Ledger;
use crate::devices::peers::{Heard, Peers};
use crate::devices::vfio::{self, Candidate};
use crate::devices::virtio::{Surroundings, VirtioDevice};
use crate::devices::windows::Windows;
use crate::devices::{DeviceId, DeviceList};
use crate::error::Error;
use crate::handle::{End, Event, Handle, Mailbox};
use crate::host::kvm;
use crate::host::mapping::Mapping;
use crate::life::gate::Request;
use crate::life::reboots::Reboots;
use crate::life::signals::Signals;
use crate::life::vcpu::VcpuCounters;
use crate::stats::{Startup, Stats};

/// The result of a machine that has ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// The statistics.
    pub stats: Stats,
}

/// A machine that is ready to run: its backends are connected and its guest is loaded.
pub struct Machine {
    lasting: Lasting,
    board: Board,
    on_reset: OnReset,
    reboots: Reboots,
    console: Console,
    signals: Signals,
    handle: Handle,
    mailbox: Mailbox,
    startup: Startup,
}

/// The parts of a machine that stay over reboots. A reboot replaces only the board.
struct Lasting {
    kvm: Kvm,
    host_cpu: HostCpu,
    platform: Platform,
    files: Files,
    ram: Ram,
    ram_mappings: Vec<Mapping>,
    devices: DeviceList,
    /// The thread that serves requests of backends and servers. It runs as long as the machine lives.
    _peers: Arc<Peers>,
    counters: Vec<Arc<VcpuCounters>>,
    output: Arc<Transmit>,
    begun: Instant,
}

impl Lasting {
    /// Makes a board in its state at power-on, with the guest loaded.
    fn board(&self, entry: &Entry) -> Result<Board, Error> {
        let parts = Parts {
            kvm: &self.kvm,
            host_cpu: &self.host_cpu,
            ram: &self.ram,
            ram_mappings: &self.ram_mappings,
            platform: &self.platform,
            output: &self.output,
            counters: &self.counters,
            devices: &self.devices,
            begun: self.begun,
        };
        let bare = Bare::construct(&parts)?.power_on(&parts, entry)?;
        Board::wire(bare, &parts)
    }
}

impl Machine {
    /// Builds a machine in numbered steps. The steps that find mistakes of the user come first; the steps
    /// that take time come last.
    ///
    /// # Errors
    /// When the configuration is wrong, the host lacks something, or a peer fails. A failed build leaves
    /// nothing behind.
    pub fn build(mut config: Config) -> Result<Self, Error> {
        transport::peer::eventfd::signal_by(crate::host::descriptors::signal);
        let begun = Instant::now();
        config.settle()?;
        let mut startup = Startup::default();

        // 1. The files that the user named, then the host's KVM.
        let mut files = Files::open(&config)?;
        let kvm = kvm::open()?;
        files.cmdline = HostCpu::with_tsc(&kvm, files.cmdline);
        let host_cpu =
            HostCpu::probe(&kvm).map_err(|error| Error::host("cannot use KVM's CPUs").because(error))?;
        let numbers = function_numbers(&config)?;
        let platform = describe(&config, &host_cpu, &numbers)?;
        log::info!(
            "{} vCPU(s), {} MiB, {} virtio device(s), {} PCI device(s) of servers",
            config.cpus,
            config.memory.size >> 20,
            config.vhost_user.len(),
            config.vfio_user.len()
        );

        fits(&config, &host_cpu)?;

        // 2. Guest RAM. It is mapped once; every board uses the same mapping.
        let ram = Ram::allocate(config.memory.size, config.memory.hugepages).map_err(|error| {
            let hint = error.hint();
            Error::host("cannot allocate guest memory").because(error).hints(hint)
        })?;
        let ram_mappings = map(&ram, config.memory.dump)?;
        let memory = memory_map(&ram, &ram_mappings)?;
        startup.ram = elapsed(begun);

        // 3. The guest's image. A bad image is found before a peer is contacted.
        let entry = files.load(&ram, &platform)?;
        startup.image = elapsed(begun);

        // 4. The backends and servers. Each one is connected and asked what it offers.
        let peers = Peers::new(config.vhost_user.len())
            .map(Arc::new)
            .map_err(|error| Error::internal("cannot make an eventfd").because(error))?;
        let pci = platform.pci.and_then(|root| root.memory64);
        let pci = pci.map(|range| range.base.0..range.base.0.saturating_add(range.size));
        let mut windows = Windows::above(memory.end().raw(), host_cpu.physical_address_bits(), pci);
        let mut devices = DeviceList::default();
        let trace = config.trace.as_ref();
        let (handle, mailbox) =
            Handle::new().map_err(|error| Error::internal("cannot make a socket pair").because(error))?;
        let listeners = &mailbox.listeners;
        let mut machine =
            Surroundings { memory: &memory, peers: &peers, trace, windows: &mut windows, listeners };
        for (index, device) in config.vhost_user.into_iter().enumerate() {
            let device = VirtioDevice::connect(index, device, &mut machine)?;
            devices.push(device);
        }
        let mut candidates = Vec::new();
        for (device, number) in config.vfio_user.into_iter().zip(numbers) {
            let id = DeviceId::from(device.id.clone().unwrap_or_default());
            let limits = Limits::new(device.deadline).admitting(device.admission);
            let limits = match &config.trace {
                Some(trace) => limits.traced(Arc::clone(trace)),
                None => limits,
            };
            candidates.push(Candidate::connect(device, id, number, &memory, limits)?);
        }
        let wanted: Vec<_> = candidates.iter().map(Candidate::vectors).collect();
        let virtio = devices.iter().filter(|device| device.transport() == Transport::Pci).count();
        let shares = vfio::shares(&wanted, kvm::message_routes(&kvm).saturating_sub(virtio * VIRTIO_VECTORS));
        for (candidate, vectors) in candidates.into_iter().zip(shares) {
            let (device, receiver) = candidate.admit(vectors, listeners)?;
            let function = device.function();
            peers.listen(Heard::Server(receiver, Arc::clone(function))).map_err(no_thread)?;
            if function.shape.pin.is_some() {
                peers.listen(Heard::Pin(Arc::clone(function))).map_err(no_thread)?;
            }
            devices.push(device);
        }
        startup.peers = elapsed(begun);

        // 5. The console and the board. The console comes late, because few steps can fail after it.
        let console = Console::open(&config.serial)?;
        let lasting = Lasting {
            kvm,
            host_cpu,
            platform,
            files,
            ram,
            ram_mappings,
            devices,
            _peers: peers,
            counters: (0..config.cpus).map(|_| Arc::default()).collect(),
            output: Arc::clone(console.output()),
            begun,
        };
        let board = lasting.board(&entry)?;
        startup.board = elapsed(begun);
        Ok(Machine {
            lasting,
            board,
            on_reset: config.on_reset,
            reboots: Reboots::new(config.cmdline.is_none()),
            console,
            signals: Signals::default(),
            handle,
            mailbox,
            startup,
        })
    }

    /// A handle that reaches the machine from another thread.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Lets signals to this process end the machine in order. The terminal's settings are restored while the
    /// process is stopped.
    pub fn serve_signals(&mut self, signals: Signals) {
        self.signals = signals;
    }

    /// Runs the guest until it ends. Blocks; the calling thread becomes the control loop.
    ///
    /// # Errors
    /// When the host fails, or a reboot cannot be carried out.
    pub fn run(self) -> Result<Outcome, Error> {
        let Machine { lasting, mut board, console, signals, mailbox, startup, .. } = self;
        let listeners = Arc::clone(&mailbox.listeners);
        let mut reboots = self.reboots;
        let devices = &lasting.devices;
        let ledger = Ledger::new(startup, lasting.counters.clone(), devices.clone());
        let mut control = Loop::new(console, devices.clone(), signals, mailbox, ledger)?;
        let end = loop {
            let lifecycle = Arc::clone(board.lifecycle());
            control.ledger(|ledger| {
                ledger.kept.boots += 1;
                ledger.buses = board.buses();
            });
            control.serve(Some(board.served()))?;
            let opened = Instant::now();
            lifecycle.open();
            while lifecycle.take_request().is_none() {
                control.turn(None)?;
            }
            board.end_vcpus(|| control.turn_and_hurry());
            control.serve(None)?;
            // The request is read again here, because a request that arrived in the meantime may replace a
            // reset.
            let request = control.ending().or_else(|| lifecycle.take_request()).unwrap_or(Request::Quit);
            control.ledger(Ledger::close_board);
            board.release();
            let end = match request {
                Request::Reset if self.on_reset == OnReset::Reboot => {
                    reboots.again(opened.elapsed()).err().map(End::Crash)
                }
                request => Some(End::from(request)),
            };
            if end.is_some() {
                listeners.end();
            }
            let unplugged = devices.apart(if end.is_none() {
                |device| device.unplug()
            } else {
                |device| {
                    device.ending();
                    device.unplug();
                    device.end();
                }
            });
            while !unplugged.is_done() {
                control.turn_and_hurry();
            }
            if let Some(end) = end.or_else(|| control.ending().map(End::from)) {
                break end;
            }
            log::info!("the guest reset the machine: starting it again");
            listeners.tell(&Event::GuestReset);
            let entry = lasting.files.load(&lasting.ram, &lasting.platform)?;
            board = lasting.board(&entry)?;
        };
        control.finish()?;
        let mut stats = control.ledger(|ledger| ledger.read());
        stats.end = end.name();
        listeners.tell(&Event::Ended(end.clone()));
        Ok(Outcome { end, stats })
    }
}

/// The images. They stay open for the machine's whole life, so that a reboot starts the same kernel even if
/// another file has taken its path.
struct Files {
    kernel: (File, String),
    initramfs: Option<(File, String)>,
    cmdline: String,
}

impl Files {
    fn open(config: &Config) -> Result<Self, Error> {
        let open = |what: &str, image: &Image| {
            let cannot = || Error::usage(format!("cannot open the {what} {image}"));
            let file = match image {
                Image::Path(path) => File::open(path).map_err(|error| {
                    let missing = error.kind() == std::io::ErrorKind::NotFound;
                    let error = cannot().because(error);
                    if missing {
                        error.hint("is the path right? relative paths start where outboard runs")
                    } else {
                        error
                    }
                })?,
                Image::File(file) => file.try_clone().map_err(|error| cannot().because(error))?,
                Image::Bytes(bytes) => in_memory(bytes).map_err(|error| cannot().because(error))?,
            };
            Ok::<_, Error>((file, image.to_string()))
        };
        let cmdline = config.cmdline.as_deref().unwrap_or_else(|| config.default_cmdline());
        let (cmdline, said) = cmdline::servable(cmdline, config.discovery, config.has_pci());
        for words in said {
            log::warn!("{words}");
        }
        Ok(Files {
            kernel: open("kernel", &config.kernel)?,
            initramfs: config.initramfs.as_ref().map(|image| open("initramfs", image)).transpose()?,
            cmdline,
        })
    }

    fn load(&self, ram: &Ram, platform: &Platform) -> Result<Entry, Error> {
        let cmdline = cmdline::with_parameters(&self.cmdline, &platform.device_parameters());
        let image = BootImage {
            kernel: &self.kernel.0,
            initramfs: self.initramfs.as_ref().map(|(file, _)| file),
            cmdline: &cmdline,
        };
        let cannot = || Error::usage(format!("cannot boot {}", self.kernel.1));
        arch::boot::load(ram, &image, platform).map_err(|error| {
            let hint = error.hint();
            cannot().because(error).hints(hint)
        })
    }
}

/// A file in memory that holds `bytes`, so that an image given as bytes is loaded in the same way as a file.
fn in_memory(bytes: &[u8]) -> std::io::Result<File> {
    let mut file = File::from(memfd_create("outboard-image", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file)
}

/// The number of message interrupts reserved for a virtio PCI function: one for each of 64 queues and one for
/// the configuration.
const VIRTIO_VECTORS: usize = 65;

fn no_thread(error: std::io::Error) -> Error {
    Error::internal("cannot start the thread `peers`").because(error)
}

/// Checks that the guest's processor can address the guest memory, and that the memory fits into one slot of
/// KVM.
fn fits(config: &Config, host: &HostCpu) -> Result<(), Error> {
    let bits = host.physical_address_bits();
    let hole = layout::HOLE_END.0 - layout::HOLE_START.0;
    let end = config.memory.size.saturating_add(hole);
    if 1_u64.checked_shl(u32::from(bits)).is_some_and(|limit| end > limit) {
        return Err(Error::host(format!("guest memory of {} MiB is too large", config.memory.size >> 20))
            .because(format!("processors of this host address {bits} bits of physical memory"))
            .hint("give less --memory"));
    }
    if end > KVM_SLOT_MAX {
        return Err(Error::host(format!("guest memory of {} MiB is too large", config.memory.size >> 20))
            .because("KVM takes less than 8 TiB in one piece")
            .hint("give less --memory"));
    }
    Ok(())
}

/// The limit in bytes of one memory slot of KVM: it must have fewer than 2^31 pages.
const KVM_SLOT_MAX: u64 = ((1 << 31) - 1) * layout::PAGE_SIZE;

/// The PCI device numbers of the vfio-user servers' devices. They follow the numbers of the virtio devices. A
/// device has the same number on every board, even when a device with a lower number is no longer present.
fn function_numbers(config: &Config) -> Result<Vec<DeviceNumber>, Error> {
    let virtio = config.vhost_user.iter().filter(|device| device.transport == Transport::Pci).count();
    let numbers = DeviceNumber::ALL.skip(virtio).filter_map(DeviceNumber::new).take(config.vfio_user.len());
    let numbers: Vec<_> = numbers.collect();
    if numbers.len() < config.vfio_user.len() {
        let count = virtio.saturating_add(config.vfio_user.len());
        return Err(Error::usage(format!("{count} PCI devices are too many"))
            .hint("a machine takes 31 on its PCI bus"));
    }
    Ok(numbers)
}

/// The description of the hardware that the guest will be given.
fn describe(config: &Config, host: &HostCpu, functions: &[DeviceNumber]) -> Result<Platform, Error> {
    if config.cpus == 0 {
        return Err(Error::usage("a machine needs at least one vCPU"));
    }
    let ram_end = config.memory.size.saturating_add(layout::HOLE_END.0 - layout::HOLE_START.0);
    let removable = match config.discovery {
        Discovery::Acpi => {
            functions.iter().fold(PciSlots::default(), |slots, number| slots.with(number.get()))
        }
        // Without ACPI the guest cannot be told that a device is to be removed.
        Discovery::Cmdline => PciSlots::default(),
    };
    let pci = config
        .has_pci()
        .then(|| PciRoot { removable, ..PciRoot::new(host.physical_address_bits(), Gpa(ram_end)) });
    let slot = if pci.is_some() { layout::virtio_mmio_slot_beside_pci } else { layout::virtio_mmio_slot };
    let count = config.vhost_user.iter().filter(|device| device.transport == Transport::Mmio).count();
    let virtio_mmio = (0..count).map(slot).collect::<Option<Vec<_>>>().ok_or_else(|| {
        Error::usage(format!("{count} virtio-mmio devices are too many"))
            .hint(format!("a machine takes {}, and 31 on its PCI bus", layout::VIRTIO_MMIO_MAX))
    })?;
    Ok(Platform {
        cpus: config.cpus,
        virtio_mmio,
        pci,
        serial: Some(SerialPort::COM1),
        discovery: config.discovery,
    })
}

fn map(ram: &Ram, dump: bool) -> Result<Vec<Mapping>, Error> {
    let fd: &OwnedFd = ram.fd();
    let regions = ram.regions().iter();
    let mappings: Result<Vec<_>, _> =
        regions.map(|region| Mapping::shared(fd, region.offset, region.size)).collect();
    let mappings: Vec<Mapping> =
        mappings.map_err(|error| Error::host("cannot map guest memory").because(error))?;
    for mapping in mappings.iter().filter(|_| !dump) {
        if let Err(error) = mapping.leave_out_of_cores() {
            log::warn!("core dumps of this process would hold guest memory: {error}");
        }
    }
    Ok(mappings)
}

/// Guest RAM in the form in which peers are told of it.
fn memory_map(ram: &Ram, mappings: &[Mapping]) -> Result<MemoryMap, Error> {
    let regions = ram.regions().iter().zip(mappings).map(|(region, mapping)| {
        SharedRegion::new(GuestAddr(region.guest.0), region.size, Arc::clone(ram.fd()), region.offset)
            .with_access(Arc::new(mapping.clone()))
    });
    MemoryMap::new(regions.collect())
        .map_err(|error| Error::internal("cannot describe guest memory").because(error))
}

fn elapsed(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
