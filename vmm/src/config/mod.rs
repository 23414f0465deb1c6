//! The configuration of a machine as plain data. It may come from a command line, a TOML file or a test.
//!
//! This module must never open a file or contact a peer.

mod devices;
mod parse;
mod toml_file;

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use crate::error::Error;

pub use ::devices::pci::vfio_user::server::Writes;
pub use ::devices::virtio::backend::spec::Display;
pub use ::devices::virtio::ring::address::Iommu;
pub use arch::platform::Discovery;
pub use arch::ram::Hugepages;
pub(crate) use devices::parse_device_type;
pub use devices::{DEFAULT_DEADLINE, Role, Socket, Transport, VfioUser, VhostUser};
pub use parse::{parse_memory, parse_serial, parse_vfio_user, parse_vhost_user};
pub use toml_file::load as load_toml;
pub use transport::peer::Trace;
pub use transport::peer::socket::Admission;

/// The kernel command line of a machine without PCI devices, used when none is given.
///
/// * `console=ttyS0`: the serial port is the only console.
/// * `panic=-1`: a kernel that panics reboots at once instead of hanging.
/// * `pci=off`, `8250.nr_uarts=1`: the kernel does not search for a PCI bus and further serial ports, because
///   the machine has no PCI bus and one serial port.
/// * `cryptomgr.notests`: the self-tests of the kernel's ciphers take a third of a stock kernel's start.
///
/// A machine with PCI devices has [`DEFAULT_CMDLINE_WITH_PCI`].
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1 pci=off 8250.nr_uarts=1 cryptomgr.notests";

/// The kernel command line of a machine with PCI devices, used when none is given. `pci=noearly`: the machine
/// has no chipset that needs early quirks.
pub const DEFAULT_CMDLINE_WITH_PCI: &str =
    "console=ttyS0 panic=-1 pci=noearly 8250.nr_uarts=1 cryptomgr.notests";

/// One machine.
pub struct Config {
    /// The kernel image: bzImage or ELF.
    pub kernel: Image,
    /// The initial RAM file system.
    pub initramfs: Option<Image>,
    /// The kernel command line; [`Config::default_cmdline`] when absent.
    pub cmdline: Option<String>,
    /// Guest RAM.
    pub memory: Memory,
    /// vCPUs, 1 to 255.
    pub cpus: u8,
    /// virtio devices served by vhost-user backends, in the order of their guest addresses.
    pub vhost_user: Vec<VhostUser>,
    /// PCI devices served by vfio-user servers, in the order of their device numbers.
    pub vfio_user: Vec<VfioUser>,
    /// The other end of the serial console.
    pub serial: Serial,
    /// The effect of a guest's reset.
    pub on_reset: OnReset,
    /// How the guest learns of its virtio-mmio devices.
    pub discovery: Discovery,
    /// Receiver of every message exchanged with a peer.
    pub trace: Option<Arc<dyn Trace>>,
}

impl Config {
    /// A machine with one vCPU, 256 MiB of RAM, no devices and no console. It ends at a reset.
    pub fn new(kernel: Image) -> Self {
        Config {
            kernel,
            initramfs: None,
            cmdline: None,
            memory: Memory::default(),
            cpus: 1,
            vhost_user: Vec::new(),
            vfio_user: Vec::new(),
            serial: Serial::Null,
            on_reset: OnReset::Exit,
            discovery: Discovery::Acpi,
            trace: None,
        }
    }

    /// Whether the machine has a PCI bus. It has one only when a device is on the bus. The search of an empty
    /// bus costs a stock kernel some 500 exits; with `pci=off` it costs none.
    #[must_use]
    pub fn has_pci(&self) -> bool {
        !self.vfio_user.is_empty() || self.vhost_user.iter().any(|device| device.transport == Transport::Pci)
    }

    /// Gives an id to each device that has none. Refuses what is wrong in the configuration alone, before a
    /// file is opened or a peer is contacted.
    ///
    /// # Errors
    /// When there is no vCPU, a device's values are refused, a socket's path is too long for a socket, two
    /// devices have the same id, or two sockets would listen on the same path.
    pub fn settle(&mut self) -> Result<(), Error> {
        if self.cpus == 0 {
            return Err(Error::usage("a machine needs at least one vCPU").hint("give cpus from 1 to 255"));
        }
        for (index, device) in self.vhost_user.iter_mut().enumerate() {
            device.order()?;
            let kind = device.kind.split(':').next().unwrap_or_default();
            device.id.get_or_insert_with(|| format!("{kind}{index}"));
        }
        for (index, device) in self.vfio_user.iter_mut().enumerate() {
            device.id.get_or_insert_with(|| format!("vfio-user{index}"));
        }
        let virtio = self.vhost_user.iter().map(|device| (&device.id, &device.socket, device.role));
        let functions = self.vfio_user.iter().map(|device| (&device.id, &device.socket, Role::Client));
        let (mut ids, mut listening) = (Vec::new(), Vec::new());
        for (id, socket, role) in virtio.chain(functions) {
            if ids.contains(&id) {
                return Err(Error::usage(format!(
                    "two devices are called {}",
                    id.as_deref().unwrap_or_default()
                ))
                .hint("give one of them another id="));
            }
            ids.push(id);
            if let Socket::Path(path) = socket {
                devices::check_socket_path(path)?;
                listening.extend((role == Role::Server).then_some(path));
            }
        }
        if let Serial::Socket(path, _) = &self.serial {
            devices::check_socket_path(path)?;
            listening.push(path);
        }
        listening.sort_unstable();
        if let Some([path, _]) = listening.array_windows().find(|[one, other]| one == other) {
            return Err(Error::usage(format!(
                "two sockets of this machine would listen on {}",
                path.display()
            ))
            .hint("give each device with server=on, and the console, a path of its own"));
        }
        Ok(())
    }

    /// The kernel command line that is used when the user gives none.
    #[must_use]
    pub fn default_cmdline(&self) -> &'static str {
        if self.has_pci() { DEFAULT_CMDLINE_WITH_PCI } else { DEFAULT_CMDLINE }
    }
}

/// A file whose contents the guest gets.
#[derive(Clone, Debug)]
pub enum Image {
    /// A path, opened when the machine is built.
    Path(PathBuf),
    /// An open file, read from offset 0.
    File(Arc<File>),
    /// Bytes in memory, such as a tiny kernel in a test.
    Bytes(Arc<[u8]>),
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Image::Path(path) => write!(f, "{}", path.display()),
            Image::File(_) => f.write_str("(an open file)"),
            Image::Bytes(bytes) => write!(f, "({} bytes in memory)", bytes.len()),
        }
    }
}

/// Guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes; a multiple of 2 MiB.
    pub size: u64,
    /// The kind of pages behind it.
    pub hugepages: Hugepages,
    /// Whether a core dump of this process contains guest RAM.
    pub dump: bool,
}

impl Default for Memory {
    fn default() -> Self {
        Memory { size: 256 << 20, hugepages: Hugepages::Off, dump: false }
    }
}

/// The other end of the serial console.
#[derive(Clone)]
pub enum Serial {
    /// Standard input and output. If standard input is a terminal, it is in raw mode.
    Stdio,
    /// No console: output is dropped, and there is no input.
    Null,
    /// A file, which is created or truncated.
    File(PathBuf),
    /// A unix socket on which we listen, and the users who may connect to it. It serves one client at a time.
    Socket(PathBuf, Admission),
    /// A sink of the library's caller, such as [`Serial::buffer`].
    Sink(Arc<Mutex<dyn Write + Send>>),
}

impl Serial {
    /// A console whose output is kept in memory, and that memory.
    pub fn buffer() -> (Self, Arc<Mutex<Vec<u8>>>) {
        let buffer = Arc::new(Mutex::new(Vec::new()));
        (Serial::Sink(Arc::clone(&buffer) as Arc<Mutex<dyn Write + Send>>), buffer)
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Serial::Stdio => f.write_str("Stdio"),
            Serial::Null => f.write_str("Null"),
            Serial::File(path) => f.debug_tuple("File").field(path).finish(),
            Serial::Socket(path, _) => f.debug_tuple("Socket").field(path).finish(),
            Serial::Sink(_) => f.write_str("Sink"),
        }
    }
}

/// The effect of a guest's reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReset {
    /// The machine starts again, with the same backend connections.
    Reboot,
    /// The machine ends as if powered off.
    Exit,
}
